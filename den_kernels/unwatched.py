"""Whether a call may leave out the operator that PyTorch would see."""

from __future__ import annotations

import torch
from torch import Tensor

_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack
_trace = torch._C._get_tracing_state
_profiled = torch.autograd._profiler_enabled


def unwatched(x: Tensor) -> bool:
    """Whether an operator on x would be seen by nothing but its own kernel.

    False under torch.compile, a trace, a mode (such as FlopCounterMode or fake tensors, but a default device too), a
    transform of torch.func or a profiler, for a subclass of Tensor, and for an x that requires a gradient while
    gradients are on.
    """
    return (
        type(x) is Tensor
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.compiler.is_compiling()
        and not _dispatch_modes()
        and not _function_modes()
        and _transform() is None
        and _trace() is None
        and not _profiled()
    )
