"""`ns-enhancer make-pairs`: which splats to train, in which order, for how long. The splats are made in `sparse_splats`."""

from __future__ import annotations

import itertools
import random
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nerfstudio_enhancer.jobs import Job, JobResult, run_jobs, workers_and_threads
from nerfstudio_enhancer.scene.folders import scene_folders

if TYPE_CHECKING:
    from diffusion_prior.data.pairs import RunKind

PRELOAD = (
    "nerfstudio.configs.method_configs",
    "torchmetrics",
    "nerfstudio_enhancer.rounds",
    "nerfstudio_enhancer.pairs.sparse_splats",
)


@dataclass(frozen=True)
class MakePairs:
    """Make paired data for training the prior.

    For every scene, number of reference views and seed, splats are trained on the reference views alone. After each
    some numbers of steps they are rendered at the scene's other cameras and stored beside the photographs taken
    there. What exists already in the output folder is skipped, so that the command can be repeated to go on.
    """

    output: Path
    """Folder of the paired data: `<scene>/k<views>_s<seed>_n<steps>[_<kind>]/`."""
    data: tuple[Path, ...] = ()
    """Folders of the scenes, in nerfstudio's or COLMAP's layout."""
    views: tuple[int, ...] = (3, 4, 6, 9, 12, 18)
    """Numbers of reference views. A scene of N images takes part in those that leave a frame between neighbours."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of the seed points and of the training."""
    steps: tuple[int, ...] = (300, 600, 1200)
    """Training steps after which a run is stored. Each training ends at one of them, drawn by its seed, with the schedule
    squeezed to fit, and stores a run at every one that it passes."""
    size: int = 320
    """Longest side of the stored pictures in pixels."""
    max_frames: int = 24
    """Most frames that are stored of a run, spread evenly over the capture."""
    plain_share: float = 0.25
    """Share of the trainings that leave out the method's additions, as plain splatfacto, for other kinds of errors."""
    random_points_share: float = 0.15
    """Share of the trainings that start from random points."""
    paths: bool = False
    """Also store two runs along smooth paths between and around the references, whose target are splats trained on all
    photographs: what the sparse splats show there, as in the paper, and what those splats themselves show when they are
    damaged. Such splats are trained once for each scene and kept in `whole_splats`; delete that folder to train them anew."""
    whole_steps: int = 1500
    """Training steps of the splats on all photographs."""
    whole_views: int = 60
    """Most photographs that they are trained on, spread evenly over the capture."""
    jobs: int | None = None
    """Trainings at once, each with its share of the cores; by default one for each core."""
    ray: str | None = None
    """Spread the trainings over a Ray cluster: its address, `auto` for the one that this machine belongs to, or `local`. Each
    takes one core. Every machine needs this package, and the scenes and the output folder at the same paths."""
    ray_gpus: float = 0.0
    """GPUs that each training takes on the cluster; a fraction shares one."""
    minutes: float | None = None
    """Start no training after this many minutes. The order is shuffled so that all scenes come early."""
    verify: bool = False
    """Make nothing; check the checksums, shapes and cameras of everything in the output folder."""


@dataclass(frozen=True)
class SplatTraining:
    """One training of sparse splats, of which a run is stored after each number of steps."""

    data: Path
    output: Path
    num_views: int
    seed: int
    steps: tuple[int, ...]
    size: int
    max_frames: int
    additions: bool
    """Train with the method's additions; False: as plain splatfacto."""
    random_points: bool
    """Start from random points; False: from the best seed points that can be had."""
    paths: bool = False
    """Also store what is seen along paths."""
    whole_steps: int = 1500
    whole_views: int = 60

    @property
    def scene(self) -> str:
        return self.data.name

    @property
    def key(self) -> str:
        return f"{self.scene} k={self.num_views} seed={self.seed}"


def make_pairs(settings: MakePairs) -> None:
    """Make or verify paired data.

    Raises:
        FileNotFoundError: if a scene's folder is missing, or `--verify` finds no run.
        ValueError: if the settings leave nothing to do, or `--verify` finds a broken run.
        RuntimeError: if trainings failed; all others have been stored.
    """
    if settings.verify:
        _verify(settings.output)
        return
    trainings = plan_trainings(settings)
    missing = [training for training in trainings if missing_steps(training)]
    CONSOLE.print(
        f"{len(trainings)} trainings of sparse splats over {len({t.scene for t in trainings})} scenes, "
        f"{len(trainings) - len(missing)} of them stored already."
    )
    failed = _run(missing, settings)
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(missing)} trainings failed; the first: {failed[0].key}: {failed[0].error}"
        )


