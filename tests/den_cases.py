"""Small networks with lived-in statistics, and the paper's network written out as a loop over samples and slices."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den
from den.blocks import ResidualBlock
from den.estimator import Estimator, EstimatorOptions, PoolTail, Stem
from den.selector import Selector, SelectorSpec

TINY_SELECTOR = {"widths": (4, 8), "blocks_per_stage": 1, "pool": 1}
TWO_TASKS = {"a": 5, "b": 3}


def live_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm random statistics and affine, so that none of them is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.3, generator=generator)
    return model.eval()


def wrn(tasks=None, *, backend: str = "grouped", name: str = "wrn_8_1", **more) -> den.DEN:
    """A pre-activation network of three blocks for 8x8 images."""
    torch.manual_seed(0)
    options = {"selector": TINY_SELECTOR, "base_size": 8, **more}
    return live_in(den.create_model(name, tasks or {"a": 5}, backend=backend, **options))


def resnet(tasks=None, *, backend: str = "grouped", **more) -> den.DEN:
    """A post-activation network: norm in the stem, one (or one a level) behind the contract convolution, none last."""
    torch.manual_seed(0)
    tasks = tasks or {"a": 5}
    hierarchy = den.Hierarchy((0, 0.25, 0.5, 1))
    options = EstimatorOptions(tasks, hierarchy, base_size=8, backend=backend, **more)
    blocks = [
        ResidualBlock(i, o, hierarchy, stride=s, preactivation=False, **options.block_options)
        for i, o, s in ((8, 8, 1), (8, 16, 2), (16, 16, 1))
    ]
    stem = Stem(3, 8, norm=True, num_sets=options.num_sets)
    estimator = Estimator(blocks, PoolTail(16, norm=False), options, stem=stem)
    selector = Selector(3, 4, spec=SelectorSpec((4, 8), 1, 1, 8))
    return live_in(den.DEN(estimator, selector, {"tasks": tasks}))


def conv_net(tasks=None, *, backend: str = "grouped", **more) -> den.DEN:
    """SimpleConvNet for grey 28x28 images: two blocks of two convolutions, two levels."""
    torch.manual_seed(0)
    options = {"selector": TINY_SELECTOR, "image_size": 28, "in_channels": 1, **more}
    return live_in(den.create_model("simple_conv_net", tasks or {"a": 5}, backend=backend, **options))


def all_paths(model: den.DEN) -> Tensor:
    """Every path, one a row: int64 [L ** B, B]."""
    return torch.tensor(list(itertools.product(range(model.num_levels), repeat=model.num_blocks)))


def _norm(x: Tensor, norm: nn.Module, row: int = 0) -> Tensor:
    """Batch norm in evaluation by PyTorch's own function, on the first channels where x has fewer."""
    rows = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (table[row, : x.shape[1]] for table in rows)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)


def sliced_loop(model: den.DEN, x: Tensor, level_NB: Tensor, task: str, ratios=(0, 0.25, 0.5, 1)) -> Tensor:
    """Logits of a residual network by the definition: a loop over samples, weights sliced to the level's width."""
    estimator = model.estimator
    set_index = estimator.set_index[task]
    logits = []
    for image, path in zip(x, level_NB.tolist(), strict=True):
        stride = max(1, min(image.shape[1:]) // estimator.base_size) if estimator.base_size else 1
        h = F.conv2d(image[None], estimator.stem.conv.weight, padding=1, stride=stride)
        if estimator.stem.norm is not None:
            h = _norm(h, estimator.stem.norm, set_index).relu()
        for block, level in zip(estimator.blocks, path, strict=True):
            y = F.avg_pool2d(h, block.stride, ceil_mode=True)
            y = torch.cat([y, y.new_zeros(1, block.out_channels - y.shape[1], *y.shape[2:])], 1)
            width = int(ratios[level] * block.out_channels)
            if width == 0:
                h = y
                continue
            first, second = block.conv1.weight[:width], block.conv2.weight[:, :width]
            if block.preactivation:
                a = F.conv2d(_norm(h, block.norm1, set_index).relu(), first, stride=block.stride, padding=1)
                h = y + F.conv2d(_norm(a, block.norm2, set_index).relu(), second, padding=1)
            else:
                a = _norm(F.conv2d(h, first, stride=block.stride, padding=1), block.norm1, set_index).relu()
                row = set_index * block.norm2.num_levels + (level if block.norm2.num_levels > 1 else 0)
                h = (y + _norm(F.conv2d(a, second, padding=1), block.norm2, row)).relu()
        if estimator.tail.norm is not None:
            h = _norm(h, estimator.tail.norm, set_index).relu()
        logits.append(estimator.heads[task](h.mean((2, 3))))
    return torch.cat(logits)
