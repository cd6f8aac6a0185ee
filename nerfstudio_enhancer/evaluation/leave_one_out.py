"""`ns-enhancer leave-one-out`: what the reference views themselves tell about how long to train.

One reference at a time is left out of the training and measured on as it goes on. What trains and measures one of these
is in `held_out`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from nerfstudio.utils.rich_utils import CONSOLE

from nerfstudio_enhancer.evaluation.results import Results, cell_key, load_results, save_results
from nerfstudio_enhancer.evaluation.tables import FIGURES, as_scores, text_table
from nerfstudio_enhancer.jobs import Job, run_jobs, workers_and_threads
from nerfstudio_enhancer.scene.capture import read_capture
from nerfstudio_enhancer.scene.folders import scene_folders
from nerfstudio_enhancer.scene.splits import MIN_REFERENCE_VIEWS, ViewSplit, split_views

TABLE_FILE = "table.md"
PRELOAD = ("nerfstudio.configs.method_configs", "torchmetrics", "nerfstudio_enhancer.evaluation.held_out")

LEFT_OUT, TEST = "left_out", "test"
"""The two groups that are measured on: the reference left out, and the test views if they are asked for."""


@dataclass(frozen=True)
class LeaveOneOut:
    """Find out from the reference views alone how many training steps are enough.

    Of every scene, one reference view after the other is left out of the training (without prior), and the splats are
    measured on it while they train. The table says where the figures are best. Test views are not touched, unless asked
    for to see whether the references tell the truth. Trainings that are done are skipped when the command is repeated.
    """

    data: tuple[Path, ...]
    """Folders of the scenes, in nerfstudio's or COLMAP's layout."""
    output: Path
    """Folder of the results."""
    views: tuple[int, ...] = ()
    """Numbers of reference views, the one left out among them; by default all photographs but every 8th, as in training."""
    steps: tuple[int, ...] = (3000,)
    """Lengths of training, each with the schedule squeezed to fit."""
    checks: int = 6
    """Measurements in each training, at even distances up to its end."""
    folds: int = 3
    """Most references that are left out in turn, spread evenly."""
    max_image_size: int | None = None
    """Longest image side in pixels instead of the method's own."""
    seed: int = 0
    """Of training and seed points."""
    with_test_views: bool = False
    """Measure the test views too. Nothing is chosen by them."""
    jobs: int | None = None
    """Trainings at once, each with its share of the cores; by default one for each core."""


@dataclass(frozen=True)
class Fold:
    """One training with one reference left out."""

    data: Path
    output: Path
    views: int
    left_out: str
    """Name of the photograph that is measured on."""
    reference: tuple[str, ...]
    """Names of those that are trained on."""
    test: tuple[str, ...]
    """Names of the test views; empty where they are not to be touched."""
    steps: int
    checks: int
    max_image_size: int | None
    seed: int

    @property
    def method(self) -> str:
        """What it is called among the results of its scene and number of views."""
        return f"{self.steps} steps without {self.left_out}"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.data.name, self.views, self.seed, self.method

    @property
    def folder(self) -> Path:
        """Of its files."""
        return (
            self.output / "runs" / self.data.name / f"k{self.views:02d}_n{self.steps}" / self.left_out.replace("/", "_")
        )


def leave_one_out(settings: LeaveOneOut) -> Results:
    """Train what is missing and write results and table.

    Raises:
        FileNotFoundError: if a scene's folder is missing.
        ValueError: if there are fewer than 3 references, or the output folder is of other settings.
        RuntimeError: if trainings failed; all others are kept.
    """
    folds = plan_folds(settings)
    results = load_results(
        settings.output, {"checks": settings.checks, "max_image_size": settings.max_image_size, "seed": settings.seed}
    )
    measured = {LEFT_OUT, TEST} if settings.with_test_views else {LEFT_OUT}
    planned = {fold.key for fold in folds}
    results.drop(
        {key for cell in results.cells if (key := cell_key(cell)) in planned and not measured <= set(cell["curve"][0])}
    )
    missing = [fold for fold in folds if not results.has(fold.key)]
    CONSOLE.print(f"{len(folds)} trainings, {len(folds) - len(missing)} of them done already.")
    workers, threads = workers_and_threads(settings.jobs)
    jobs = {str(fold.folder): fold for fold in missing}
    results.failures = []
    listed = [Job(key, _train, (fold,), log=fold.folder / "log.txt") for key, fold in jobs.items()]
    for result in run_jobs(listed, workers, threads, PRELOAD):
        fold = jobs[result.key]
        if result.error is not None:
            results.failures.append({"cell": result.key, "error": result.error})
            CONSOLE.print(f"{fold.key}: FAILED: {result.error}", markup=False)
            continue
        entry = {"scene": fold.data.name, "views": fold.views, "seed": fold.seed, "method": fold.method}
        results.add({**entry, "steps": fold.steps, "curve": result.value, "wall_s": round(result.wall_s, 1)})
        save_results(results, settings.output)
        (settings.output / TABLE_FILE).write_text(curves_table(results.cells), encoding="utf-8")
        CONSOLE.print(f"{fold.data.name}, {fold.views} views, {fold.method}: {result.wall_s:.0f} s", markup=False)
    if results.failures:
        raise RuntimeError(f"{len(results.failures)} trainings failed; the first: {results.failures[0]['error']}")
    CONSOLE.print(curves_table(results.cells), markup=False)
    return results


