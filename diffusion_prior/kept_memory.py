"""Memory of a process that computes with large tensors on a CPU."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of `mallopt(3)`."""
_LARGEST = 2**31 - 1
"""The largest number that it takes, in bytes."""


def keep_freed_memory(device: torch.device | str) -> None:
    """Let the next tensor have the memory of one that is gone, instead of handing that back to the system in between.

    GNU's C library does the latter with blocks of 32 MiB and more, and the system clears every page anew when it is first
    written to: on a CPU a sixth of a prior's time. In return the process holds what it needed at its peak until it ends.

    Args:
        device: on which is computed; nothing is done for another than a CPU.

    Does nothing either where the environment sets `MALLOC_MMAP_THRESHOLD_`, `MALLOC_TRIM_THRESHOLD_` or `GLIBC_TUNABLES`, and
    with another C library.
    """
    decided = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    if torch.device(device).type != "cpu" or sys.platform != "linux" or any(name in os.environ for name in decided):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
        library.mallopt(_M_TRIM_THRESHOLD, _LARGEST)
