"""`python -m den_kernels`: each backend of this machine, usable or why not, and the fix."""

from __future__ import annotations

import platform

import torch

import den_kernels
from den_kernels.backends import NAMES, load


def main() -> None:
    """Print versions, then a line a backend."""
    print(f"den_kernels {den_kernels.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, CUDA {'yes' if torch.cuda.is_available() else 'no'}"
    )
    for name in NAMES[1:]:
        reason = load(name).unavailable()
        print(f"  {name:10} {'usable' if reason is None else 'no: ' + reason}{_detail(name, reason)}")


def _detail(name: str, reason: str | None) -> str:
    describe = getattr(load(name), "describe", None)
    return f" ({describe()})" if describe and reason is None else ""


if __name__ == "__main__":
    main()
