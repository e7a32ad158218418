"""Builds den_kernels._cpu with CMake (CMakeLists.txt says how); everything else is in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # A process that has the old file mapped keeps it: written over in place, it would crash.
        target.unlink(missing_ok=True)
        subprocess.run(
            [
                *("cmake", "-S", str(Path(__file__).parent.resolve()), "-B", str(build), "-G", "Ninja"),
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                f"-DDEN_OUTPUT_DIR={target.parent}",
            ],
            check=True,
        )
        # Without a compiler CMake warns and leaves nothing to build: Python's own fallback is then used at run time.
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    # Optional: an editable install tolerates that the file is missing.
    ext_modules=[Extension("den_kernels._cpu", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
