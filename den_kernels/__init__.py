"""Elastic convolutions: every sample of a batch runs its own number of channels, and the work follows.

`den_conv2d` is the primitive, `DENConv2d` its module, `FusedResidualBlock` the inference form of a residual block.
`reference` is the specification. `python -m den_kernels` says which backends this machine has.
"""

from den_kernels import reference
from den_kernels.backends import available_backends
from den_kernels.functional import den_conv2d, plan_levels
from den_kernels.fused import FusedResidualBlock
from den_kernels.fused_chain import FusedChain, joins_chain
from den_kernels.fused_conv import FusedConv2d
from den_kernels.fused_linear import FusedLinear
from den_kernels.fused_pool import FusedPool
from den_kernels.modules import DENBatchNorm2d, DENConv2d, DENLinear
from den_kernels.packed import gather_weights
from den_kernels.plan import LevelPlan
from den_kernels.sync import SyncBatchNorm2d, sync_batch_norm

__version__ = "0.1.0"

__all__ = [
    "DENBatchNorm2d",
    "DENConv2d",
    "DENLinear",
    "FusedChain",
    "FusedConv2d",
    "FusedLinear",
    "FusedPool",
    "FusedResidualBlock",
    "LevelPlan",
    "SyncBatchNorm2d",
    "available_backends",
    "den_conv2d",
    "gather_weights",
    "joins_chain",
    "plan_levels",
    "reference",
    "sync_batch_norm",
]
