"""`ns-enhancer benchmark`: which cells to run, in which order, and what is kept of them. A cell itself is in `cell`."""

from __future__ import annotations

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from nerfstudio_enhancer.evaluation.methods import MAIN_METHODS, METHODS
from nerfstudio_enhancer.evaluation.results import Results, load_results, save_results
from nerfstudio_enhancer.evaluation.tables import benchmark_tables
from nerfstudio_enhancer.jobs import Job, JobResult, run_jobs, workers_and_threads
from nerfstudio_enhancer.scene.folders import scene_folders
from nerfstudio_enhancer.scene.splits import SplitRule

TABLE_FILE = "table.md"
SHEETS_FOLDER = "sheets"
PRELOAD = (
    "nerfstudio.configs.method_configs",
    "torchmetrics",
    "nerfstudio_enhancer.rounds",
    "nerfstudio_enhancer.evaluation.cell",
)

Preset = Literal["quick", "default"]


@dataclass(frozen=True)
class Scale:
    """How large a training is; None leaves it to the method."""

    steps: int | None
    max_image_size: int | None


@dataclass(frozen=True)
class Protocol:
    """Which photographs are references and test views, and where they lie; as the flags of `Benchmark`."""

    split_rule: SplitRule = "references-first"
    split_files: str | None = None
    image_folder: str | None = None

    def split_file(self, scene: str, views: int) -> Path | None:
        """The list of one scene and number of views; None where a rule splits."""
        return None if self.split_files is None else Path(self.split_files.format(scene=scene, views=views))

    @property
    def unusual(self) -> dict[str, Any]:
        """What differs from the paper's protocol on a scene's own photographs."""
        usual = vars(Protocol())
        return {name: value for name, value in vars(self).items() if value != usual[name]}


PRESETS: dict[Preset, Scale] = {"quick": Scale(steps=1200, max_image_size=320), "default": Scale(None, None)}


@dataclass(frozen=True)
class Benchmark:
    """Compare methods over scenes, numbers of reference views and seeds.

    Every cell is trained with nerfstudio's trainer and measured with nerfstudio's own evaluation of the checkpoint. The
    output folder receives results.json, table.md, side-by-side pictures in `sheets` and all runs with their config.yml.
    Cells that are done are skipped, so that an interrupted benchmark goes on where it stopped when the command is
    repeated. Methods that differ only from the first round on share the training before it.
    """

    data: tuple[Path, ...]
    """Folders of the scenes, in nerfstudio's or COLMAP's layout."""
    output: Path
    """Folder of the results."""
    views: tuple[int, ...] = (3, 6, 9)
    """Numbers of reference views."""
    methods: tuple[str, ...] = MAIN_METHODS
    """Methods to compare. Besides those of the default, ablations of the geometry: background, depth-loss, regularised,
    geometry-depth-loss; and of the rounds: no-warps, no-image-confidence,
    no-pixel-confidence, no-std, colour-correction, no-refresh."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of training and seed points."""
    preset: Preset = "default"
    """Either quick (1,200 steps at 320 px: about a minute a cell on two cores) or default (the method's own schedule)."""
    steps: int | None = None
    """Training steps instead of the preset's; the schedule is squeezed to fit."""
    max_image_size: int | None = None
    """Longest image side in pixels instead of the preset's."""
    prior: str = "bundled"
    """Prior of the method 3dgs-enhancer: bundled, a folder, or a hub name."""
    split_rule: SplitRule = "references-first"
    """references-first: k references, then every 8th of the rest is a test view (3DGS-Enhancer). test-first: every 8th
    photograph is a test view, then k references among the others (Mip-NeRF 360)."""
    split_files: str | None = None
    """Where JSON lists of references and test views lie, with `{scene}` and `{views}` for what they belong to, such as
    `lists/{scene}/train_test_split_{views}.json` (ReconFusion); instead of the rule."""
    image_folder: str | None = None
    """Folder of photographs inside every scene, such as `images_4`."""
    redo: tuple[str, ...] = ()
    """Methods whose cells are run again although they are done, for example after training another prior."""
    jobs: int | None = None
    """Cells at once, each with its share of the cores; by default one for each core, which wastes the least."""