def plan_trainings(settings: MakePairs) -> list[SplatTraining]:
    """All trainings, in rounds that visit every scene once, in an order that depends on the settings alone.

    Raises:
        FileNotFoundError: if a scene's folder is missing.
        ValueError: if the settings leave nothing to do.
    """
    from nerfstudio_enhancer.scene.capture import read_capture

    _check(settings)
    by_scene = []
    for data in scene_folders(settings.data):
        count = len(read_capture(data).frames)
        fitting = [k for k in settings.views if 2 <= k <= (count + 1) // 2]
        plan = [_training(settings, data, k, seed) for k, seed in itertools.product(fitting, settings.seeds)]
        random.Random(_hash(data.name)).shuffle(plan)
        by_scene.append(plan)
    if not any(by_scene):
        raise ValueError(
            f"no scene has enough images for {settings.views} reference views: k views need 2 k - 1 images. Lower `--views`."
        )
    rounds = itertools.zip_longest(*by_scene)
    order = random.Random(0)
    return [training for visit in rounds for training in order.sample(visit, len(visit)) if training is not None]


def missing_steps(training: SplatTraining) -> list[int]:
    """Numbers of steps of a training for which a run is not stored yet."""
    return [steps for steps in training.steps if missing_kinds(training, steps)]


def missing_kinds(training: SplatTraining, steps: int) -> list[RunKind]:
    """Kinds of runs after a number of steps that are not stored yet. The damaged splats know no steps: the last have them."""
    from diffusion_prior.data.pairs import META_NAME, run_folder

    kinds: list[RunKind] = ["photographs"]
    if training.paths:
        kinds.append("paths")
    if training.paths and steps == training.steps[-1]:
        kinds.append("degraded")
    place = training.output, training.scene, training.num_views, training.seed, steps
    return [kind for kind in kinds if not (run_folder(*place, kind) / META_NAME).exists()]


def _check(settings: MakePairs) -> None:
    if not settings.steps or min(settings.steps) < 1:
        raise ValueError(f"`--steps` are numbers of training steps of at least 1, got {settings.steps}.")
    for name in ("max_frames", "whole_steps", "whole_views"):
        if getattr(settings, name) < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {getattr(settings, name)}.")


def _training(settings: MakePairs, data: Path, num_views: int, seed: int) -> SplatTraining:
    draw = random.Random(_hash(data.name, num_views, seed))
    steps = sorted(set(settings.steps))
    return SplatTraining(
        data=data,
        output=settings.output,
        num_views=num_views,
        seed=seed,
        steps=tuple(steps[: draw.randint(1, len(steps))]),
        size=settings.size,
        max_frames=settings.max_frames,
        additions=draw.random() >= settings.plain_share,
        random_points=draw.random() < settings.random_points_share,
        paths=settings.paths,
        whole_steps=settings.whole_steps,
        whole_views=settings.whole_views,
    )


def _hash(*parts: object) -> int:
    return zlib.crc32("/".join(map(str, parts)).encode())


def _run(trainings: Sequence[SplatTraining], settings: MakePairs) -> list[JobResult]:
    begin_s = time.monotonic()
    limit_s = float("inf") if settings.minutes is None else 60 * settings.minutes
    jobs = [_job(training, settings.output) for training in trainings]
    failed, stored, done = [], 0, 0
    with _progress(len(jobs)) as advance:
        for done, result in enumerate(
            _results(jobs, settings, lambda job: time.monotonic() - begin_s < limit_s), start=1
        ):
            advance()
            elapsed_s = time.monotonic() - begin_s
            left_s = min(elapsed_s / done * (len(jobs) - done), max(0.0, limit_s - elapsed_s))
            tail = f"{result.wall_s:.0f} s, {elapsed_s / 60:.1f} min so far, about {left_s / 60:.0f} min left"
            if result.error:
                failed.append(result)
                CONSOLE.print(f"[{done}/{len(jobs)}] {result.key}: FAILED: {result.error}", markup=False)
            else:
                stored += result.value
                CONSOLE.print(f"[{done}/{len(jobs)}] {result.key}: {result.value} runs, {tail}", markup=False)
    CONSOLE.print(f"{stored} runs stored in {settings.output}; {len(jobs) - done} trainings left for another time.")
    return failed


def _results(jobs: Sequence[Job], settings: MakePairs, in_time: Callable[[Job], bool]) -> Iterator[JobResult]:
    if settings.ray is not None:
        from nerfstudio_enhancer.ray_jobs import run_jobs_on_ray

        return run_jobs_on_ray(jobs, settings.ray, gpus=settings.ray_gpus, may_start=in_time)
    return run_jobs(jobs, *workers_and_threads(settings.jobs), PRELOAD, in_time)


def _job(training: SplatTraining, output: Path) -> Job:
    # Processes on other machines have working directories of their own.
    training = replace(training, data=training.data.absolute(), output=training.output.absolute())
    output = output.absolute()
    log = output / "logs" / f"{training.scene}_k{training.num_views:02d}_s{training.seed}.txt"
    return Job(training.key, _make_runs, (training,), log=log)


def _make_runs(training: SplatTraining) -> int:
    from nerfstudio_enhancer.pairs.sparse_splats import make_runs

    return make_runs(training, missing_steps(training))


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    columns = (
        TextColumn("sparse splats"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def _verify(output: Path) -> None:
    from diffusion_prior.data.pairs import find_runs, read_header, verify_run

    folders = find_runs(output)
    frames, broken = 0, []
    for folder in folders:
        try:
            verify_run(folder)
            frames += read_header(folder).num_frames
        except (ValueError, FileNotFoundError) as error:
            broken.append(f"{folder.parent.name}/{folder.name}: {error}")
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(folders)} runs in {output} are broken; delete them and run make-pairs again:\n"
            + "\n".join(broken)
        )
    CONSOLE.print(f"{len(folders)} runs with {frames} frames in {output} are whole.")
