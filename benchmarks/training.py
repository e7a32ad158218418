"""A training step of the network under test and of the same network dense, in plain PyTorch, from one set of weights.

N samples, B blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import den
from benchmarks.cases import RATIOS, RATIOS_OF, TASK
from den.blocks import ResidualBlock, shortcut
from den.estimator import Estimator, stem_stride

LEARNING_RATE = 0.01


class PlainBlock(nn.Module):
    """A pre-activation residual block of full width as one would write it."""

    def __init__(self, block: ResidualBlock):
        super().__init__()
        self.stride, self.out_channels = block.stride, block.out_channels
        self.conv1 = nn.Conv2d(block.in_channels, block.out_channels, 3, block.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(block.out_channels, block.out_channels, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(block.in_channels), nn.BatchNorm2d(block.out_channels)

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
        self.blocks = nn.ModuleList(PlainBlock(cast(ResidualBlock, block)) for block in estimator.blocks)
        self.norm = nn.BatchNorm2d(estimator.tail.out_features)
        head = cast(nn.Linear, estimator.heads[task])
        self.head = nn.Linear(head.in_features, head.out_features)
        with torch.no_grad():
            # Both list their parameters in one order; a norm's have a row for each set of statistics there, here none.
            for own, theirs in zip(self.parameters(), estimator.parameters(), strict=True):
                own.copy_(theirs.view_as(own))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] -> logits [N, classes]."""
        x = F.conv2d(x, self.stem.weight, None, stem_stride(x.shape[2], x.shape[3], self.base_size), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.norm(x), inplace=True).mean((2, 3)))


class Step:
    """A step of SGD with momentum and weight decay: forward, backward, update. The updates add up from call to call."""

    def __init__(self, network: nn.Module, forward: Callable[[], Tensor], target_N: Tensor):
        self.network, self.forward, self.target_N = network, forward, target_N
        self.optimizer = torch.optim.SGD(network.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def gradients(self) -> list[Tensor]:
        """Of every parameter, as a vector, without an update."""
        return [g.flatten() for g in torch.autograd.grad(self._loss(), list(self.network.parameters()))]

    @torch.inference_mode(False)
    @torch.enable_grad()
    def __call__(self) -> Tensor:
        """The loss."""
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _loss(self) -> Tensor:
        return F.cross_entropy(self.forward(), self.target_N)


def targets(batch: int) -> Tensor:
    """Random classes [N] of the one task."""
    return torch.randint(0, next(iter(TASK.values())), (batch,), generator=torch.Generator().manual_seed(2))


def elastic_step(name: str, x: Tensor, level_NB: Tensor, backend: str, dtype: torch.dtype = torch.float32) -> Step:
    """The DEN at given levels, channels_last, every convolution and norm on the given backend, where x is."""
    estimator = _model(name, backend).to(x.device, dtype).estimator
    estimator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = x.to(dtype)
    return Step(estimator, lambda: estimator(x, level_NB, next(iter(TASK))), targets(len(x)).to(x.device))


def dense_step(name: str, x: Tensor, backend: str) -> Step:
    """The plain network, from the same weights, where x is."""
    network = PlainNetwork(_model(name, backend).estimator, next(iter(TASK))).to(x.device).train()
    return Step(network, lambda: network(x), targets(len(x)).to(x.device))


def _model(name: str, backend: str) -> den.DEN:
    torch.manual_seed(0)
    return den.create_model(name, tasks=TASK, ratios=RATIOS_OF.get(name, RATIOS), backend=backend).train()
