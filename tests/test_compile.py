"""Layers, fused blocks and frozen models under torch.compile, torch.export and FlopCounterMode, level by level.

The operators are opaque: one graph, one compilation, whatever the levels. N samples, B blocks, L levels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from den_cases import bottleneck, image_shape, resnet, resnext, vary_paths, wrn
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

import den
import den_kernels as dk

OPS = torch.ops.den_kernels
LEVELS = ([0, 1, 2, 3], [3, 3, 3, 3], [0, 0, 0, 0], [2, 0, 3, 1])
FROZEN = (wrn, resnet, resnext, bottleneck)


class Layers(nn.Module):
    """Expand and contract convolutions on a residual, as a block of a model in training has them."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = dk.DENConv2d(6, 8, 3, padding=1, out_widths=(0, 2, 4, 8), backend="grouped")
        self.norm = dk.DENBatchNorm2d(8, backend="grouped")
        self.contract = dk.DENConv2d(8, 6, 3, padding=1, bias=False, in_widths=(0, 2, 4, 8), backend="grouped")

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        width = self.expand.out_widths.index_select(0, level)
        h = self.norm(self.expand(x, level), width=width, relu=True)
        return self.contract.forward_widths(h, width, None, residual=x)


class Fused(nn.Module):
    """Two fused blocks with a plan of their own: one by itself, and both as a chain."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            dk.FusedResidualBlock(
                [torch.randn(8, 6, 3, 3) / 7, torch.randn(6, 8, 3, 3) / 8],
                [torch.rand(1, 4, 8), torch.rand(1, 4, 6)],
                [torch.randn(1, 4, 8), torch.randn(1, 4, 6)],
                (0, 2, 4, 8),
                strides=(1, 1),
                backend="grouped",
            )
            for _ in range(2)
        )
        self.chain = dk.FusedChain(list(self.blocks))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        plan = dk.plan_levels(torch.stack([level, level.flip(0)], 1), 4)
        x = x.contiguous(memory_format=torch.channels_last)
        return self.chain(self.blocks[0](x, *plan.block(0)), plan)


class Frozen(nn.Module):
    """A frozen model at the same level in all blocks of a sample."""

    def __init__(self, make: Callable[..., den.DEN]) -> None:
        super().__init__()
        self.model = den.freeze(make(backend="grouped"), backend="grouped")

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        return self.model(x, level=level[:, None].expand(-1, self.model.num_blocks)).logits


def subject(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name in ("layers", "fused"):
        return (Layers().eval() if name == "layers" else Fused()), torch.randn(4, 6, 7, 5)
    make = {make.__name__: make for make in FROZEN}[name]
    return Frozen(make), torch.randn(4, *image_shape(make))


SUBJECTS = pytest.mark.parametrize("name", ["layers", "fused", *(make.__name__ for make in FROZEN)])


@SUBJECTS
def test_levels_change_without_a_graph_break_or_a_compilation(name):
    torch.compiler.reset()
    counters.clear()
    module, x = subject(name)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for levels in LEVELS:
            level = torch.tensor(levels)
            torch.testing.assert_close(compiled(x, level), module(x, level))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_training_step_is_compiled_once():
    torch.compiler.reset()
    counters.clear()
    module, x = subject("layers")
    module.train()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        for levels in LEVELS:
            level = torch.tensor(levels)
            gradients = []
            for form in (module, compiled):
                module.zero_grad()
                form(x, level).square().sum().backward()
                gradients.append([p.grad.clone() for p in module.parameters()])
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_frozen_selector_decides_in_the_compiled_graph():
    torch.compiler.reset()
    model = vary_paths(wrn(backend="grouped"), torch.randn(16, 3, 8, 8))
    frozen = den.freeze(model, backend="grouped")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(frozen, fullgraph=True, backend="aot_eager")
        paths = set()
        for seed in range(4):
            x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            ours, theirs = compiled(x, "a"), frozen(x, "a")
            assert torch.equal(ours.level, theirs.level)
            torch.testing.assert_close(ours.logits, theirs.logits)
            paths |= {tuple(path) for path in ours.level.tolist()}
    assert len(paths) > 1, "the images took one path: nothing was shown"


@SUBJECTS
def test_an_exported_program_follows_the_levels(name):
    module, x = subject(name)
    program = torch.export.export(module, (x, torch.tensor(LEVELS[0])))
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    targets = {str(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    wanted = {"layers": "conv2d", "fused": "residual_block"}.get(name, "residual_chain")
    assert f"den_kernels.{wanted}.default" in targets
    for levels in LEVELS[1:]:
        level = torch.tensor(levels)
        torch.testing.assert_close(program.module()(x, level), module(x, level).detach())


def counted(call: Callable[[], object]) -> dict[str, int]:
    """FLOPs by operator."""
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op).split(".")[-1]: count for op, count in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("make", FROZEN)
def test_flops_of_a_frozen_model_are_what_the_paper_counts(make):
    model = make(backend="grouped")
    frozen = den.freeze(model, backend="grouped")
    shape = image_shape(make)
    level = torch.tensor([[0, 1, 2], [3, 3, 3], [0, 0, 0], [2, 0, 3]])
    head = 2 * len(level) * frozen.heads["a"].weight.numel()
    found = counted(lambda: frozen(torch.randn(4, *shape), "a", level))
    assert sum(found.values()) == int(den.flops(model, level, shape[1]).sum()) + head
    top = counted(lambda: frozen(torch.randn(4, *shape), "a", [3, 3, 3]))
    assert top["residual_chain"] > found["residual_chain"] > 0
    # With the selector in front: its convolutions, as it is one more network of fused blocks.
    chosen = counted(lambda: frozen(torch.randn(4, *shape), "a"))
    level = frozen(torch.randn(4, *shape), "a").level
    assert sum(chosen.values()) >= int(den.flops(model, torch.zeros_like(level), shape[1]).sum())


@pytest.mark.parametrize("groups", [1, 2])
def test_flops_forward_and_backward_of_the_convolution(groups):
    """Forward once, backward twice (data and weight), of the active pairs of channels; once where x asks for none."""
    x = torch.randn(3, 8, 6, 5, requires_grad=True)
    weight = torch.randn(12, 8 // groups, 3, 3, requires_grad=True)
    in_width, out_width = torch.tensor([8, 4, 0]), torch.tensor([6, 12, 12])
    # Of two groups the first sample runs both inputs and the first output's, the second the first input's of either.
    pairs = {1: 8 * 6 + 4 * 12, 2: 4 * 6 + 4 * 6}[groups]
    once = 2 * 9 * (3 * 3) * pairs

    def forward() -> Tensor:
        return dk.den_conv2d(
            x, weight, None, in_width, out_width, stride=2, padding=1, groups=groups, backend="grouped"
        )  # fmt: skip

    assert counted(forward) == {"conv2d": once}
    y = forward()
    assert counted(lambda: y.sum().backward()) == {"conv2d_backward": 2 * once}
    y = dk.den_conv2d(
        x.detach(), weight, None, in_width, out_width, stride=2, padding=1, groups=groups, backend="grouped"
    )  # fmt: skip
    assert counted(lambda: y.sum().backward()) == {"conv2d_backward": once}


def test_flops_of_a_training_step_follow_the_levels():
    """Forward and backward of both convolutions; a batch norm multiplies no matrices and counts nothing."""
    module, x = subject("layers")
    module.train()
    x.requires_grad_()
    for levels in LEVELS:
        level = torch.tensor(levels)
        width = module.expand.out_widths[level].sum().item()
        each = 2 * 9 * 7 * 5 * 6 * width
        found = counted(lambda level=level: module(x, level).sum().backward())
        assert found.get("conv2d", 0) == found.get("conv2d_add", 0) == each
        assert found.get("conv2d_backward", 0) == 4 * each
        assert set(found) <= {"conv2d", "conv2d_add", "conv2d_backward"}


def test_flops_of_a_block_with_a_projection():
    block = bottleneck(backend="grouped").estimator.blocks[1]  # 32 to 64 hidden to 48 channels, stride 2
    frozen = den.blocks.freeze_block(block, den.blocks.FreezeOptions(torch.float32, True, "grouped"))
    x = torch.randn(2, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    plan = dk.plan_levels(torch.tensor([[2], [0]]), 4).block(0)
    convs = 36 * 32 * 32 + 9 * (9 * 32 * 32 + 32 * 48)
    assert counted(lambda: frozen(x, *plan)) == {"residual_block": 2 * (convs + 2 * 9 * 32 * 48)}