def plan_folds(settings: LeaveOneOut) -> list[Fold]:
    """All trainings of the settings.

    Raises:
        FileNotFoundError: if a scene's folder is missing.
        ValueError: if a number in the settings is too small.
    """
    for name in ("checks", "folds"):
        if getattr(settings, name) < 1:
            raise ValueError(f"`--{name}` must be at least 1, got {getattr(settings, name)}.")
    folds = []
    for data in scene_folders(settings.data):
        capture = read_capture(data)
        names = [frame.name for frame in capture.frames]
        for views in settings.views or (None,):
            split = split_views(capture, views, None, test_every=8)
            folds += [
                _fold(settings, data, names, split, index, steps)
                for steps in settings.steps
                for index in left_out(len(split.reference), settings.folds)
            ]
    return folds


def left_out(references: int, folds: int) -> list[int]:
    """Which of so many references are left out in turn: at most `folds`, spread evenly, rather inner than outer ones.

    Raises:
        ValueError: if too few would be left to train on.
    """
    if references <= MIN_REFERENCE_VIEWS:
        raise ValueError(
            f"To leave one reference view out there must be at least {MIN_REFERENCE_VIEWS + 1}, got {references}."
        )
    return sorted({round(float(at)) for at in np.linspace(0, references - 1, folds + 2)[1:-1]})


def _fold(settings: LeaveOneOut, data: Path, names: Sequence[str], split: ViewSplit, index: int, steps: int) -> Fold:
    return Fold(
        data=data,
        output=settings.output,
        views=len(split.reference),
        left_out=names[split.reference[index]],
        reference=tuple(names[i] for at, i in enumerate(split.reference) if at != index),
        test=tuple(names[i] for i in split.test) if settings.with_test_views else (),
        steps=steps,
        checks=settings.checks,
        max_image_size=settings.max_image_size,
        seed=settings.seed,
    )


def _train(fold: Fold) -> list[dict[str, Any]]:
    from nerfstudio_enhancer.evaluation.held_out import measured_training

    return measured_training(fold)


def write_split(fold: Fold) -> Path:
    """The list of views of one training, as the dataparser takes it."""
    from diffusion_prior.files import whole_file  # with torch, which `ns-enhancer --help` does without

    path = fold.folder / "split.json"
    content = {"train": fold.reference, "test": [fold.left_out, *fold.test]}
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")
    return path


def curves_table(cells: Sequence[dict[str, Any]]) -> str:
    """Figures of every scene, number of views and length of training by step, means over the references left out."""
    rows = []
    for scene, views, steps in sorted({(cell["scene"], cell["views"], cell["steps"]) for cell in cells}):
        curves = [
            cell["curve"] for cell in cells if (cell["scene"], cell["views"], cell["steps"]) == (scene, views, steps)
        ]
        best = best_check(curves)
        for at, checks in enumerate(zip(*curves)):
            told = [_figures(checks, group) for group in (LEFT_OUT, TEST) if all(group in check for check in checks)]
            marks = "best PSNR" if at == best else ""
            rows.append(
                [scene, str(views), str(steps), str(checks[0]["step"]), *told, *([""] if len(told) < 2 else []), marks]
            )
    header = [
        "scene",
        "views",
        "length",
        "step",
        "reference left out",
        "test views",
        "chosen by the reference left out",
    ]
    return text_table(header, rows)


def best_check(curves: Sequence[Sequence[dict[str, Any]]]) -> int:
    """Which check of trainings of one length has the best mean PSNR on the references left out."""
    means = [mean(check[LEFT_OUT]["psnr"] for check in checks) for checks in zip(*curves)]
    return int(np.argmax(means))


def _figures(checks: Sequence[dict[str, Any]], group: str) -> str:
    return as_scores(mean(check[group][figure] for check in checks) for figure in FIGURES)
