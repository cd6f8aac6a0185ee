"""How the native sources are compiled: read by setup.py and by the fuzz driver. Imports nothing of the package."""

from __future__ import annotations

import platform

COMMON_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-Wall"]
# GCC's AVX-512 headers initialise undefined registers from themselves, which GCC 12 then reports.
KERNEL_FLAGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-warning-option"]
_X86_VARIANTS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mbmi", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma", "-mbmi", "-mbmi2"],
}
_X86 = platform.machine().lower() in ("x86_64", "amd64")
VARIANTS: dict[str, list[str]] = _X86_VARIANTS if _X86 else {"baseline": []}
"""Instruction sets of kernels.cpp on this architecture, with their flags."""
SHARED_DEFINES: list[tuple[str, str | None]] = [("NSE_X86_VARIANTS", None)] if _X86 else []
"""Macros of every source."""


def variant_defines(name: str) -> list[tuple[str, str | None]]:
    """Macros of kernels.cpp for the instruction set `name`."""
    return [*SHARED_DEFINES, ("NSE_TABLE", f"nse_kernels_{name}"), ("NSE_TABLE_NAME", f'"{name}"')]