@dataclass(frozen=True)
class Cell:
    """One training and its evaluation."""

    data: Path
    views: int
    seed: int
    method: str

    @property
    def scene(self) -> str:
        return self.data.name

    @property
    def place(self) -> str:
        """Folder of all cells of the same scene, views and seed."""
        return f"{self.scene}/k{self.views:02d}_s{self.seed}"

    @property
    def key(self) -> tuple[Any, ...]:
        return self.scene, self.views, self.seed, self.method


@dataclass(frozen=True)
class CellSettings:
    """What all cells share."""

    output: Path
    scale: Scale
    prior: str
    protocol: Protocol = Protocol()


Runner = Callable[[Cell, CellSettings], dict[str, Any]]
StageRunner = Callable[[Cell, CellSettings], None]


def run_benchmark(benchmark: Benchmark) -> Results:
    """Run what is missing and write results, tables and pictures.

    Returns:
        All results in the output folder.

    Raises:
        FileNotFoundError: if a scene's folder is missing.
        ValueError: for an unknown method, ambiguous scene names, or an output folder of other settings.
        RuntimeError: if cells failed; all others are kept, and repeating the command tries the failed ones again.
    """
    cells = plan_cells(benchmark)
    scale = _scale(benchmark)
    results = load_results(benchmark.output, _settings(benchmark, scale))
    _refuse_other_data(cells, results)
    results.drop({cell.key for cell in cells if cell.method in benchmark.redo})
    save_results(results, benchmark.output)  # so that other settings are refused from the first cell on
    missing = [cell for cell in cells if not results.has(cell.key)]
    CONSOLE.print(f"{len(cells)} cells, {len(cells) - len(missing)} of them done already.")
    _run(missing, results, CellSettings(benchmark.output, scale, benchmark.prior, _protocol(benchmark)), benchmark.jobs)
    _write(results, benchmark.output)
    if results.failures:
        first = results.failures[0]
        raise RuntimeError(
            f"{len(results.failures)} of {len(missing)} cells failed; the first, {first['cell']}: {first['error']}. "
            "Repeat the command to try them again."
        )
    CONSOLE.print(f"Results: {benchmark.output / 'results.json'}, tables: {benchmark.output / TABLE_FILE}")
    return results


def plan_cells(benchmark: Benchmark) -> list[Cell]:
    """All cells of a benchmark, those of one place together.

    Raises:
        FileNotFoundError: if a scene's folder or its list of views is missing.
        ValueError: for an unknown method, no scene, or scenes of the same name.
    """
    unknown = [method for method in (*benchmark.methods, *benchmark.redo) if method not in METHODS]
    if unknown:
        raise ValueError(f"unknown methods {unknown}; there are {', '.join(METHODS)}.")
    scenes = scene_folders(benchmark.data)
    for data, views in itertools.product(scenes, benchmark.views):
        split_file = _protocol(benchmark).split_file(data.name, views)
        if split_file is not None and not split_file.is_file():
            raise FileNotFoundError(f"there is no list of views at {split_file}.")
    methods = [method for method in METHODS if method in benchmark.methods]
    return [
        Cell(data, views, seed, method)
        for seed, views, data, method in itertools.product(benchmark.seeds, benchmark.views, scenes, methods)
    ]


def _refuse_other_data(cells: Sequence[Cell], results: Results) -> None:
    """Scenes are told apart by the names of their folders, within one command and from one to the next."""
    where = {cell.scene: str(cell.data) for cell in cells}
    for entry in results.cells:
        before, now = entry.get("data"), where.get(entry["scene"])
        if before is not None and now is not None and os.path.abspath(before) != now:
            raise ValueError(
                f"the results hold cells of a scene {entry['scene']!r} at {before}, which is now to be read from {now}. "
                "Choose another `--output`, or rename one of the folders."
            )


def _scale(benchmark: Benchmark) -> Scale:
    preset = PRESETS[benchmark.preset]
    return Scale(benchmark.steps or preset.steps, benchmark.max_image_size or preset.max_image_size)


def _protocol(benchmark: Benchmark) -> Protocol:
    return Protocol(benchmark.split_rule, benchmark.split_files, benchmark.image_folder)


def _settings(benchmark: Benchmark, scale: Scale) -> dict[str, Any]:
    return {
        "preset": benchmark.preset,
        "steps": scale.steps,
        "max_image_size": scale.max_image_size,
        "prior": benchmark.prior,
        **_protocol(benchmark).unusual,
    }


