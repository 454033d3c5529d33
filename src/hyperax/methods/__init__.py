"""Methods: how f_T is differentiated."""

from hyperax.methods.first_order import FirstOrder
from hyperax.methods.forward import Forward
from hyperax.methods.hypergradient import HypergradientFunction, hypergradient
from hyperax.methods.method import Method, Outcome
from hyperax.methods.reverse import Reverse
from hyperax.methods.truncated import Truncated

__all__ = [
    "FirstOrder",
    "Forward",
    "HypergradientFunction",
    "Method",
    "Outcome",
    "Reverse",
    "Truncated",
    "hypergradient",
]
