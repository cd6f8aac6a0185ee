"""`ns-enhancer train-depth`: settings and order of the work. Each stage keeps its files, so that the command can be repeated."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from nerfstudio.utils.rich_utils import CONSOLE

from nerfstudio_enhancer.jobs import Job, run_jobs, workers_and_threads
from nerfstudio_enhancer.scene.folders import scene_folders

PRELOAD = (
    "nerfstudio.configs.method_configs",
    "nerfstudio_enhancer.rounds",
    "nerfstudio_enhancer.depth_training.samples",
    "nerfstudio_enhancer.depth_training.whole_splats",
)


@dataclass(frozen=True)
class TrainDepth:
    """Train the network that predicts the depth of reference views.

    Splats are trained on all photographs of every scene, and their depth, where several views agree on it, is what the
    network learns. Its inputs are sets of few photographs of the scene with their matching costs. What exists already in
    the output folder is kept, so that the command can be repeated to go on.
    """

    output: Path
    """Folder for depth (`depth/`), samples (`samples/`), the training's state and `depth_network.safetensors`."""
    data: tuple[Path, ...] = ()
    """Folders of the scenes, in nerfstudio's or COLMAP's layout."""
    steps: int = 3000
    """Steps of the fit; the learning rate falls to its end over them."""
    max_views: int = 40
    """Most photographs of a scene, spread evenly over the capture."""
    splat_steps: int = 1000
    """Training steps of the splats."""
    size: int = 320
    """Longest side of the photographs in pixels."""
    batch: int = 4
    """Reference views of a step."""
    learning_rate: float = 1e-3
    """At the start; it falls to a fiftieth along a cosine."""
    seed: int = 0
    """Of the reference sets, the order and the first weights."""
    jobs: int | None = None
    """Scenes at once, each with its share of the cores; by default one for each core."""


def train_depth(settings: TrainDepth) -> Path:
    """Make what is missing of depth and samples, and fit the network.

    Returns:
        The file of the weights.

    Raises:
        FileNotFoundError: if a scene's folder is missing.
        ValueError: if the settings leave nothing to do.
        RuntimeError: if a scene failed; all others are kept.
    """
    from nerfstudio_enhancer.depth_training.fit import fit
    from nerfstudio_enhancer.depth_training.samples import make_samples
    from nerfstudio_enhancer.depth_training.whole_splats import WholeScene, store_views

    folders = scene_folders(settings.data)
    names = [data.name for data in folders]
    depth = {name: settings.output / "depth" / f"{name}.pt" for name in names}
    samples = {name: settings.output / "samples" / f"{name}.pt" for name in names}
    scenes = [
        WholeScene(data, depth[data.name], settings.max_views, settings.splat_steps, settings.size, settings.seed)
        for data in folders
    ]
    logs = settings.output / "logs"
    _run(
        "depth of all photographs",
        [Job(s.data.name, store_views, (s,), log=logs / f"{s.data.name}.log") for s in scenes if not s.output.exists()],
        settings,
    )
    _run(
        "reference sets",
        [
            Job(name, make_samples, (depth[name], samples[name], settings.seed), log=logs / f"{name}.log")
            for name in names
            if not samples[name].exists()
        ],
        settings,
    )
    return fit(settings, [samples[name] for name in names])


def _run(what: str, jobs: list[Job], settings: TrainDepth) -> None:
    workers, threads = workers_and_threads(settings.jobs)
    begin_s, failed = time.monotonic(), []
    for done, result in enumerate(run_jobs(jobs, workers, threads, PRELOAD), start=1):
        minutes = (time.monotonic() - begin_s) / 60
        CONSOLE.print(
            f"[{done}/{len(jobs)}] {what}: {result.key}, {result.wall_s:.0f} s, {minutes:.1f} min so far", markup=False
        )
        if result.error:
            failed.append(result)
    if failed:
        raise RuntimeError(
            f"{what}: {len(failed)} of {len(jobs)} scenes failed; the first: {failed[0].key}: {failed[0].error} "
            "Leave the scene out, or mend it and repeat the command."
        )
