"""Small networks with lived-in statistics, and the paper's network written out as a loop over samples and slices."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import den
from den.blocks import BottleneckBlock, ConvPairBlock, LinearPairBlock, ResidualBlock
from den.estimator import Estimator, EstimatorOptions, PoolTail, Stem
from den.selector import Selector, SelectorSpec

TINY_SELECTOR = {"widths": (4, 8), "blocks_per_stage": 1, "pool": 1}
TWO_TASKS = {"a": 5, "b": 3}


def live_in(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm random statistics and affine, so that none of them is the identity.

    Drawn on the CPU and copied to wherever the model is: a CPU's generator draws nowhere else.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def memory(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, device="cpu")

    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_mean", None), Tensor):
                mean, var, weight, bias = module.running_mean, module.running_var, module.weight, module.bias
                mean.copy_(memory(mean).normal_(0, 0.3, generator=generator))
                var.copy_(memory(var).uniform_(0.5, 2, generator=generator))
                weight.copy_(memory(weight).uniform_(0.5, 1.5, generator=generator))
                bias.copy_(memory(bias).normal_(0, 0.3, generator=generator))
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


def resnext(tasks=None, *, backend: str = "grouped", **more) -> den.DEN:
    """A block of four paths in each of three stages, for 8x8 images."""
    torch.manual_seed(0)
    options = {"ratios": (0, 0.25, 0.5, 1), "selector": TINY_SELECTOR, "base_size": 8, **more}
    return live_in(den.create_model("resnext_11_4x16d", tasks or {"a": 5}, backend=backend, **options))


def bottleneck(tasks=None, *, backend: str = "grouped", **more) -> den.DEN:
    """As ResNet-50, for 24x24 images: 7x7 stem and max pool, two blocks with projections, the second strided, one
    without."""
    torch.manual_seed(0)
    tasks = tasks or {"a": 5}
    hierarchy = den.Hierarchy((0, 0.25, 0.5, 1))
    options = EstimatorOptions(tasks, hierarchy, base_size=24, backend=backend, **more)
    blocks = [
        BottleneckBlock(i, h, o, hierarchy, stride=s, projection=p, **options.block_options)
        for i, h, o, s, p in ((16, 64, 32, 1, True), (32, 64, 48, 2, True), (48, 64, 48, 1, False))
    ]
    stem = Stem(3, 16, norm=True, num_sets=options.num_sets, kernel_size=7, stride=2, pool=True)
    estimator = Estimator(blocks, PoolTail(48, norm=False), options, stem=stem)
    selector = Selector(3, 4, spec=SelectorSpec((4, 8), 1, 1, 8))
    return live_in(den.DEN(estimator, selector, {"tasks": tasks}))


def vgg(tasks=None, *, backend: str = "grouped", **more) -> den.DEN:
    """As VGG, for 8x8 images: two pairs of convolutions with pools, two fully connected layers; three levels."""
    torch.manual_seed(0)
    tasks = tasks or {"a": 5}
    hierarchy = den.Hierarchy((0.25, 0.5, 1))
    options = EstimatorOptions(tasks, hierarchy, base_size=8, backend=backend, **more)
    blocks = [
        ConvPairBlock(3, 8, 8, hierarchy, pools=(False, True), **options.block_options),
        ConvPairBlock(8, 16, 16, hierarchy, pools=(True, False), **options.block_options),
        LinearPairBlock(16, (2, 2), 64, 32, hierarchy, backend=backend),
    ]
    estimator = Estimator(blocks, PoolTail(32, norm=False), options)
    selector = Selector(3, 3, spec=SelectorSpec((4, 8), 1, 1, 8))
    return live_in(den.DEN(estimator, selector, {"tasks": tasks}))


RESIDUAL = (wrn, resnet, resnext, bottleneck)
MAKERS = (*RESIDUAL, conv_net, vgg)


def image_shape(make, size: int | None = None) -> tuple[int, int, int]:
    """Channels, height and width that a network of `MAKERS` takes; size: another, where it takes several."""
    channels, default = {conv_net: (1, 28), bottleneck: (3, 24)}.get(make, (3, 8))
    return channels, size or default, size or default


def unused_weights(block: nn.Module, width: int) -> list[Tensor]:
    """Views of the weights that a block does not run at this width."""
    if isinstance(block, LinearPairBlock):
        return [block.linear1.weight[width:], block.linear1.bias[width:], block.linear2.weight[:, width:]]
    if isinstance(block, BottleneckBlock):
        inner = [block.conv2.weight[:, width:]] if block.groups == 1 else []
        return [block.conv1.weight[width:], block.conv2.weight[width:], *inner, block.conv3.weight[:, width:]]
    return [block.conv1.weight[width:], block.conv2.weight[:, width:]]


@torch.no_grad()
def vary_paths(model: den.DEN, x: Tensor) -> den.DEN:
    """Shift a selector's logits so that images like these take several paths; a fresh one sends most along one."""
    logits_NBL = model.selector(x)
    model.selector.head.bias -= logits_NBL.mean(0).flatten()
    return model


