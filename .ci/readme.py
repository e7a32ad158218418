"""Run the commands of a Markdown file: every ```sh block, top to bottom, except those whose first line is `# long`.

The blocks run in a copy of the working tree, in one shell each with `set -euo pipefail`, with the virtual environment
of this interpreter first on PATH. The first one that fails ends the run.

    python .ci/readme.py README.md [--list]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BLOCK = re.compile(r"^```sh\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LONG = "# long"


def blocks(text: str) -> list[str]:
    """The bodies of the ```sh blocks."""
    return BLOCK.findall(text)


def is_long(block: str) -> bool:
    """Whether the block asks to be left out."""
    return block.startswith(LONG)


def tracked_files(root: Path) -> list[str]:
    """Files of the working tree that git tracks or would."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def copy_tree(root: Path, to: Path) -> None:
    """A copy that commands may write into, with the extension as an editable install leaves it."""
    built = [str(path.relative_to(root)) for path in root.glob("den_kernels/*.so")]
    for name in (*tracked_files(root), *built):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, to / name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the commands of a Markdown file.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--list", action="store_true", help="show what would run, run nothing")
    options = parser.parse_args()
    found = blocks(options.file.read_text())
    if not found:
        print(f"{options.file} has no ```sh block")
        return 0
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with tempfile.TemporaryDirectory(prefix="readme-") as folder:
        if not options.list:
            copy_tree(options.file.resolve().parent, Path(folder))
        for number, block in enumerate(found, 1):
            state = "left out: long" if is_long(block) else "run"
            print(f"-- block {number} of {len(found)}, {state}\n{block}", end="", flush=True)
            if options.list or is_long(block):
                continue
            start = time.monotonic()
            script = f"set -euo pipefail\n{block}"
            code = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=False).returncode
            if code:
                print(f"-- block {number} of {options.file} failed with status {code}")
                return 1
            print(f"-- ok, {time.monotonic() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
