"""Builds rcmstr_fast._C with CMake; imports neither torch nor rcmstr_fast."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """One CMake configure and build into the place where setuptools wants the module."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build."""
        import pybind11

        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRCMSTR_FAST_OUTPUT={output}",
            f"-DRCMSTR_FAST_CUDA={os.environ.get('RCMSTR_FAST_CUDA', 'auto')}",
        ]
        architectures = os.environ.get("RCMSTR_FAST_CUDA_ARCHITECTURES")
        if architectures:
            configure.append(f"-DRCMSTR_FAST_CUDA_ARCHITECTURES={architectures}")
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("rcmstr_fast._C", [])], cmdclass={"build_ext": CMakeBuild})