def all_paths(model: den.DEN) -> Tensor:
    """Every path, one a row: int64 [L ** B, B]."""
    return torch.tensor(list(itertools.product(range(model.num_levels), repeat=model.num_blocks)))


def _norm(x: Tensor, norm: nn.Module, row: int = 0) -> Tensor:
    """Batch norm in evaluation by PyTorch's own function, on the first channels where x has fewer."""
    rows = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    mean, var, weight, bias = (table[row, : x.shape[1]] for table in rows)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)


def _convolve(x: Tensor, weight: Tensor, norm: nn.Module, row: int, **geometry) -> Tensor:
    return _norm(F.conv2d(x, weight, padding=weight.shape[2] // 2, **geometry), norm, row)


def _sliced_block(block: nn.Module, h: Tensor, level: int, width: int, set_index: int) -> Tensor:
    """A residual block at one level, over weights sliced to its width."""
    if getattr(block, "projection", None) is None:
        y = F.avg_pool2d(h, block.stride, ceil_mode=True)
        y = torch.cat([y, y.new_zeros(1, block.out_channels - y.shape[1], *y.shape[2:])], 1)
    else:
        projection = block.projection
        y = _convolve(h, projection.conv.weight, projection.norm, set_index, stride=block.stride)
    if width == 0:
        return y
    if isinstance(block, ResidualBlock) and block.preactivation:
        a = _convolve(
            _norm(h, block.norm1, set_index).relu(),
            block.conv1.weight[:width],
            block.norm2,
            set_index,
            stride=block.stride,
        )
        return y + F.conv2d(a.relu(), block.conv2.weight[:, :width], padding=1)
    last = block.norm2 if isinstance(block, ResidualBlock) else block.norm3
    row = set_index * last.num_levels + (level if last.num_levels > 1 else 0)
    if isinstance(block, ResidualBlock):
        a = _convolve(h, block.conv1.weight[:width], block.norm1, set_index, stride=block.stride).relu()
        return (y + _convolve(a, block.conv2.weight[:, :width], last, row)).relu()
    a = _convolve(h, block.conv1.weight[:width], block.norm1, set_index).relu()
    paths = block.groups * width // block.conv2.in_channels if block.groups > 1 else 1
    inner = block.conv2.weight[:width, : width // paths]
    a = _convolve(a, inner, block.norm2, set_index, stride=block.stride, groups=paths).relu()
    return (y + _convolve(a, block.conv3.weight[:, :width], last, row)).relu()


def sliced_loop(model: den.DEN, x: Tensor, level_NB: Tensor, task: str, ratios=(0, 0.25, 0.5, 1)) -> Tensor:
    """Logits of a residual network by the definition: a loop over samples, weights sliced to the level's width."""
    estimator = model.estimator
    set_index = estimator.set_index[task]
    stem = estimator.stem
    logits = []
    for image, path in zip(x, level_NB.tolist(), strict=True):
        stride = max(1, min(image.shape[1:]) // estimator.base_size) if estimator.base_size else 1
        size = stem.conv.weight.shape[2]
        h = F.conv2d(image[None], stem.conv.weight, padding=size // 2, stride=stride * (2 if size == 7 else 1))
        if stem.norm is not None:
            h = _norm(h, stem.norm, set_index).relu()
        if size == 7:
            h = F.max_pool2d(h, 3, 2, 1)
        for block, level in zip(estimator.blocks, path, strict=True):
            width = int(ratios[level] * block.conv1.out_channels)
            h = _sliced_block(block, h, level, width, set_index)
        if estimator.tail.norm is not None:
            h = _norm(h, estimator.tail.norm, set_index).relu()
        logits.append(estimator.heads[task](h.mean((2, 3))))
    return torch.cat(logits)
