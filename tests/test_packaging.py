"""What the source and binary distributions hold, built the way pip builds them, and that the build needs no torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CSRC = sorted(p.name for p in (ROOT / "csrc").iterdir())

# Builds in this environment (no downloads), in which importing torch fails: what build isolation comes to.
BUILD = """
import sys
sys.modules["torch"] = None
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])(sys.argv[2]))
"""


def build(hook: str, source: Path, target: Path, **environment: str) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", BUILD, hook, str(target)],
        cwd=source,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory) -> Path:
    for module in ("setuptools", "pybind11", "ninja"):
        pytest.importorskip(module, reason="a build tool of pyproject.toml is not installed here")
    folder = tmp_path_factory.mktemp("sdist")
    # From a copy: setuptools writes its build folders beside the sources.
    copy = folder / "copy"
    shutil.copytree(
        ROOT, copy, ignore=lambda path, names: [n for n in names if n in {".git", "build", "runs"} or n[:5] == ".venv"]
    )
    sdist = build("build_sdist", copy, folder)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder / "unpacked", filter="data")
    return next((folder / "unpacked").iterdir())


def test_sdist_holds_the_sources_of_the_kernels(unpacked_sdist) -> None:
    assert sorted(p.name for p in (unpacked_sdist / "csrc").iterdir()) == CSRC
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "den_kernels/py.typed"):
        assert (unpacked_sdist / name).is_file(), name


@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="no C++ compiler")
def test_wheel_from_the_sdist_holds_a_working_extension(unpacked_sdist, tmp_path) -> None:
    with zipfile.ZipFile(build("build_wheel", unpacked_sdist, tmp_path)) as wheel:
        names = wheel.namelist()
        extension = [n for n in names if n.startswith("den_kernels/_cpu.")]
        assert len(extension) == 1
        assert not [n for n in names if n.startswith("csrc")]
        wheel.extract(extension[0], tmp_path)
    # Loaded by its path and without torch: it links none.
    code = (
        "import importlib.util, sys\n"
        "spec = importlib.util.spec_from_file_location('den_kernels._cpu', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "assert 'torch' not in sys.modules\n"
        "print(*module.supported_isas())\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / extension[0])], capture_output=True, text=True, check=True
    )
    assert out.stdout.split()[-1] == "portable"


def test_wheel_without_a_compiler_is_built_and_says_what_is_missing(unpacked_sdist, tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(unpacked_sdist, source, ignore=shutil.ignore_patterns("build", "*.so"))
    # A PATH with the build tools and nothing else; CXX cleared, so that CMake looks there.
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("cmake", "ninja"):
        found = shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if found is None:
            pytest.skip(f"{tool} is not installed here")
        (tools / tool).symlink_to(Path(found).resolve() if tool == "cmake" else found)
    hidden = {"PATH": str(tools), "CXX": "", "CC": ""}
    wheel = build("build_wheel", source, tmp_path, **hidden)
    with zipfile.ZipFile(wheel) as archive:
        assert not [n for n in archive.namelist() if n.startswith("den_kernels/_cpu.")]
        archive.extractall(tmp_path / "site")
    # Without the import hook of an editable install, which would find this checkout's extension.
    code = (
        "import sys\n"
        "sys.meta_path = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "from den_kernels.backends import cpu\n"
        "print(cpu.unavailable())"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert "is not built: install a C++ compiler" in out.stdout
