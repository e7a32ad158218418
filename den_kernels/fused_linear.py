"""The inference form of a linear layer on pooled features, which a chain can end in.

K outputs, C channels, N samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from den_kernels.chain import as_pixels
from den_kernels.fused_conv import FusedConv2d


class FusedLinear(FusedConv2d):
    """A linear layer whose weight is packed for one backend; `FusedChain` makes it the end of its one call.

    It is a 1x1 convolution of an image whose pixels are the samples.

    Args:
        weight: [K, C]. bias: [K], or None.
        backend: as in `FusedResidualBlock`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> None:
        ones = torch.ones(weight.shape[0], device=weight.device)
        shift = torch.zeros_like(ones) if bias is None else bias
        tables = (table[None, None] for table in (ones, shift))
        super().__init__(weight[:, :, None, None], *tables, winograd=False, backend=backend)

    def forward(self, features: Tensor) -> Tensor:  # type: ignore[override]
        """features [N, C] -> [N, K], of its dtype."""
        if not len(features):
            return features.new_empty(0, self.out_channels)
        only = torch.zeros(1, dtype=torch.int32, device=features.device)
        y = torch.ops.den_kernels.fused_conv2d(
            as_pixels(features.contiguous()), only, only, None, None, *self.arguments()[:-1], self.backend
        )
        return y.permute(0, 2, 3, 1).reshape(len(features), self.out_channels)
