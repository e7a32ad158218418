"""The ceilings of one core of this machine, for roofline tables: `python -m benchmarks.machine`.

Compiles machine.cpp with the C++ compiler ($CXX or c++) and runs it. Rates are the best of many in CPU time of one
thread, so that other processes disturb them little. GFLOP/s count a multiply-add as 2.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path


def measure() -> dict[str, float]:
    """Name of each ceiling, with its unit -> its rate. Raises RuntimeError when there is no C++ compiler."""
    source = Path(__file__).with_suffix(".cpp")
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "machine"
        # AVX2 for the reads; the multiply-adds carry their own instruction sets.
        wide = ["-mavx2"] if "avx2" in _cpu_flags() else []
        try:
            subprocess.run([compiler, "-std=c++17", "-O2", *wide, str(source), "-o", str(program)], check=True)
        except FileNotFoundError:
            raise RuntimeError(f"no C++ compiler {compiler!r}: install one (e.g. apt install g++) or set CXX") from None
        return json.loads(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


def _cpu_flags() -> str:
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def main() -> None:
    for name, rate in measure().items():
        print(f"{name:28} {rate:8.1f}")


if __name__ == "__main__":
    main()
