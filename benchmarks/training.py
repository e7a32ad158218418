"""A training step of the network under test and of the same network dense, in plain PyTorch, from one set of weights.

N samples, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import den
from benchmarks.cases import RATIOS, TASK
from den.blocks import ResidualBlock, shortcut
from den.estimator import Estimator, stem_stride

LEARNING_RATE = 0.01


class PlainBlock(nn.Module):
    """A pre-activation residual block of full width as one would write it."""

    def __init__(self, block: ResidualBlock):
        super().__init__()
        self.stride, self.out_channels = block.stride, block.out_channels
        self.norm1, self.norm2 = nn.BatchNorm2d(block.in_channels), nn.BatchNorm2d(block.out_channels)
        self.conv1 = nn.Conv2d(block.in_channels, block.out_channels, 3, block.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(block.out_channels, block.out_channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.relu(self.norm1(x), inplace=True))
        h = self.conv2(F.relu(self.norm2(h), inplace=True))
        return h + shortcut(x, self.stride, self.out_channels)


class PlainNetwork(nn.Module):
    """A wide residual network of `nn.Conv2d`, `nn.BatchNorm2d` and ReLU, channels_last."""

    def __init__(self, estimator: Estimator, task: str):
        super().__init__()
        if estimator.stem is None or estimator.tail.norm is None:
            raise TypeError("this opponent is written for pre-activation networks with a stem")
        self.base_size = estimator.base_size
        self.stem = nn.Conv2d(estimator.in_channels, estimator.stem.conv.out_channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList(PlainBlock(block) for block in estimator.blocks)
        self.norm = nn.BatchNorm2d(estimator.tail.out_features)
        head = estimator.heads[task]
        self.head = nn.Linear(head.in_features, head.out_features)
        with torch.no_grad():
            # Both list their parameters in the order in which data meets them; a norm of one set has a row more.
            for (name, own), theirs in zip(self.named_parameters(), _parameters(estimator, task), strict=True):
                own.copy_(theirs.view_as(own)) if own.numel() == theirs.numel() else _differ(name, own, theirs)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, classes]."""
        x = F.conv2d(x, self.stem.weight, None, stem_stride(x.shape[2], x.shape[3], self.base_size), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x), inplace=True).mean((2, 3)))


def _parameters(estimator: Estimator, task: str) -> list[Tensor]:
    parts: list[nn.Module] = [estimator.stem.conv]
    for block in estimator.blocks:
        parts += [block.norm1, block.norm2, block.conv1, block.conv2]
    parts += [estimator.tail.norm, estimator.heads[task]]
    return [parameter for part in parts for parameter in part.parameters()]


def _differ(name: str, own: Tensor, theirs: Tensor) -> None:
    raise ValueError(f"{name} has shape {tuple(own.shape)}, the network's {tuple(theirs.shape)}")


def networks(name: str, backend: str) -> tuple[den.DEN, PlainNetwork]:
    """A DEN in training and its dense twin, with the same weights."""
    torch.manual_seed(0)
    model = den.create_model(name, tasks=TASK, ratios=RATIOS, backend=backend).train()
    return model, PlainNetwork(model.estimator, next(iter(TASK))).train()


def step(network: nn.Module, forward: Callable[[], Tensor], target_N: Tensor) -> Callable[[], Tensor]:
    """A step of SGD as a function of no arguments, which returns the loss."""
    optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4)

    @torch.enable_grad()
    def run() -> Tensor:
        loss = F.cross_entropy(forward(), target_N)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return run
