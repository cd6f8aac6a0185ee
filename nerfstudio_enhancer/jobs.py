"""Independent pieces of work, each in a process of its own, several at a time on one machine.

The heavy imports are done once, in multiprocessing's fork server; each job is forked from it before any thread pool
exists, so that it starts in milliseconds, its peak memory is its own, and a crash of one job leaves the others alone.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A call of an importable function with picklable arguments."""

    key: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    after: str | None = None
    """Key of a job that has to succeed before this one starts."""
    log: Path | None = None
    """File that receives what the job prints; None prints it through."""


@dataclass(frozen=True)
class JobResult:
    """How a job ended."""

    key: str
    value: Any = None
    error: str | None = None
    """Traceback or reason, None where the job succeeded."""
    wall_s: float = 0.0
    """Seconds between start and end of the job's process."""
    peak_rss_mb: float = 0.0
    """Largest resident memory of the job's process in MiB."""


def workers_and_threads(jobs: int | None) -> tuple[int, int]:
    """Number of processes at once and threads of each, which together fill the cores; one at a time where a GPU is to be shared.

    Raises:
        ValueError: If fewer than one job at a time is asked for.
    """
    from diffusion_prior.waiting_threads import available_cores  # it imports torch: see `_has_gpu`

    cores = available_cores()
    if jobs is None:
        return (1, cores) if _has_gpu() else (cores, 1)
    if jobs < 1:
        raise ValueError(f"`--jobs` is the number of processes at once and must be at least 1, got {jobs}.")
    return jobs, max(1, cores // jobs)


def run_jobs(
    jobs: Iterable[Job],
    workers: int,
    threads: int = 1,
    preload: Sequence[str] = (),
    may_start: Callable[[Job], bool] = lambda job: True,
) -> Iterator[JobResult]:
    """Run jobs in processes of their own and yield each result when it is there.

    Jobs start in the given order, except that one which waits for another starts as soon as that one has succeeded,
    before jobs further down the list. A job whose predecessor failed fails too.

    Args:
        jobs: Jobs with distinct keys.
        workers: Processes at once, at least 1.
        threads: Threads of each process.
        preload: Modules imported once and shared by all processes.
        may_start: Asked right before a job starts; where it says no, the job is left out without a result.
    """
    waiting = list(jobs)
    keys = [job.key for job in waiting]
    if len(set(keys)) != len(keys):
        raise ValueError(f"jobs need distinct keys, got {sorted({key for key in keys if keys.count(key) > 1})} twice.")
    for place, job in enumerate(waiting):
        if job.after is not None and job.after not in keys[:place]:
            raise ValueError(f"job '{job.key}' waits for '{job.after}', which is no job before it in the list.")
    context = _context(preload, threads)
    running: dict[Connection, _Running] = {}
    succeeded: set[str] = set()
    failed: set[str] = set()
    left_out: set[str] = set()
    try:
        while waiting or running:
            for job in list(waiting):
                if job.after in failed or job.after in left_out:
                    waiting.remove(job)
                    (failed if job.after in failed else left_out).add(job.key)
                    if job.after in failed:
                        yield JobResult(job.key, error=f"not started, since '{job.after}' failed")
                elif (job.after is None or job.after in succeeded) and len(running) < workers:
                    waiting.remove(job)
                    if may_start(job):
                        started = _start(context, job, threads)
                        running[started.connection] = started
                    else:
                        left_out.add(job.key)
            for connection in wait(list(running)) if running else []:
                result = running.pop(connection).finish()  # pyright: ignore[reportArgumentType]
                (failed if result.error else succeeded).add(result.key)
                yield result
    finally:
        for started in running.values():
            started.process.terminate()
        for started in running.values():
            started.process.join()


@dataclass(frozen=True)
class _Running:
    job: Job
    process: Any
    connection: Connection
    since_s: float

    def finish(self) -> JobResult:
        wall_s = time.monotonic() - self.since_s
        try:
            value, error, peak_rss_mb = self.connection.recv()
        except (EOFError, ConnectionResetError):
            value, error, peak_rss_mb = None, None, 0.0
            self.process.join()
            code = self.process.exitcode
            why = f"was ended by signal {-code}" if code is not None and code < 0 else f"ended with status {code}"
            error = f"its process {why} without a result (out of memory?){_see(self.job.log)}"
        self.process.join()
        self.connection.close()
        return JobResult(self.job.key, value, error, wall_s, peak_rss_mb)


def _has_gpu() -> bool:
    import torch  # which `ns-enhancer --help` does without

    return torch.cuda.is_available()


def _see(log: Path | None) -> str:
    return "" if log is None else f"; see {log}"


def _context(preload: Sequence[str], threads: int) -> Any:
    # Read by thread pools when they start, which is after the fork.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # A process that asks for its GPUs before it is forked makes them useless to those that come of it.
    if _has_gpu() or "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    return context


def _start(context: Any, job: Job, threads: int) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(job, sender, threads), name=job.key)
    process.start()
    sender.close()
    return _Running(job, process, receiver, time.monotonic())


def _child(job: Job, sender: Connection, threads: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender.send(call(job, threads))
    sender.close()


def _end_with_parent() -> None:
    """A command that is killed cannot stop its jobs; on their own they would keep the cores for nobody."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def call(job: Job, threads: int) -> tuple[Any, str | None, float]:
    """Call a job's function in this process on so many threads, what it prints going to its log.

    Returns:
        Its value; what went wrong, None if nothing did; the largest resident memory so far, in MiB.
    """
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    value, error = None, None
    try:
        with _output_to(job.log):
            try:
                value = job.function(*job.arguments)
            except KeyboardInterrupt:
                error = "interrupted"
            except BaseException as exception:
                traceback.print_exc()
                error = f"{type(exception).__name__}: {exception}{_see(job.log)}"
    except OSError as exception:
        error = f"its log {job.log} cannot be written ({exception}); free some space or check the permissions."
    return value, error, peak_rss_mb()


@contextmanager
def _output_to(path: Path | None) -> Iterator[None]:
    """Append all that this process prints, compiled code included, to a file."""
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    before = [os.dup(1), os.dup(2)]
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _redirect(descriptor, descriptor)
    os.close(descriptor)
    try:
        yield
    finally:
        _redirect(*before)
        for kept in before:
            os.close(kept)


def _redirect(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


def peak_rss_mb() -> float:
    """Largest resident memory that this process has had so far, in MiB."""
    import resource  # POSIX only: without it the rest of this module still works

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / (1024**2 if sys.platform == "darwin" else 1024)
