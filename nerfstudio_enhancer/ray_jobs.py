"""The jobs of `jobs` on a Ray cluster: as many machines as there are, which share a disk."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from nerfstudio_enhancer.jobs import Job, JobResult, call

LOCAL = "local"
"""Address that starts Ray on this machine alone."""


def run_jobs_on_ray(
    jobs: Iterable[Job],
    address: str,
    threads: int = 1,
    gpus: float = 0.0,
    may_start: Callable[[Job], bool] = lambda job: True,
) -> Iterator[JobResult]:
    """Run independent jobs on a Ray cluster and yield each result when it is there.

    Jobs are handed out one by one as cores get free, so that `may_start` is asked right before each starts and machines that
    join later take part. A job whose machine is lost is tried once more. The peak memory of a result is that of the
    worker's process, which may have run other jobs before.

    Args:
        jobs: Jobs with distinct keys, none of which waits for another. Files that they name must be seen by every machine.
        address: Of the cluster; `auto` for the one that this machine belongs to; `local` starts one here.
        threads: Cores that each job takes.
        gpus: GPUs that each job takes; a fraction shares one.
        may_start: Where it says no, a job is left out without a result.

    Raises:
        ImportError: if Ray is not installed.
        ConnectionError: if there is no cluster at the address.
        ValueError: if a job waits for another.
        RuntimeError: if no machine of the cluster has what a job takes.
    """
    waiting = deque(jobs)
    if any(job.after is not None for job in waiting):
        raise ValueError("jobs on Ray must not wait for each other.")
    ray = _connect(address)
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=1)(call)
    running: dict[Any, tuple[Job, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < _places(ray, threads, gpus):
                job = waiting.popleft()
                if may_start(job):
                    running[task.remote(job, threads)] = (job, time.monotonic())
            if running:
                done = ray.wait(list(running), num_returns=1)[0][0]
                yield _finish(ray, done, *running.pop(done))
    finally:
        for left in running:
            ray.cancel(left, force=True)
        ray.shutdown()


def _connect(address: str) -> Any:
    try:
        import ray
    except ImportError as error:
        raise ImportError("Ray is not installed; `pip install 'nerfstudio-enhancer[distributed]'`.") from error
    where = None if address == LOCAL else address
    try:
        ray.init(
            address=where,
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=False if where is None else None,
        )
    except ConnectionError as error:
        raise ConnectionError(
            f"there is no Ray cluster at {address!r} ({error}). Start one by `ray start --head`, or use `--ray local`."
        ) from error
    return ray


def _places(ray: Any, threads: int, gpus: float) -> int:
    """How many jobs the cluster has room for at once.

    Raises:
        RuntimeError: if it has no room for a single one.
    """
    there = ray.cluster_resources()
    places = int(there.get("CPU", 0) // threads)
    if gpus > 0:
        places = min(places, int(there.get("GPU", 0) / gpus))
    if places < 1:
        raise RuntimeError(
            f"the Ray cluster has {there.get('CPU', 0):g} cores and {there.get('GPU', 0):g} GPUs; a job takes {threads} and {gpus:g}."
        )
    return places


def _finish(ray: Any, done: Any, job: Job, since_s: float) -> JobResult:
    try:
        value, error, peak_rss_mb = ray.get(done)
    except ray.exceptions.RayError as lost:
        value, error, peak_rss_mb = None, f"{type(lost).__name__}: {lost}", 0.0
    return JobResult(job.key, value, error, time.monotonic() - since_s, peak_rss_mb)
