"""How the native sources are compiled: read by setup.py and by the fuzz driver. Imports nothing of the package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

# No -ffast-math and nothing else that lets a compiler assume away NaN and infinity: the kernels test for them.
COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
RELEASE_FLAGS = ["-O3", "-g0"]
# GCC's AVX-512 headers initialise undefined registers from themselves, which GCC 12 then reports.
KERNEL_FLAGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]
_PORTABLE_VARIANTS: dict[str, list[str]] = {"baseline": []}
_X86_VARIANTS = {
    **_PORTABLE_VARIANTS,
    "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mbmi", "-mbmi2"],
}


COMPILERS = ("c++", "g++", "clang++")
"""C++ compilers that are tried where the one of Python's own build is not on this machine."""


def present(command: Sequence[str]) -> list[str]:
    """A compiler's command line, by the first of `COMPILERS` that there is if its own program is missing."""
    program, *arguments = command
    if shutil.which(program) is None:
        program = next(filter(shutil.which, COMPILERS), program)
    return [program, *arguments]


def variants(target: str) -> dict[str, list[str]]:
    """Instruction sets of kernels.cpp on a platform, with their flags.

    Args:
        target: the platform as `sysconfig.get_platform()` or `compiler -dumpmachine` names it: linux-x86_64,
            x86_64-linux-gnu, linux-aarch64, macosx-11.0-arm64, macosx-10.9-universal2, ... Whatever is not x86-64 alone
            gets the portable kernels alone.
    """
    return _X86_VARIANTS if _is_x86_64(target) else _PORTABLE_VARIANTS


def shared_defines(target: str) -> list[tuple[str, str | None]]:
    """Macros of every source on the platform `target`, see `variants`."""
    return [("NSE_X86_VARIANTS", None)] if _is_x86_64(target) else []


def variant_defines(name: str, target: str) -> list[tuple[str, str | None]]:
    """Macros of kernels.cpp for the instruction set `name` on the platform `target`, see `variants`."""
    return [*shared_defines(target), ("NSE_TABLE", f"nse_kernels_{name}"), ("NSE_TABLE_NAME", f'"{name}"')]


def _is_x86_64(target: str) -> bool:
    return any(name in target.lower() for name in ("x86_64", "amd64"))
