"""PyTorch models and training steps: hyperax's methods, run on torch tensors, and its outer loop around them.

    minimise  f_T(lam) = E(s_T(lam), lam)      s_0 = Phi_0(lam),   s_t = Phi_t(s_{t-1}, lam),  t = 1, ..., T

The inner run and its derivatives never leave PyTorch; lam, f_T and its hypergradient cross to JAX once a
hyperiteration.
"""

try:
    import torch  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ImportError('hyperax.torch needs PyTorch: pip install "hyperax[torch]"') from error

from hyperax.torch.batches import Batches
from hyperax.torch.certificate import TorchCertificate, certify
from hyperax.torch.hypergradient import TorchHypergradient, hypergradient
from hyperax.torch.module import Training, from_module, per_layer
from hyperax.torch.problem import JaxObjective, Problem, inner_gradient

__all__ = [
    "Batches",
    "JaxObjective",
    "Problem",
    "TorchCertificate",
    "TorchHypergradient",
    "Training",
    "certify",
    "from_module",
    "hypergradient",
    "inner_gradient",
    "per_layer",
]
