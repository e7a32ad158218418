"""What the GPU run times and checks with: the networks of its device tests, its engines, and its training steps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

import den
import den_kernels as dk
from benchmarks import cases, networks, torch_engines, training
from benchmarks.gpu import cudnn_fused, matrix
from benchmarks.gpu import training as gpu_training
from den.dense import dense
from den_kernels.backends import load
from tests.den_cases import MAKERS, bottleneck, conv_net, image_shape, resnet, wrn
from tests.test_gpu_validate import cpu_context

pytest.importorskip("triton")


class OneDevice(TorchFunctionMode):
    """As a GPU: a generator fills tensors of its own device alone."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        generator = (kwargs or {}).get("generator")
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        if generator is not None and any(tensor.device.type != generator.device.type for tensor in tensors):
            raise RuntimeError(f"Expected a {tensors[0].device.type!r} device type for generator")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", MAKERS)
def test_the_device_tests_networks_are_made_where_tensors_are_made(make):
    with torch.device("meta"), OneDevice():
        assert {parameter.device.type for parameter in make().parameters()} == {"meta"}


@pytest.mark.skipif(load("cpu").unavailable() is not None, reason="no C++ extension")
@pytest.mark.parametrize("case", cases.MODELS, ids=lambda case: case.name)
def test_every_model_of_the_benchmarks_can_be_frozen_for_them(case):
    fast = torch_engines._frozen.__wrapped__(case.name, torch.float32, "cpu", ())
    assert isinstance(fast, den.FrozenDEN)
    fused = [m for m in fast.modules() if isinstance(m, (dk.FusedResidualBlock, dk.FusedConv2d))]
    fused[-1].backend = "grouped"
    with pytest.raises(RuntimeError, match="asked for backend 'cpu', but the blocks run on"):
        torch_engines.check_backend(fast, "cpu")


def _convolution_relu(x, weight, bias, stride, padding, dilation, groups):
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups))


def _convolution_add_relu(x, weight, z, alpha, bias, stride, padding, dilation, groups):
    return F.relu(F.conv2d(x, weight, bias, stride, padding, dilation, groups) + alpha * z)


@pytest.mark.parametrize("make", [wrn, resnet, bottleneck])
def test_the_network_of_cudnns_fused_convolutions_is_the_dense_one(make, monkeypatch):
    """With what cuDNN's operators are documented to compute in their place."""
    monkeypatch.setattr(torch, "cudnn_convolution_relu", _convolution_relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", _convolution_add_relu)
    model = make()
    x = torch.randn(2, *image_shape(make))
    with torch.no_grad():
        torch.testing.assert_close(cudnn_fused.fuse(dense(model))(x), dense(model)(x))
    with pytest.raises(matrix.Unusable, match="residual blocks"):
        cudnn_fused.fuse(dense(conv_net()))


@pytest.mark.parametrize("captures", [True, False])
def test_a_compiled_network_is_timed_in_our_graph_or_else_in_its_own(tmp_path, monkeypatch, captures):
    modes = []

    def on_device(name, run, told, *, dense, graph=True):
        if graph and not captures:
            raise RuntimeError("this cannot be captured")
        return graph

    monkeypatch.setattr(matrix, "_compiled", lambda *told: modes.append(told[-1]) or torch.nn.Identity())
    monkeypatch.setattr(matrix, "OnDevice", on_device)
    case = matrix.Case(cases.ModelCase(networks.SMALLEST, 8, (1,)), 1, cases.TOP1, "compiled")
    bench = matrix.Bench(case, cpu_context(tmp_path, dry=False))
    assert bench.compiled() is captures
    assert modes == ["max-autotune-no-cudagraphs"] + ["max-autotune"] * (not captures)
    assert ("torch.compile max-autotune" in bench.notes) is not captures


@pytest.mark.parametrize(("name", "size", "passes"), [(networks.SMALLEST, 8, 1), ("vgg_16", 32, 0)])
def test_kernels_are_compiled_by_a_pass_that_reads_nothing_undefined(tmp_path, monkeypatch, name, size, passes):
    """A fused convolution looks widths up by the plan's levels, which such a pass does not make."""
    ran = []
    monkeypatch.setattr(matrix, "_frozen", lambda name, *told: den.freeze(networks.network(name), backend="grouped"))
    monkeypatch.setattr(matrix, "compile_kernels", lambda work: ran.append(work()))
    ratios = cases.RATIOS_OF.get(name, cases.RATIOS)
    case = matrix.Case(cases.ModelCase(name, size, (1,), ratios), 1, cases.FULL, "matrix")
    matrix.Bench(case, cpu_context(tmp_path)).compile_kernels()
    assert len(ran) == passes


def test_gradients_are_checked_once_against_exact_convolutions(monkeypatch):
    """TF32, cuDNN's default, is off by more than the kernels are allowed to be."""
    allowed = []

    class Step:
        network = torch.nn.Linear(1, 1)

        def gradients(self):
            allowed.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
            return [torch.ones(1), torch.zeros(1)]

    monkeypatch.setattr(training, "elastic_step", lambda *told: Step())
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    case = cases.ModelCase(networks.SMALLEST, 8, (1,))
    gpu_training._worst_gradient.cache_clear()
    for _ in range(3):
        assert gpu_training._worst_gradient(case, 2, "uniform", torch.device("cpu")) is None
    assert allowed[1:] == [(False, False)] * 2  # the first is the pass that only compiles
    assert (torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark) == (True, True)
    gpu_training._worst_gradient.cache_clear()


def test_both_networks_of_a_training_step_are_channels_last():
    x = torch.randn(2, 3, 8, 8)
    level_NB = torch.ones(2, 3, dtype=torch.int64)
    for step in (
        training.elastic_step("wrn_8_1", x, level_NB, "grouped"),
        training.dense_step("wrn_8_1", x, "grouped"),
    ):
        maps = [p for p in step.network.parameters() if p.dim() == 4]
        assert maps
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in maps)
