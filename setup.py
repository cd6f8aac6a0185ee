"""Builds the optional native rasteriser; everything else about the package is in pyproject.toml.

One shared library holds the kernels three times (AVX-512, AVX2, baseline) and chooses at run time, so a wheel works on
every x86-64 machine; other architectures get the portable variant. It needs a C++17 compiler and nothing else: no torch
headers, no Python API. Without a compiler the installation succeeds with a warning and the slow torch reference is used.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = "nerfstudio_enhancer/rasterize/native"
LIBRARY = "nerfstudio_enhancer.rasterize._native"
COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
]
# GCC's AVX-512 headers initialise undefined registers from themselves, which GCC 12 then reports.
KERNEL_FLAGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]
VARIANTS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mbmi", "-mbmi2"],
}


class BuildNative(build_ext):
    """Compiles kernels.cpp once per instruction set and links one library that ctypes loads."""

    def get_ext_filename(self, fullname: str) -> str:
        """A plain name: the library does not depend on the Python version."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile and link; a CompileError becomes a warning, because the extension is optional."""
        # `CFLAGS` of the Python build must not widen the instruction set (`-march=native`) of the shared parts.
        extra = os.environ.get("NERFSTUDIO_ENHANCER_CXXFLAGS", "").split()
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        variants = VARIANTS if x86 else {"baseline": []}
        common = [*COMMON_FLAGS, *(["-DNSE_X86_VARIANTS"] if x86 else []), *extra]
        compiler = self.compiler
        if compiler is None:
            raise RuntimeError("build_extension was called before a compiler was chosen.")
        objects = compiler.compile(
            [f"{NATIVE}/native.cpp"], output_dir=self.build_temp, extra_postargs=common, depends=ext.depends
        )
        for name, flags in variants.items():
            objects += compiler.compile(
                [f"{NATIVE}/kernels.cpp"],
                output_dir=os.path.join(self.build_temp, name),
                macros=[("NSE_TABLE", f"nse_kernels_{name}"), ("NSE_TABLE_NAME", f'"{name}"')],
                extra_postargs=[*common, *KERNEL_FLAGS, *flags],
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
