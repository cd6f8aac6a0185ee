"""PyTorch's threads on a CPU that other programs use too."""

from __future__ import annotations

import os
import threading

import torch

_SETTINGS_OF_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables by which a user decides how OpenMP's threads wait; they are read before any code of ours."""
_started = threading.Lock()


def available_cores() -> int:
    """Number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def let_waiting_threads_sleep() -> None:
    """Make PyTorch's threads sleep while they wait for each other, where GNU's OpenMP has them run idle loops.

    Between two short operations such loops save microseconds. Where another program wants the core, the thread that all
    wait for does not get it meanwhile: a step of training splats on two cores, beside two other trainings, took 11 times as long.
    GNU's OpenMP gives up waiting sooner once it holds more threads than there are cores (GOMP_SPINCOUNT in its manual),
    so a team of threads is started that does nothing. Without another program it changes no time that could be measured.

    Does nothing where `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` is set, with one thread, and when called again.
    """
    threads = torch.get_num_threads()
    if threads == 1 or any(name in os.environ for name in _SETTINGS_OF_WAITING):
        return
    if not _started.acquire(blocking=False):
        return
    is_there = threading.Event()
    threading.Thread(target=_hold_a_team, args=(threads, is_there), name="idle team", daemon=True).start()
    is_there.wait()


def _hold_a_team(threads: int, is_there: threading.Event) -> None:
    more_than_cores = max(2, available_cores() - threads + 2)
    try:
        torch.set_num_threads(more_than_cores)
        torch.zeros(more_than_cores << 16).add_(1)  # long enough to be shared among them
    finally:
        torch.set_num_threads(threads)  # of threads made later: they begin with what was last set anywhere
        is_there.set()
    threading.Event().wait()
