"""The steps of the GPU kernels' loops, counted in their machine code: no GPU is needed."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from den_kernels.backends.triton import machine_code, offline

CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDS R2, [R1] ;
.L_x_0:
        /*0020*/              @!P0 HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/               @P2 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_9) ;
.L_x_9:
        /*0060*/                   EXIT ;
"""


def test_loops_are_what_branches_go_back_over():
    assert [len(body) for body in machine_code.loops(CODE)] == [2, 4]


def test_the_shortest_loop_that_multiplies_counts(monkeypatch):
    monkeypatch.setattr(machine_code, "disassemble", lambda cubin: CODE)
    assert machine_code.multiplying_step(b"", 90, 128 * 64 * 64, 8) == (2, 4.0, 256.0)
    monkeypatch.setattr(machine_code, "disassemble", lambda cubin: CODE.replace("HMMA", "FFMA"))
    assert machine_code.multiplying_step(b"", 90, 128 * 64 * 64, 8) is None


@pytest.mark.parametrize(("channels", "size"), [(64, 32), (128, 16), (256, 8)])
def test_steps_multiply_longer_than_they_issue(channels, size):
    """WRN-32-4 on Hopper: no more instructions than fit beside the products, a tenth more at most."""
    shape = torch.bfloat16, 256, channels, size
    launches = offline.typical_launches(*shape) | offline.training_launches(*shape)
    for name in ("first", "last", "last, activating", "conv2d", "conv2d, full", "conv2d, residual", "data gradient"):
        step = offline.compile_launch(launches[name], 90).step()
        assert step is not None
        assert step.issue_cycles <= 1.1 * step.tensor_cycles, (name, step)
