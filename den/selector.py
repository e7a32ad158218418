"""The selector g(x; theta_sel): a small network that gives each block's level probabilities (section 3.1, equation 3).

Suffixes: N samples, C channels, H W space, B blocks, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from den.blocks import conv_out, shortcut
from den.budget import Budget, Conditioning, check_budget
from den.estimator import stem_stride, xavier

MASKED = -1e4  # logit of a level that a block lacks: probability exactly 0 in float32, finite in float16


@dataclass(frozen=True)
class SelectorSpec:
    """Shape of a selector.

    widths: channels of its stages, each at half the resolution of the one before.
    blocks_per_stage: basic residual blocks in each.
    pool: the image is first average-pooled by this factor (beyond what brings it to base_size).
    base_size: as the estimator's.
    budget: None; or the selector is told the wanted mean cost, and this is the one where none is given.
    """

    widths: tuple[int, ...] = (16, 32, 64)
    blocks_per_stage: int = 4
    pool: int = 1
    base_size: int | None = 32
    budget: float | None = None

    def macs(self, in_channels: int, height: int, width: int) -> int:
        """Multiply-adds of its convolutions for one image."""
        stride = stem_stride(height, width, self.base_size) * self.pool
        size = conv_out(height, stride), conv_out(width, stride)
        total = 9 * in_channels * self.widths[0] * size[0] * size[1]
        channels = self.widths[0]
        for stage, stage_width in enumerate(self.widths):
            if stage:
                size = conv_out(size[0], 2), conv_out(size[1], 2)
            for _ in range(self.blocks_per_stage):
                total += 9 * stage_width * (channels + stage_width) * size[0] * size[1]
                channels = stage_width
        return total

    def asdict(self) -> dict:
        """For a config file; `SelectorSpec(**d)` rebuilds it."""
        return {**asdict(self), "widths": list(self.widths)}


# From dear to cheap. Few blocks: at batch 1 a selector's time is its number of layers more than its FLOPs.
LIGHT = (
    *(SelectorSpec((width, 2 * width, 4 * width), 1, 2) for width in (32, 24, 16, 12, 8, 6, 4)),
    *(SelectorSpec((width, 2 * width, 4 * width), 1, 4) for width in (8, 4)),
)
LIGHT_SHARE = 0.03


def light_spec(in_channels: int, estimator_macs: int, image_size: int, base_size: int | None) -> SelectorSpec:
    """The largest selector of `LIGHT` that costs at most 3% of the estimator; the smallest if none is that cheap."""
    for light in LIGHT:
        spec = replace(light, base_size=base_size)
        if spec.macs(in_channels, image_size, image_size) <= LIGHT_SHARE * estimator_macs:
            break
    return spec


class SelectorBlock(nn.Module):
    """Basic post-activation block: `relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))`."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride, self.out_channels = stride, out_channels
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, out_channels, ceil(H / stride), ceil(W / stride)]."""
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(shortcut(x, self.stride, self.out_channels) + h)


class Selector(nn.Module):
    """A residual network whose last layer gives a logit for each block and level.

    With the default shape (the note's reading of the paper's WRN selector): 0.37M parameters, 0.11 GFLOP at
    32x32. Its batch norm is the plain kind. One selector serves every task: the paper does not tell it the
    task.

    Args:
        num_blocks, num_levels: B and L of the estimator.
        in_channels: of the image.
        spec: the shape.
        level_counts: number of levels of each block where some have fewer than L: the missing ones are
            masked.
        cost_BL: of each level, for a selector with a budget.
    """

    level_mask: Tensor | None
    condition: Conditioning | None

    def __init__(
        self,
        num_blocks: int,
        num_levels: int,
        in_channels: int = 3,
        spec: SelectorSpec | None = None,
        level_counts: Sequence[int] | None = None,
        cost_BL: Tensor | None = None,
    ):
        super().__init__()
        self.num_blocks, self.num_levels = num_blocks, num_levels
        self.spec = spec = SelectorSpec() if spec is None else spec
        self.conv = nn.Conv2d(in_channels, spec.widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(spec.widths[0])
        channels = spec.widths[0]
        blocks = []
        for stage, width in enumerate(spec.widths):
            for index in range(spec.blocks_per_stage):
                blocks.append(SelectorBlock(channels, width, 2 if stage and index == 0 else 1))
                channels = width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, num_blocks * num_levels)
        mask = None
        if level_counts is not None and min(level_counts) < num_levels:
            mask = torch.arange(num_levels) >= torch.tensor(list(level_counts))[:, None]
        self.register_buffer("level_mask", mask, persistent=False)
        self.condition = None
        if spec.budget is not None:
            if cost_BL is None:
                raise ValueError("cost_BL is missing; a selector with a budget needs the cost of each level")
            self.condition = Conditioning(channels, cost_BL, spec.budget)
        self.apply(xavier)
        if self.condition is not None:
            self.condition.neutral()

    def forward(self, x: Tensor, budget: Budget | None = None) -> Tensor:
        """Logits [N, B, L] of images x [N, C, H, W]; `softmax` over L is C(x), the columns of equation 3.

        budget: the wanted mean cost, a number or [N], where the selector was made for one.
        """
        budget_N = budget_of(self.condition, budget, x)
        x, stride = shrink(x, self.spec)
        x = F.relu(self.norm(F.conv2d(x, self.conv.weight, None, stride, 1)))
        for block in self.blocks:
            x = block(x)
        return read_head(self.head, self.condition, x.mean((2, 3)), budget_N, self.num_blocks, self.level_mask)


def budget_of(condition: Conditioning | None, budget: Budget | None, x: Tensor) -> Tensor | None:
    """The budget of each image, [N], its default if none is given; None for a selector that takes none."""
    if condition is None:
        if budget is not None:
            raise ValueError(
                f"budget is {budget}, but this model's selector was made without one; create the model with budget=..."
            )
        return None
    return check_budget(condition.default if budget is None else budget, x)


def read_head(
    head: nn.Module,
    condition: Conditioning | None,
    features_NC: Tensor,
    budget_N: Tensor | None,
    num_blocks: int,
    mask_BL: Tensor | None,
) -> Tensor:
    """Logits [N, B, L] of pooled features."""
    if condition is None or budget_N is None:
        return mask_levels(head(features_NC), num_blocks, mask_BL)
    logits = head(condition.features(features_NC, budget_N)).unflatten(1, (num_blocks, -1))
    return mask_levels(condition.priced(logits, budget_N).flatten(1), num_blocks, mask_BL)


def shrink(x: Tensor, spec: SelectorSpec) -> tuple[Tensor, int]:
    """The images as the selector's first convolution reads them, and its stride."""
    stride = stem_stride(x.shape[2], x.shape[3], spec.base_size)
    if spec.pool == 1:
        return x, stride
    return F.avg_pool2d(x, stride * spec.pool, ceil_mode=True), 1


def mask_levels(logits: Tensor, num_blocks: int, mask_BL: Tensor | None) -> Tensor:
    """[N, B * L] -> [N, B, L], levels that a block lacks at a logit of probability 0."""
    logits = logits.view(logits.shape[0], num_blocks, logits.shape[1] // num_blocks)
    return logits if mask_BL is None else logits.masked_fill(mask_BL, MASKED)
