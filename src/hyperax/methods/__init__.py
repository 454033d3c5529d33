"""Methods: how f_T is differentiated."""

from hyperax.methods.closed_form import ClosedForm
from hyperax.methods.doubling import Doubling
from hyperax.methods.evolution_strategy import EvolutionStrategy
from hyperax.methods.finite_difference import FiniteDifference
from hyperax.methods.first_order import FirstOrder
from hyperax.methods.forward import Forward
from hyperax.methods.hypergradient import HypergradientFunction, hypergradient
from hyperax.methods.implicit import ExponentialTolerance, Implicit, PolynomialTolerance
from hyperax.methods.method import Method, Outcome
from hyperax.methods.real_time import RealTime
from hyperax.methods.reverse import Reverse
from hyperax.methods.reversible import Reversible
from hyperax.methods.truncated import Truncated

__all__ = [
    "ClosedForm",
    "Doubling",
    "EvolutionStrategy",
    "ExponentialTolerance",
    "FiniteDifference",
    "FirstOrder",
    "Forward",
    "HypergradientFunction",
    "Implicit",
    "Method",
    "Outcome",
    "PolynomialTolerance",
    "RealTime",
    "Reverse",
    "Reversible",
    "Truncated",
    "hypergradient",
]
