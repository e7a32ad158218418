"""What happens around a launch on the host: precision, tiles kept, copies of weights, and passes that only compile."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from threading import Thread

import pytest
import torch

from den_kernels.backends import triton as backend

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
CPU = torch.device("cpu")


class FakeKernel:
    """Notes what it is compiled for, and that it is run."""

    def __init__(self):
        self.ran, self.compiled = [], []

    def __getitem__(self, grid):
        return lambda **keywords: self.ran.append((grid, keywords))

    def warmup(self, *, grid, **keywords):
        self.compiled.append((grid, keywords))


def _launch(kernel, **arguments):
    from den_kernels.backends.triton.launch import Launch, Sweep

    return Launch(kernel, 3, arguments, {"RELU": True}, Sweep(16, 32, 4))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_compiling_pass_compiles_what_it_would_launch(asynchronous, monkeypatch):
    import triton

    from den_kernels.backends.triton import launch

    if not asynchronous:
        monkeypatch.delattr(triton, "AsyncCompileMode", raising=False)
    kernel, x = FakeKernel(), torch.zeros(8)
    one = _launch(kernel, x_ptr=x[1:], y_ptr=x[4:], width_ptr=None, channels=1, eps=0.5)
    with launch.compiling(2):
        launch.run(one, CPU)
        backward = Thread(target=launch.run, args=(one, CPU))
        backward.start()
        backward.join()
        assert not kernel.compiled
    assert not kernel.ran
    assert len(kernel.compiled) == 2
    grid, keywords = kernel.compiled[0]
    assert grid == (3,)
    pointers = [keywords.pop(name) for name in ("x_ptr", "y_ptr")]
    assert [pointer.data_ptr() % 16 for pointer in pointers] == [t.data_ptr() % 16 for t in (x[1:], x[4:])]
    assert {pointer.dtype for pointer in pointers} == {torch.float32}
    launch.run(one, CPU)
    ((ran_grid, ran),) = kernel.ran
    assert ran_grid == grid
    assert keywords == {name: value for name, value in ran.items() if not name.endswith(("x_ptr", "y_ptr"))}


def test_a_compiling_pass_that_fails_compiles_nothing_and_ends():
    from den_kernels.backends.triton import launch

    kernel = FakeKernel()

    def fails() -> None:
        with launch.compiling(1):
            launch.run(_launch(kernel), CPU)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert not kernel.compiled
    launch.run(_launch(kernel), CPU)
    assert kernel.ran


def test_compiling_is_not_nested():
    from den_kernels.backends.triton import launch

    with launch.compiling(1), pytest.raises(RuntimeError, match="already active"), launch.compiling(1):
        pass


@pytest.mark.parametrize(
    ("offset", "channels"), [(0, 64), (4, 64), (0, 1), (1, 17)], ids=["aligned", "16 bytes", "one", "odd"]
)
def test_a_stand_in_for_a_tensor_is_specialised_as_the_tensor(offset, channels):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from den_kernels.backends.triton import launch, norm_kernels

    kernel, memory = norm_kernels.moments_kernel, torch.empty(64)
    if not hasattr(kernel, "params"):
        pytest.skip("the kernels run in the interpreter")
    target = make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, target)
    one = _launch(
        kernel,
        x_ptr=memory[offset:],
        width_ptr=None,
        mean_ptr=memory,
        square_ptr=memory,
        pixels=64,
        channels=channels,
        tiles=1,
    )._replace(constants={"GRANULE": 1})
    real, stand_in = (bind(**launch._keywords(each))[1] for each in (one, launch._without_tensors(one)))
    assert real == stand_in


def test_tf32_is_asked_for_by_either_setting_of_torch():
    """In a process of its own: torch does not go back from the new setting to the old one."""
    script = """
import torch
from den_kernels.backends.triton.launch import dot_precision
found = [dot_precision(torch.float32)]
for setting in ("high", "highest"):
    torch.set_float32_matmul_precision(setting)
    found.append(dot_precision(torch.float32))
if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
    for setting in ("tf32", "ieee"):
        torch.backends.cuda.matmul.fp32_precision = setting
        found.append(dot_precision(torch.float32))
print(*found)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() in (["ieee", "tf32", "ieee"], ["ieee", "tf32", "ieee", "tf32", "ieee"])


def test_tiles_are_kept_until_tables_are_read_anew(monkeypatch):
    from den_kernels.backends.triton import configs, tile_tables

    problem = tile_tables.Problem("last", "half", 64, 64, 32, 32, (3, 3), (1, 1), 1, 8)
    facts = configs.Facts("half", 256, 1024, 64, 64, True, False, False, True, 108)
    mine = tile_tables.TileConfig(16, 16, 32, 4, 2)
    configs.reload_tables()
    heuristic = configs.tile(problem, CPU, facts)
    monkeypatch.setattr(tile_tables, "lookup", lambda problem, device: mine)
    assert configs.tile(problem, CPU, facts) == heuristic
    with configs.searching({problem: mine}):
        assert configs.tile(problem, CPU, facts) == mine
    configs.reload_tables()
    assert configs.tile(problem, CPU, facts) == mine
    configs.reload_tables()


@pytest.mark.parametrize("shape", [(8, 4, 1, 1), (8, 4, 3, 3)])
def test_packed_weights_are_copies(shape):
    for weight in (torch.ones(shape), torch.ones(shape).to(memory_format=torch.channels_last)):
        (packed,) = backend.pack_weights(weight, 1, 1, True)
        assert packed.is_contiguous()
        weight.zero_()
        assert bool((packed == 1).all())
