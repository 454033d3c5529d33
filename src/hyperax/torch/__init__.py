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
from hyperax.torch.crossing import to_jax, to_torch
from hyperax.torch.detached import DetachedWarning
from hyperax.torch.hypergradient import TorchHypergradient, hypergradient
from hyperax.torch.model import Model
from hyperax.torch.module import from_module, per_layer
from hyperax.torch.problem import JaxObjective, Problem, inner_gradient
from hyperax.torch.tasks import TorchMeanOverTasks, mean_over_tasks
from hyperax.torch.trained import Training

__all__ = [
    "Batches",
    "DetachedWarning",
    "JaxObjective",
    "Model",
    "Problem",
    "TorchCertificate",
    "TorchHypergradient",
    "TorchMeanOverTasks",
    "Training",
    "certify",
    "from_module",
    "hypergradient",
    "inner_gradient",
    "mean_over_tasks",
    "per_layer",
    "to_jax",
    "to_torch",
]
