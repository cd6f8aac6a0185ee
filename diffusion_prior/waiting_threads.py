"""PyTorch's threads on a CPU that other programs use too."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Set
from pathlib import Path

import torch

_SETTINGS_OF_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables by which a user decides how OpenMP's threads wait; they are read before any code of ours."""
_STATISTICS = Path("/proc/stat")
_LOOK_EVERY_S = 2.0
_MUCH, _LITTLE = 0.3, 0.15
"""Cores that are wanted beyond those there are, above which waiting threads sleep, and below which they do so no longer."""
_started = threading.Lock()


def available_cores() -> int:
    """Number of cores that this process may run on."""
    return len(_own_cores())


def let_waiting_threads_sleep() -> None:
    """Make PyTorch's threads sleep while they wait for each other, as long as other programs want their cores.

    GNU's OpenMP has them run idle loops, which saves microseconds between two short operations: a tenth of a training step
    on two cores that nobody else uses. Where another program wants the core, the thread that all wait for does not get it
    meanwhile: beside two other trainings such a step took 11 times as long as with threads that sleep. OpenMP gives up
    waiting sooner once it holds more threads than there are cores (GOMP_SPINCOUNT in its manual), so a team of threads
    that does nothing is held while others are busy; a thread of this process looks every other second.

    Does nothing where `OMP_WAIT_POLICY` or `GOMP_SPINCOUNT` is set, with one thread, on other systems than Linux, and when
    called again.
    """
    threads = torch.get_num_threads()
    decided = any(name in os.environ for name in _SETTINGS_OF_WAITING)
    if threads == 1 or decided or not _STATISTICS.is_file() or not _started.acquire(blocking=False):
        return
    threading.Thread(target=_watch, args=(threads,), name="look at other programs", daemon=True).start()


def busy_seconds(statistics: str, cores: Set[int], ticks_per_s: int) -> float:
    """Seconds in which these cores have worked for any program or were taken by the hypervisor, since the machine started.

    Args:
        statistics: what `/proc/stat` says: `cpuN user nice system idle iowait irq softirq steal ...` in ticks.
        cores: their numbers N.
        ticks_per_s: as `os.sysconf("SC_CLK_TCK")` has it.
    """
    ticks = 0
    for line in statistics.splitlines():
        name, *counts = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and int(name[3:]) in cores:
            user, nice, system, _idle, _iowait, *rest = map(int, counts)
            ticks += user + nice + system + sum(rest[:3])
    return ticks / ticks_per_s


def _own_cores() -> Set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def _cores_of_others(period_s: float) -> float:
    """How many of this process's cores other programs use, mean over the next seconds."""

    def now() -> tuple[float, float, float]:
        busy_s = busy_seconds(_STATISTICS.read_text(), _own_cores(), os.sysconf("SC_CLK_TCK"))
        return busy_s, time.process_time(), time.monotonic()

    before = now()
    time.sleep(period_s)
    busy_s, own_s, wall_s = (after - then for after, then in zip(now(), before))
    return max(0.0, busy_s - own_s) / wall_s


def _watch(threads: int) -> None:
    release: threading.Event | None = None
    while True:
        lacking = _cores_of_others(_LOOK_EVERY_S) + threads - available_cores()
        if release is None and lacking > _MUCH:
            release = threading.Event()
            threading.Thread(target=_hold_a_team, args=(threads, release), name="idle team", daemon=True).start()
        elif release is not None and lacking < _LITTLE:
            release.set()
            release = None


def _hold_a_team(threads: int, release: threading.Event) -> None:
    more_than_cores = max(2, available_cores() - threads + 2)
    torch.set_num_threads(more_than_cores)
    torch.zeros(more_than_cores << 16).add_(1)  # long enough to be shared among them
    torch.set_num_threads(threads)  # of threads made later: they begin with what was last set anywhere
    release.wait()
