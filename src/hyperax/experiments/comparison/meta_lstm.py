"""The recipe `meta-lstm`: a learned start with update rules that are given, partly learned, or learned as an LSTM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from hyperax.experiments.comparison.entrants import Entrant, Setting
from hyperax.experiments.comparison.roster import FIVE_FIVE, FIVE_ONE, trained
from hyperax.experiments.comparison.study import Comparison, signed
from hyperax.fewshot.evaluation import paired_difference
from hyperax.fewshot.learners.learner import Learner
from hyperax.fewshot.learners.maml import maml, meta_sgd
from hyperax.fewshot.learners.meta_lstm import meta_lstm
from hyperax.rollout import check_steps


@dataclass(frozen=True)
class MetaLSTM(Comparison):
    """A learned start for all rows; what is learned of the update differs, and nothing else.

        w_0 = lam_0,   w_t = w_{t-1} - eta g_t             MAML (g_t = grad L(w_{t-1})): one fixed step size
                       w_t = w_{t-1} - exp(lam_1) g_t      Meta-SGD: a learned one for each parameter
                       w_t = f_t w_{t-1} - i_t g_t         Meta-LSTM: gates of a learned LSTM

    Meta-LSTM is trained with gradients of L as constants, as published, and once more with exact hypergradients. One
    start serves any number of classes, because the head starts at zero in every episode; so T is at least 2.
    Reference: Ravi and Larochelle 2017, Sec. 3; Bridge paper 2017, Sec. 3.

    >>> [entrant.name for entrant in MetaLSTM().entrants()]
    ['MAML', 'First-order MAML', 'Meta-SGD', 'Meta-LSTM', 'Meta-LSTM, exact']
    """

    kind: ClassVar[str] = "meta-lstm"
    source: ClassVar[str] = "Ravi and Larochelle 2017"
    reference: ClassVar[str] = "MAML"
    recipe: str = "meta-lstm"
    title: str = "A learned start with learned update rules (Meta-LSTM)"
    inner_steps: int = 5
    """T in training."""
    filters: int = 16
    """Of the network, for all rows: the rule of Meta-LSTM costs as much as there are weights."""

    def __post_init__(self) -> None:
        check_steps(self.inner_steps, "inner_steps", 2)
        check_steps(self.filters, "filters", 1)
        super().__post_init__()

    def all_settings(self) -> tuple[Setting, ...]:
        """5-way, 1-shot and 5-shot."""
        return FIVE_ONE, FIVE_FIVE

    def entrants(self) -> tuple[Entrant, ...]:
        """The given rule, then the learned ones."""
        return (
            self._learned("MAML", maml),
            self._learned("First-order MAML", lambda ways: maml(ways, first_order=True)),
            self._learned("Meta-SGD", meta_sgd),
            self._learned("Meta-LSTM", lambda ways: meta_lstm(ways, step_size=0.1), note="first order, as published."),
            self._learned("Meta-LSTM, exact", lambda ways: meta_lstm(ways, step_size=0.1, first_order=False)),
        )

    def _learned(self, name: str, learner: Callable[[int], Learner], **options: Any) -> Entrant:
        return trained(
            self.dataset,
            name,
            learner,
            fixed_ways=True,
            steps=self.inner_steps,
            most_steps=2 * self.inner_steps,
            filters=self.filters,
            learning_rate=3e-3,
            **options,
        )

    def headline(self, tests: list[tuple[dict[str, Any], np.ndarray]]) -> dict[str, str]:
        """What the learned rule adds to the learned start, in the first setting."""
        setting = self.chosen_settings()[0]
        of = {record["entrant"]: found for record, found in tests if record["setting"] == setting.name}
        if not {"MAML", "Meta-SGD", "Meta-LSTM"} <= set(of):
            return super().headline(tests)
        minus = lambda name: signed(paired_difference(of[name], of["MAML"]))
        text = (
            f"points of accuracy on unseen classes of {self.dataset} is Meta-LSTM minus MAML, {setting.words}, at "
            f"{100 * self.budget:g} % of the full number of hyperiterations; Meta-SGD minus MAML {minus('Meta-SGD')}."
        )
        return {"number": minus("Meta-LSTM"), "text": text}

    def notes(self) -> list[str]:
        """What has to be known to read the table."""
        return [
            f"All rows have a network of {self.filters} filters that starts alike, the same episodes, and "
            f"T = {self.inner_steps} in training; in the test T up to {2 * self.inner_steps}, chosen on validation "
            "classes.",
            *super().notes(),
        ]

    def published(self) -> str:
        """There is no number to stand beside."""
        return f"{self.source}, who measure on other images with another network"
