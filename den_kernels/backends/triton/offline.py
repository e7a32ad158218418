"""Compile launches for a GPU that is not there, and report what the compiler made of them.

    python -m den_kernels.backends.triton.offline [--arch 80 89 90]

prints the table of docs/gpu-kernels.md. Nothing runs, so tensors may be on the "meta" device.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.cache import get_cache_manager

from den_kernels.backends.triton import block, conv, data_gradient, norm, plan, weight_gradient
from den_kernels.backends.triton.chain import Readers
from den_kernels.backends.triton.launch import Launch
from den_kernels.backends.triton.machine_code import Step, multiplying_step
from den_kernels.block import BlockArguments

# Shared memory that one block may use, KiB (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT_KIB = {80: 163, 89: 99, 90: 227}
_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _makers(dtype: torch.dtype, samples: int):
    """Functions that make tensors without storage: maps, filters, vectors of integers, tables in float32."""

    def activations(width: int, pixels: int) -> torch.Tensor:
        empty = torch.empty((samples, width, pixels, pixels), dtype=dtype, device="meta")
        return empty.to(memory_format=torch.channels_last)

    def filters(outputs: int, inputs: int, kernel: int) -> torch.Tensor:
        return torch.empty((outputs, kernel, kernel, inputs), dtype=dtype, device="meta")

    def integers(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int32, device="meta")

    def rows(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device="meta")

    return activations, filters, integers, rows


def typical_launches(
    dtype: torch.dtype, samples: int = 256, channels: int = 64, size: int = 32, groups: int = 1
) -> dict[str, Launch]:
    """Every form that the kernels take, at the shape of one stage of a network; by default WRN-32-4's first."""

    activations, filters, integers, rows = _makers(dtype, samples)
    x, levels = activations(channels, size), 4
    plan = (integers(samples), integers(samples), integers(levels), integers(levels))
    table = rows(levels, channels)
    square = filters(channels, channels // groups, 3)

    def fused(
        y: torch.Tensor, weights, tables, kernels, strides, pre=None, projection=(), readers=None
    ) -> list[Launch]:
        grouped = [groups if kernel == 3 else 1 for kernel in kernels]
        norms = tables, tables, pre, pre
        arguments = BlockArguments(plan[-1], weights, *norms, kernels, strides, grouped, projection, readers is None)
        return block.plan_block(x, y, *plan[:-1], arguments, in_place=y is x, readers=readers)

    basic = [square] * 2, [table] * 2, [3, 3], [1, 1]
    wide, down = rows(levels, 2 * channels), activations(2 * channels, -(-size // 2))
    narrow, broad = filters(channels, channels, 1), filters(2 * channels, channels, 1)
    bottleneck = [narrow, square, broad], [table, table, wide], [1, 3, 1], [1, 2, 1]
    width, geometry = integers(samples), ((1, 1), (1, 1), (1, 1), groups)
    norm = conv.Norm(width, table, table, True)
    readers = [Readers(x, width, integers(levels), table, 2, levels, fresh) for fresh in (False, True)]
    return {
        "conv2d": conv.plan_conv2d(x, square, rows(channels).to(dtype), width, width, None, x, *geometry),
        "conv2d, full": conv.plan_conv2d(x, square, None, None, None, None, x, *geometry),
        "conv2d, norm": conv.plan_conv2d(x, square, None, width, width, None, x, *geometry, norm),
        "conv2d, residual": conv.plan_conv2d(x, square, None, width, None, x, x, *geometry),
        **_named(("first", "last"), fused(x, *basic)),
        **_named(("first, pre-activation",), fused(x, *basic, pre=rows(channels))),
        **_named(("", "last, activating"), fused(x, *basic, readers=readers[0])),
        **_named(("", "last, activating all"), fused(x, *basic, readers=readers[1])),
        **_named(("", "inner", "last, pooled"), fused(down, *bottleneck)),
        **_named(("projection",), fused(down, *bottleneck, projection=(broad, wide, wide))),
    }


def _named(names: Sequence[str], launches: Sequence[Launch]) -> dict[str, Launch]:
    """The launches of a block's convolutions by name, a sum of parts by that of its convolution; "" is left out."""
    named, left = {}, iter(names)
    name = ""
    for launch in launches:
        if launch.constants.get("SUM_OF"):
            named[f"{name}, sum of parts"] = launch
            continue
        name = next(left, "")
        named[name] = launch
    return {name: launch for name, launch in named.items() if name and not name.startswith(",")}


def training_launches(
    dtype: torch.dtype, samples: int = 256, channels: int = 64, size: int = 32, groups: int = 1
) -> dict[str, Launch]:
    """What a training step adds to `typical_launches`, at the shape of one stage; and the plan of a batch."""
    activations, filters, integers, rows = _makers(dtype, samples)
    x, square, width = activations(channels, size), filters(channels, channels // groups, 3), integers(samples)
    half = activations(channels, -(-size // 2))
    strides = {stride: ((stride, stride), (1, 1), (1, 1), groups) for stride in (1, 2)}
    members, products, total = weight_gradient.plan_weight_gradient(x, x, width, width, square, *strides[1])
    packed = weight_gradient.plan_weight_gradient(activations(channels, 3), activations(channels, 3), width, width,
                                                  square, *strides[1])[1]  # fmt: skip
    levels, tables = integers(samples), [rows(4, channels) for _ in range(5)]
    told = norm.Norm(levels, width, tables[0], tables[1], eps=1e-5, relu=True)
    mean, var, count = tables[2:]
    sums, statistics, normalise = norm.plan_forward(x, told, x, mean, var, count)
    gradient_sums, parameters, input_gradient = norm.plan_backward(x, x, told, mean, var, count, x, mean, var)
    level = torch.empty((samples, 15), dtype=torch.int64, device="meta")
    orders = [torch.empty((15, n), dtype=torch.int32, device="meta") for n in (samples, samples, 4)]
    return {
        "data gradient": data_gradient.plan_data_gradient(x, square, width, width, x, *strides[1]),
        "data gradient, stride 2": data_gradient.plan_data_gradient(half, square, width, width, x, *strides[2]),
        "weight gradient": products,
        "weight gradient, 3x3 map": packed,
        "members": members,
        "sum": total,
        "bias gradient": weight_gradient.plan_bias_gradient(x, width, rows(channels).to(dtype))[0],
        "norm, moments": sums,
        "norm, statistics": statistics,
        "norm, forward": normalise,
        "norm, gradient sums": gradient_sums,
        "norm, parameters": parameters,
        "norm, input gradient": input_gradient,
        "plan": plan.plan_plan(level, *orders),
    }


class Report(NamedTuple):
    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes
    launch: Launch
    arch: int

    def step(self) -> Step | None:
        """Of the loop that multiplies matrices of 16-bit values; None where there is none."""
        products, warps = math.prod(self.launch.blocks.values()), self.launch.tile.num_warps
        return multiplying_step(self.cubin, self.arch, products, warps)

    @property
    def matrix_instruction(self) -> str:
        """ "wgmma", "mma.sync", or "fma" when there is no tensor-core instruction."""
        return next((name for name in ("wgmma", "mma.sync") if name in self.ptx), "fma")

    @property
    def vector_copies(self) -> int:
        """16-byte asynchronous copies from global to shared memory."""
        return len(re.findall(r"cp\.async\.c[ag]\.shared\.global [^;]*\], 0x10\b", self.ptx))


def _ptxas(arch: int, ptx: str) -> str:
    """What ptxas says of the code, kept in Triton's cache beside what Triton itself keeps there."""
    program = get_ptxas(arch)
    cache = get_cache_manager(hashlib.sha256(f"{program.version} {arch} {ptx}".encode()).hexdigest())
    kept = cache.get_file("ptxas.log")
    if kept is not None:
        return Path(kept).read_text()
    log = _run_ptxas(program.path, arch, ptx)
    cache.put(log, "ptxas.log")
    return log


def _run_ptxas(program: str, arch: int, ptx: str) -> str:
    name = re.search(r"\.target (sm_\w+)", ptx)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [program, "-v", f"--gpu-name={name[1] if name else f'sm_{arch}'}", str(source)]
        done = subprocess.run(
            [*command, "-o", str(Path(folder, "kernel.cubin"))], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise RuntimeError(f"ptxas failed for sm_{arch}: {done.stderr.strip()}")
    return done.stderr


def compile_launch(launch: Launch, arch: int) -> Report:
    """Compile ``launch`` for compute capability ``arch`` (90 is 9.0), specialised as the JIT would at run time.

    Raises:
        RuntimeError: the kernels are interpreted (TRITON_INTERPRET=1), or ptxas refuses the code.
    """
    if not isinstance(launch.kernel, triton.JITFunction):
        raise RuntimeError("offline compiles need the real JIT: unset TRITON_INTERPRET")
    values = launch.arguments | launch.constants | launch.blocks
    generic = launch.kernel.do_not_specialize or ()
    unaligned = launch.kernel.do_not_specialize_on_alignment or ()
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{_TYPE_NAMES[value.dtype]}"
            if name not in unaligned:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif name in launch.arguments and value is not None and (name in generic or value != 1):
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            if name not in generic and isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[name] = value
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    log = _ptxas(arch, ptx)
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", log)
    return Report(
        registers=int(registers[1]) if registers else 0,
        spill_bytes=sum(int(n) for n in spills),
        shared_bytes=compiled.metadata.shared,
        ptx=ptx,
        cubin=compiled.asm["cubin"],
        launch=launch,
        arch=arch,
    )


def main() -> None:
    """Print what the compiler makes of each kernel at each stage of WRN-32-4 in bfloat16; of training, at the first."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument(
        "--arch", type=int, nargs="+", default=sorted(SHARED_LIMIT_KIB), choices=sorted(SHARED_LIMIT_KIB)
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[256])
    arguments = parser.parse_args()
    columns = ["kernel", "batch", "channels, size", "tile M x N x K, warps, stages"]
    columns += ["per sm: registers, shared KiB, spills; cycles of a step to issue, to multiply"]
    print("|", " | ".join(columns), "|")
    print("|---" * len(columns) + "|")
    for batch in arguments.batch:
        for channels, size in ((64, 32), (128, 16), (256, 8)):
            shape = torch.bfloat16, batch, channels, size
            launches = typical_launches(*shape)
            if size == 32:
                launches |= training_launches(*shape)
            for name, launch in launches.items():
                cells = []
                for arch in arguments.arch:
                    report = compile_launch(launch, arch)
                    shared = report.shared_bytes / 1024
                    step = report.step()
                    cycles = "" if step is None else f", {step.issue_cycles:.0f}, {step.tensor_cycles:.0f}"
                    cells.append(f"{arch}: {report.registers}, {shared:.0f}, {report.spill_bytes}{cycles}")
                sizes = " x ".join(map(str, launch.blocks.values()))
                tile = f"{sizes}, {launch.tile.num_warps}, {launch.tile.num_stages}"
                print(f"| {name} | {batch} | {channels}, {size} | {tile} | {'; '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