def _run(cells: Sequence[Cell], results: Results, settings: CellSettings, jobs: int | None) -> None:
    workers, threads = workers_and_threads(jobs)
    by_job = {_job_key(cell): cell for cell in cells}
    commit = code_version()
    results.failures = []
    begin_s, done = time.monotonic(), 0
    with _progress(len(cells)) as advance:
        for result in run_jobs(plan_jobs(cells, settings), workers, threads, PRELOAD):
            cell = by_job.get(result.key)
            if cell is None:
                if result.error:
                    CONSOLE.print(f"{result.key}: FAILED: {result.error}", markup=False)
                continue
            done += 1
            advance()
            told = {"commit": commit, "jobs": workers, "threads": threads, "data": str(cell.data)}
            _keep(cell, result, results, settings.output, told)
            left_min = (time.monotonic() - begin_s) / done * (len(cells) - done) / 60
            CONSOLE.print(f"[{done}/{len(cells)}] {_say(cell, result)}, about {left_min:.0f} min left", markup=False)


def plan_jobs(cells: Sequence[Cell], settings: CellSettings) -> list[Job]:
    """Jobs of the cells; before the first of those that share a first stage comes the job that trains it."""
    jobs: list[Job] = []
    for cell in cells:
        stage = None
        if METHODS[cell.method].shares_first_stage:
            stage = f"{cell.place}/first-stage"
            if all(job.key != stage for job in jobs):
                log = settings.output / "logs" / cell.place / "first-stage.txt"
                jobs.append(Job(stage, _first_stage, (cell, settings), log=log))
        log = settings.output / "logs" / cell.place / f"{cell.method}.txt"
        jobs.append(Job(_job_key(cell), _cell, (cell, settings), after=stage, log=log))
    return jobs


def _first_stage(cell: Cell, settings: CellSettings) -> None:
    from nerfstudio_enhancer.evaluation.cell import train_first_stage

    train_first_stage(cell, settings)


def _cell(cell: Cell, settings: CellSettings) -> dict[str, Any]:
    from nerfstudio_enhancer.evaluation.cell import run_cell

    return run_cell(cell, settings)


def _job_key(cell: Cell) -> str:
    return f"{cell.place}/{cell.method}"


def _keep(cell: Cell, result: JobResult, results: Results, output: Path, common: dict[str, Any]) -> None:
    if result.error is not None:
        results.failures.append({"cell": _job_key(cell), "error": result.error})
    else:
        peak = max(result.peak_rss_mb, result.value.pop("first_stage_peak_rss_mb", 0.0))
        results.add({**result.value, "peak_rss_mb": round(peak, 1), **common})
    _write(results, output)
    _write_sheet(cell, results, output)


def _write(results: Results, output: Path) -> None:
    save_results(results, output)
    (output / TABLE_FILE).write_text(benchmark_tables(results.cells, results.settings), encoding="utf-8")


def _write_sheet(cell: Cell, results: Results, output: Path) -> None:
    """The side-by-side picture of a place, as far as it has come."""
    from nerfstudio_enhancer.evaluation.sheets import write_comparison

    here = {
        entry["method"]: entry
        for entry in results.cells
        if (entry["scene"], entry["views"], entry["seed"]) == cell.key[:3]
    }
    renders = {method: output / here[method]["renders"] for method in METHODS if method in here}
    renders = {method: folder for method, folder in renders.items() if folder.is_dir()}  # others were deleted since
    if renders:
        write_comparison(renders, output / SHEETS_FOLDER / f"{cell.place.replace('/', '_')}.png")


def _say(cell: Cell, result: JobResult) -> str:
    if result.error is not None:
        return f"{_job_key(cell)}: FAILED: {result.error}"
    value = result.value
    return (
        f"{_job_key(cell)}: PSNR {value['psnr']:.2f}, SSIM {value['ssim']:.3f}, LPIPS {value['lpips']:.3f}; "
        f"{result.wall_s:.0f} s"
    )


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("benchmark"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=CONSOLE, transient=True, disable=not CONSOLE.is_terminal) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def code_version() -> str:
    """Commit of this package's working tree (with `+changes` where files differ), else the installed version."""
    from importlib.metadata import PackageNotFoundError, version

    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        if git("ls-files", Path(__file__).name):
            changed = git("status", "--porcelain", "--untracked-files=no")
            return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    try:
        return version("nerfstudio-enhancer")
    except PackageNotFoundError:
        return "unknown"
