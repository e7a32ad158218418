"""What a loop of compiled GPU code costs, read from its machine code: nothing runs.

Per step, a multiprocessor issues a warp instruction a cycle on each of four schedulers, and its tensor cores need a
number of cycles for the products. Both are floors: loads may take longer than either.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

# Multiply-adds a cycle of a multiprocessor's tensor cores, float16 and bfloat16 operands without sparsity, float32 sums
# (NVIDIA's whitepapers of A100, L40S and H100).
TENSOR_RATE = {80: 1024, 89: 512, 90: 2048}
_SCHEDULERS = 4
_MATRIX = re.compile(r"\b(HGMMA|HMMA)\b")
_LABEL = re.compile(r"\s*(\.L_\w+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"\bBRA\b.*`\((\.L_\w+)\)")


class Step(NamedTuple):
    """One step of a loop that multiplies matrices. instructions: of a warp."""

    instructions: int
    issue_cycles: float
    tensor_cycles: float


def disassemble(cubin: bytes) -> str:
    """The machine code of a compiled kernel, by the nvdisasm that comes with Triton."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, "-c", file.name], capture_output=True, text=True, check=True).stdout


def loops(code: str) -> list[list[str]]:
    """The instructions of each loop: from the target of a backward branch to the branch."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            instructions.append(instruction[1])
            branch = _BRANCH.search(instruction[1])
            if branch and branch[1] in labels:
                found.append(instructions[labels[branch[1]] :])
    return found


def multiplying_step(cubin: bytes, arch: int, products: int, warps: int) -> Step | None:
    """The shortest loop that multiplies matrices, each step ``products`` multiply-adds by ``warps`` warps, if any.

    The shortest, since loops that also zero values in registers, which few samples take, are longer.
    """
    lengths = [len(body) for body in loops(disassemble(cubin)) if any(map(_MATRIX.search, body))]
    if not lengths:
        return None
    return Step(min(lengths), min(lengths) * warps / _SCHEDULERS, products / TENSOR_RATE[arch])
