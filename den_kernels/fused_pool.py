"""What ends a network's map: a norm, if any, a ReLU behind it, and the average over all pixels.

T sets (such as tasks), C channels, N samples, H W space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FusedPool(nn.Module):
    """The global average pool [N, C, H, W] -> [N, C], of relu(scale * x + shift) or of x itself. Inference only.

    By itself it is plain PyTorch; `FusedChain` makes it the end of its one call.

    Args:
        scale, shift: a folded norm, float [T, C] each; or None for both.
    """

    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, scale: Tensor | None = None, shift: Tensor | None = None) -> None:
        super().__init__()
        if (scale is None) != (shift is None):
            raise ValueError("scale and shift go together; one of them is None")
        if scale is not None and shift is not None and (scale.dim() != 2 or scale.shape != shift.shape):
            raise ValueError(
                f"scale has shape {tuple(scale.shape)} and shift {tuple(shift.shape)}; both must be [sets, channels]"
            )
        self.register_buffer("scale", None if scale is None else scale.detach().float().contiguous())
        self.register_buffer("shift", None if shift is None else shift.detach().float().contiguous())

    def tables(self, set_index: int = 0) -> tuple[Tensor, ...]:
        """Scale and shift [C] of one set; empty without a norm."""
        if self.scale is None or self.shift is None:
            return ()
        return self.scale[set_index], self.shift[set_index]

    def forward(self, x: Tensor, set_index: int = 0) -> Tensor:
        """x [N, C, H, W] -> [N, C], of x's dtype."""
        return global_pool(x, self.tables(set_index))


def global_pool(x: Tensor, tables: tuple[Tensor, ...], out: Tensor | None = None) -> Tensor:
    """The average of x [N, C, H, W] over its pixels; of relu(scale * x + shift) where `tables` holds these, [C]."""
    if tables:
        scale, shift = (table.to(x.dtype).view(-1, 1, 1) for table in tables)
        x = torch.addcmul(shift, x, scale).relu_()
    return torch.mean(x, (2, 3), out=out)
