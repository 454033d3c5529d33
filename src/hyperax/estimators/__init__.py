"""scikit-learn estimators whose hyperparameters are tuned by hypergradient; no JAX is seen from outside."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hyperax.estimators.data_cleaner import DataCleaner
    from hyperax.estimators.logistic_regression import HypergradientLogisticRegression
    from hyperax.estimators.multitask import MultitaskRidge
    from hyperax.estimators.ridge import HypergradientRidge

_MODULES = {
    "DataCleaner": "data_cleaner",
    "HypergradientRidge": "ridge",
    "HypergradientLogisticRegression": "logistic_regression",
    "MultitaskRidge": "multitask",
}

__all__ = ["DataCleaner", "HypergradientLogisticRegression", "HypergradientRidge", "MultitaskRidge"]


def __getattr__(name: str):
    # Each estimator is imported when it is asked for: one does not pay for the others.
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
