"""The operators as PyTorch sees them: opcheck, compile, export, autocast, FLOP formula, messages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import den_kernels as dk
from den_kernels.block import BlockArguments
from den_kernels.chain import flatten
from den_kernels.plan import plan_levels

OPS = torch.ops.den_kernels
CPU_BACKENDS = [name for name in dk.available_backends() if name != "triton"]


def conv_args(backend: str, requires_grad: bool = True) -> tuple:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 7, 6, generator=g).requires_grad_(requires_grad)
    weight = torch.randn(12, 8, 3, 3, generator=g).requires_grad_(requires_grad)
    bias = torch.randn(12, generator=g).requires_grad_(requires_grad)
    widths = torch.tensor([8, 4, 0, 2]), torch.tensor([12, 6, 3, 0])
    return x, weight, bias, *widths, (2, 2), (1, 1), (1, 1), 1, backend


def block_args(backend: str) -> tuple:
    g = torch.Generator().manual_seed(0)
    level = torch.tensor([3, 0, 1, 2], dtype=torch.int32)
    _, order, count = OPS.plan(level.view(-1, 1), 4)
    x = torch.randn(4, 16, 8, 8, generator=g).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(16, 16, 3, 3, generator=g) / 12 for _ in range(2)]
    tables = [torch.rand(1, 4, 16, generator=g) for _ in range(4)]
    block = dk.FusedResidualBlock(weights, tables[:2], tables[2:], (0, 4, 8, 16), strides=(1, 1), backend=backend)
    return x, level, order[0], count[0], *block.arguments(), backend


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_conv2d(backend: str) -> None:
    torch.library.opcheck(OPS.conv2d.default, conv_args(backend))
    torch.library.opcheck(OPS.conv2d.default, (*conv_args(backend)[:2], None, *conv_args(backend)[3:]))


# The reference differentiates by autograd, which the schema check's dispatch mode switches off.
@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "reference"])
def test_opcheck_conv2d_backward(backend: str) -> None:
    x, weight, bias, *rest = conv_args(backend, requires_grad=False)
    grad = torch.randn_like(OPS.conv2d(x, weight, bias, *rest))
    for mask in ([True, True, True], [True, False, False], [False, True, False]):
        torch.library.opcheck(OPS.conv2d_backward.default, (grad, x, weight, *rest[:-1], mask, backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_conv2d_add(backend: str) -> None:
    x, weight, _, in_width, _, *rest = conv_args(backend)
    residual = torch.randn(4, 12, 4, 3).requires_grad_()
    torch.library.opcheck(OPS.conv2d_add.default, (x, weight, residual, in_width, *rest))
    torch.library.opcheck(OPS.conv2d_add.default, (x, weight, residual, None, *rest))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_batch_norm(backend: str, layout: torch.memory_format) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 5, 6, generator=g).contiguous(memory_format=layout).requires_grad_()
    weight, bias = (torch.randn(2, 8, generator=g).requires_grad_() for _ in range(2))
    row, width = torch.tensor([0, 1, 1, 0]), torch.tensor([8, 3, 0, 5])
    for options in ((row, width, weight, bias, 2), (None, None, None, None, 1), (None, width, weight[:1], bias[:1], 1)):
        torch.library.opcheck(OPS.batch_norm.default, (x, *options, 1e-5, True, backend))
    tables = OPS.batch_norm(x, row, width, weight, bias, 2, 1e-5, True, backend)[1:]
    detached = (t.detach() for t in (torch.randn_like(x), x))
    arguments = (*detached, row, width, weight.detach(), bias.detach(), *tables, 1e-5, True, backend)
    torch.library.opcheck(OPS.batch_norm_backward.default, arguments)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_residual_block(backend: str) -> None:
    torch.library.opcheck(OPS.residual_block.default, block_args(backend))
    torch.library.opcheck(OPS.residual_block_.default, block_args(backend))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_opcheck_residual_chain(backend: str) -> None:
    x, level, order, count, *block, backend = block_args(backend)
    plan = (torch.stack([rows, rows]) for rows in (level, order, count))
    torch.library.opcheck(OPS.residual_chain.default, (x, *plan, *flatten([BlockArguments(*block)] * 2), backend))


def test_opcheck_plan() -> None:
    torch.library.opcheck(OPS.plan.default, (torch.randint(0, 4, (5, 3)), 4))


def test_plan_orders_by_descending_level() -> None:
    level = torch.tensor([[1, 0], [3, 2], [0, 2], [3, 1], [2, 0]])
    plan = dk.plan_levels(level, 4)
    assert plan.level_BN.tolist() == [[1, 3, 0, 3, 2], [0, 2, 2, 1, 0]]
    assert plan.order_BN.tolist() == [[1, 3, 4, 0, 2], [1, 2, 3, 0, 4]]
    assert plan.count_BL.tolist() == [[5, 4, 3, 2], [5, 3, 2, 0]]
    assert {t.dtype for t in plan} == {torch.int32}


def test_plan_is_the_same_in_plain_pytorch() -> None:
    for n, blocks, levels in ((1, 1, 1), (9, 4, 3), (64, 15, 4)):
        level = torch.randint(levels, (n, blocks))
        for ours, plain in zip(dk.plan_levels(level, levels), plan_levels(level, levels), strict=True):
            assert torch.equal(ours, plain)


@pytest.mark.skipif("cpu" not in CPU_BACKENDS, reason="the C++ kernels check the values")
@pytest.mark.parametrize("value", [-1, 4])
def test_plan_names_a_level_out_of_range(value) -> None:
    level = torch.zeros(3, 2, dtype=torch.int64)
    level[1, 1] = value
    with pytest.raises(ValueError, match=rf"level\[1, 1\] is {value}; it must be between 0 and 3"):
        dk.plan_levels(level, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = dk.DENConv2d(3, 8, 3, padding=1, out_widths=(2, 4, 8))
        self.norm = dk.DENBatchNorm2d(8, num_levels=3)
        self.contract = dk.DENConv2d(8, 5, 3, padding="same", in_widths=(2, 4, 8))
        self.again = dk.DENConv2d(5, 5, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        width = self.expand.out_widths[level]
        h = self.norm(self.expand(x, level), level, width, relu=True)
        h = self.contract(h, level)
        return self.again.forward_widths(h, width.clamp(max=5), None, residual=h).mean((2, 3))


@pytest.mark.slow
def test_compile_fullgraph_follows_the_levels() -> None:
    net, x = Net(), torch.randn(6, 3, 9, 9)
    compiled = torch.compile(net, fullgraph=True)
    for level in (torch.tensor([0, 1, 2, 0, 1, 2]), torch.tensor([2, 2, 2, 0, 0, 1])):
        net.zero_grad()
        expected = net(x, level)
        expected.square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
        net.zero_grad()
        y = compiled(x, level)
        y.square().sum().backward()
        torch.testing.assert_close(y, expected)
        for name, p in net.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], msg=lambda m, name=name: f"{name}: {m}")


def test_export_keeps_the_operator() -> None:
    net, x = Net().eval(), torch.randn(6, 3, 9, 9)
    level = torch.tensor([0, 1, 2, 0, 1, 2])
    program = torch.export.export(net, (x, level))
    assert any(node.target is OPS.conv2d.default for node in program.graph.nodes)
    other = torch.tensor([2, 0, 1, 1, 0, 2])
    torch.testing.assert_close(program.module()(x, other), net(x, other))


def test_autocast_casts_like_conv2d() -> None:
    conv = dk.DENConv2d(8, 8, 3, padding=1, out_widths=(4, 8))
    x, level = torch.randn(4, 8, 6, 6), torch.tensor([0, 1, 1, 0])
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x, level)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), conv(x, level), atol=0.1, rtol=0.1)


def test_flop_formula_counts_active_channels() -> None:
    x, weight, bias, in_width, out_width, *rest = conv_args("grouped")
    pixels = 4 * 3
    active = int((in_width * out_width).sum())
    with FlopCounterMode(display=False) as counter:
        y = OPS.conv2d(x, weight, bias, in_width, out_width, *rest)
    assert counter.get_total_flops() == 2 * 9 * pixels * active
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * pixels * active


def test_flop_formula_of_the_convolution_on_a_residual() -> None:
    x, weight, _, in_width, _, *rest = conv_args("grouped")
    residual = torch.randn(4, 12, 4, 3)
    with FlopCounterMode(display=False) as counter:
        y = OPS.conv2d_add(x, weight, residual, in_width, *rest)
    assert counter.get_total_flops() == 2 * 9 * 12 * 12 * int(in_width.sum())
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 9 * 12 * 12 * int(in_width.sum())


def test_flop_formula_of_the_block() -> None:
    args = block_args("grouped")
    with FlopCounterMode(display=False) as counter:
        OPS.residual_block(*args)
    assert counter.get_total_flops() == 2 * sum(2 * 9 * 64 * 16 * width for width in (16, 0, 4, 8))


X, W = torch.zeros(2, 8, 5, 5), torch.zeros(6, 8, 3, 3)
BAD = [
    (TypeError, "x is list", ([], W), {}),
    (TypeError, "x has dtype torch.int64", (X.long(), W), {}),
    (ValueError, "weight has shape", (X, W[0]), {}),
    (ValueError, "takes 4 input channels, but x has 8", (X, W[:, :4]), {}),
    (TypeError, "weight has dtype torch.float64", (X, W.double()), {}),
    (ValueError, "bias has shape", (X, W, torch.zeros(5)), {}),
    (ValueError, "weight is on meta", (X, W.to("meta")), {}),
    (ValueError, "in_width has shape", (X, W, None, torch.zeros(3, dtype=torch.int64)), {}),
    (TypeError, "in_width has dtype torch.float32", (X, W, None, torch.zeros(2)), {}),
    (TypeError, "in_width has dtype torch.int8", (X, W, None, torch.zeros(2, dtype=torch.int8)), {}),
    (ValueError, "stride is 0", (X, W), {"stride": 0}),
    (ValueError, "padding is", (X, W), {"padding": (1, -1)}),
    (ValueError, "groups is 3", (X, W), {"groups": 3}),
    (ValueError, "too small for a kernel", (X[:, :, :2], W), {}),
    (ValueError, "backend is 'cuda'", (X, W), {"backend": "cuda"}),
    (ValueError, "residual has shape", (X, W), {"residual": torch.zeros(2, 6, 5, 5)}),
    (ValueError, "residual is given with bias", (X, W, W[0, 0, 0].new_zeros(6)), {"residual": torch.zeros(2, 6, 3, 3)}),
    (TypeError, "residual is list", (X, W), {"residual": []}),
    (ValueError, "residual is on meta", (X, W), {"residual": torch.zeros(2, 6, 3, 3, device="meta")}),
]


@pytest.mark.parametrize(("error", "message", "args", "kwargs"), BAD, ids=[message for _, message, _, _ in BAD])
def test_bad_arguments_are_named(error, message, args, kwargs) -> None:
    with pytest.raises(error, match=message):
        dk.den_conv2d(*args, **kwargs)


@pytest.mark.parametrize("backend", [name for name in CPU_BACKENDS if name != "reference"])
@pytest.mark.parametrize("widths", [(9, 2), (-1, 2)])
def test_widths_out_of_range_are_named(backend: str, widths: tuple) -> None:
    with pytest.raises(ValueError, match=rf"in_width\[0\] is {widths[0]}.*between 0 and"):
        dk.den_conv2d(X, W, None, torch.tensor(widths), backend=backend)
    with pytest.raises(ValueError, match=r"multiple of 4"):
        dk.den_conv2d(X, W[:, :4], None, torch.tensor([4, 6]), groups=2, backend=backend)
