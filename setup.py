"""Builds the optional native rasteriser; everything else about the package is in pyproject.toml.

One shared library holds the kernels three times (AVX-512, AVX2, baseline) and chooses at run time, so a wheel works on
every x86-64 machine; other architectures get the portable variant. It needs a C++17 compiler and nothing else: no torch
headers, no Python API: the one that Python itself was built with, or else c++, g++ or clang++. Without a compiler the
installation succeeds with a warning and the slow torch reference is used.
A cross build names its platform in `_PYTHON_HOST_PLATFORM` (linux-aarch64), as those of CPython do.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = "nerfstudio_enhancer/rasterize/native"
LIBRARY = "nerfstudio_enhancer.rasterize._native"
flags = runpy.run_path("nerfstudio_enhancer/rasterize/compile_flags.py")
TARGET = sysconfig.get_platform()


class BuildNative(build_ext):
    """Compiles kernels.cpp once per instruction set and links one library that ctypes loads."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain name: the library does not depend on the Python version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; a CompileError becomes a warning, because the extension is optional."""
        # They follow the flags of Python's own build and of $CFLAGS, which distutils puts first.
        extra = os.environ.get("NERFSTUDIO_ENHANCER_CXXFLAGS", "").split()
        common = [*flags["RELEASE_FLAGS"], *flags["COMMON_FLAGS"], *extra]
        compiler = self.compiler
        if compiler is None:
            raise RuntimeError("build_extension was called before a compiler was chosen.")
        # Which of these command lines C++ is compiled and linked by differs between versions of setuptools.
        for role in ("compiler", "compiler_so", "linker", "linker_so", "linker_exe"):
            for name in (role, f"{role}_cxx"):
                if command := getattr(compiler, name, None):
                    setattr(compiler, name, flags["present"](command))
        objects = compiler.compile(
            [f"{NATIVE}/native.cpp"],
            output_dir=self.build_temp,
            macros=flags["shared_defines"](TARGET),
            extra_postargs=common,
            depends=ext.depends,
        )
        for name, variant in flags["variants"](TARGET).items():
            objects += compiler.compile(
                [f"{NATIVE}/kernels.cpp"],
                output_dir=os.path.join(self.build_temp, name),
                macros=flags["variant_defines"](name, TARGET),
                extra_postargs=[*common, *flags["KERNEL_FLAGS"], *variant],
                depends=ext.depends,
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler.link_shared_object(objects, str(target), extra_postargs=["-pthread", *extra], target_lang="c++")


setup(
    ext_modules=[
        Extension(
            LIBRARY,
            sources=[f"{NATIVE}/native.cpp", f"{NATIVE}/kernels.cpp"],
            depends=[f"{NATIVE}/{header}" for header in ("interface.h", "internal.h", "simd.h")],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative},
)
