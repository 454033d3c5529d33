"""The effect of T (ICML 2018, Sec. 5.1): config, problem, data, runner, report."""

from hyperax.experiments.effect_of_t.config import EffectOfTConfig, config_from_json
from hyperax.experiments.effect_of_t.problem import Sets, linear_representation
from hyperax.experiments.effect_of_t.report import PAPER, format_table, write_report
from hyperax.experiments.effect_of_t.runner import resume, run

__all__ = [
    "PAPER",
    "EffectOfTConfig",
    "Sets",
    "config_from_json",
    "format_table",
    "linear_representation",
    "resume",
    "run",
    "write_report",
]
