"""One cell of the benchmark: nerfstudio's training, then nerfstudio's evaluation of its checkpoint."""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from nerfstudio.engine.trainer import Trainer, TrainerConfig

from nerfstudio_enhancer.enhanced_views import META_FILE
from nerfstudio_enhancer.evaluation.benchmark import code_version
from nerfstudio_enhancer.evaluation.methods import (
    METHODS,
    datamanager_of,
    dataparser_of,
    method_config,
    model_of,
    set_prior,
    with_additions,
    with_seed_points,
    with_settings,
)
from nerfstudio_enhancer.initial_splats import share_with_depth
from nerfstudio_enhancer.jobs import peak_rss_mb
from nerfstudio_enhancer.names import FLICKER, RENDER_FLICKER, REPAIRED
from nerfstudio_enhancer.rendering import render_clip
from nerfstudio_enhancer.rounds import VIEWS_FOLDER, references_of
from nerfstudio_enhancer.scene.sparse_views import STEREO_DEPTH
from nerfstudio_enhancer.schedule import fit_schedule, own_length
from nerfstudio_enhancer.trainer import count_references, read_references
from nerfstudio_enhancer.warping import WarpSources, seen_share

if TYPE_CHECKING:
    from nerfstudio_enhancer.datamanager import EnhancerDataManager
    from nerfstudio_enhancer.evaluation.benchmark import Cell, CellSettings
    from nerfstudio_enhancer.model import EnhancerModel
    from nerfstudio_enhancer.pipeline import EnhancerPipeline

RUNS_FOLDER = "runs"
FIRST_STAGE = "first-stage"
STAGE_FILE = "stage.json"
RENDERS_FOLDER = "renders"


def cell_config(cell: Cell, settings: CellSettings) -> TrainerConfig:
    """Settings of a cell's whole training, as `ns-train 3dgs-enhancer` with flags would have them."""
    method = METHODS[cell.method]
    config = method_config()
    set_prior(config, settings.prior if method.feed == "enhanced" else "none", method.feed or "enhanced")
    with_additions(config, method.additions)
    with_settings(config, method.settings)
    with_seed_points(config, method.seed_points, method.depth_network)
    datamanager, dataparser = datamanager_of(config), dataparser_of(config)
    config.data = datamanager.data = cell.data
    dataparser.split_rule = settings.protocol.split_rule
    dataparser.split_file = settings.protocol.split_file(cell.scene, cell.views)
    dataparser.image_folder = settings.protocol.image_folder
    dataparser.num_views = cell.views if dataparser.split_file is None else None
    dataparser.seed = cell.seed
    config.machine.seed = cell.seed
    if settings.scale.max_image_size is not None:
        datamanager.max_image_size = settings.scale.max_image_size
    fit_schedule(config, settings.scale.steps or own_length(config, count_references(read_references(config))))
    config.output_dir = settings.output / RUNS_FOLDER
    config.experiment_name = cell.place
    config.timestamp = cell.method
    # Only the last checkpoint is measured, by the evaluation after the training.
    config.steps_per_save = config.max_num_iterations
    config.steps_per_eval_image = config.steps_per_eval_batch = config.steps_per_eval_all_images = 0
    return config


def train_first_stage(cell: Cell, settings: CellSettings) -> None:
    """Train up to the step before the first round, once for all methods that differ only from there on.

    What was trained with other settings is trained anew.
    """
    config = _first_stage_config(cell, settings)
    marker = config.get_base_dir() / STAGE_FILE
    made_of = {"data": str(cell.data), **asdict(settings.scale), "start": config.max_num_iterations}
    made_of |= settings.protocol.unusual
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")).get("made_of") == made_of:
        return
    trainer, wall_s = _train(config)
    told = {
        "wall_s": wall_s,
        "peak_rss_mb": peak_rss_mb(),
        "depth_share": _depth_share(trainer),
        "commit": code_version(),
        "made_of": made_of,
    }
    marker.write_text(json.dumps(told), encoding="utf-8")


def run_cell(cell: Cell, settings: CellSettings) -> dict[str, Any]:
    """Train and measure one cell.

    Returns:
        The cell's entry in the results, without the memory and commit that the caller knows.
    """
    config = cell_config(cell, settings)
    steps = config.max_num_iterations
    stage = None
    if METHODS[cell.method].shares_first_stage:
        before = _first_stage_config(cell, settings)
        stage = json.loads((before.get_base_dir() / STAGE_FILE).read_text(encoding="utf-8"))
        config.load_dir = before.get_checkpoint_dir()
        # Nerfstudio counts the steps of a resumed training from its checkpoint.
        config.max_num_iterations = steps - before.max_num_iterations
    trainer, own_s = _train(config)
    before_s, before_mb = (0.0, 0.0) if stage is None else (stage["wall_s"], stage["peak_rss_mb"])
    return {
        "scene": cell.scene,
        "views": cell.views,
        "seed": cell.seed,
        "method": cell.method,
        **evaluate(trainer),
        "wall_s": round(before_s + own_s, 2),
        "first_stage_s": round(before_s, 2),
        **({} if stage is None else {"first_stage_commit": stage["commit"]}),
        "first_stage_peak_rss_mb": before_mb,
        "steps": steps,
        "config": _relative(config.get_base_dir() / "config.yml", settings.output),
        "renders": _relative(config.get_base_dir() / RENDERS_FOLDER, settings.output),
        "depth_share": _depth_share(trainer) if stage is None else stage["depth_share"],
        **_flicker(trainer),
    }


def evaluate(trainer: Trainer) -> dict[str, Any]:
    """What `ns-eval` does, on the scene that is in memory already: load the checkpoint, render and measure the test views.

    Returns:
        Means of psnr, ssim and lpips over the test views, of the splats and (`repaired_*`) of their repaired renders where
        there are such, their number, the share of their pixels that references see, the seconds it took and the number of splats.
    """
    begin_s = time.monotonic()
    (checkpoint,) = trainer.checkpoint_dir.glob("*.ckpt")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    pipeline = cast("EnhancerPipeline", trainer.pipeline)
    pipeline.fade_haze()
    pipeline.load_pipeline(state["pipeline"], state["step"])
    renders = trainer.base_dir / RENDERS_FOLDER
    with torch.no_grad():
        metrics = pipeline.get_average_eval_image_metrics(output_path=renders)
        seen = _seen_share(trainer)
    return {
        "psnr": metrics["psnr"],
        "ssim": metrics["ssim"],
        "lpips": metrics["lpips"],
        **{name: value for name, value in metrics.items() if name.startswith(f"{REPAIRED}_")},
        "test_views": len(list(renders.glob("*_img_*.png"))),
        "splats": state["pipeline"]["_model.gauss_params.means"].shape[0],
        "seen_share": seen,
        "eval_s": round(time.monotonic() - begin_s, 2),
    }


def _seen_share(trainer: Trainer) -> float:
    """Share of the test views' pixels that references see through the depth that the splats show there."""
    model, datamanager = trainer.pipeline.model, cast("EnhancerDataManager", trainer.pipeline.datamanager)
    references = references_of(datamanager.train_dataset, datamanager.cached_train)
    sources = WarpSources.of(cast("EnhancerModel", model), references)
    shares = []
    for camera, _ in datamanager.fixed_indices_eval_dataloader:
        rendered = render_clip(cast("EnhancerModel", model), camera)
        shares.append(seen_share(rendered.depth, rendered.alpha, camera, sources))
    return float(np.mean(shares))


def _flicker(trainer: Trainer) -> dict[str, float]:
    """How much the frames of the last round, and their renders, differ from frame to frame; empty without such a round."""
    files = sorted((trainer.base_dir / VIEWS_FOLDER).glob(f"*/{META_FILE}"))
    told = json.loads(files[-1].read_text(encoding="utf-8")) if files else {}
    return {key: told[key] for key in (FLICKER, RENDER_FLICKER) if key in told}


def _depth_share(trainer: Trainer) -> float:
    """Share of the references' pixels with trusted stereo depth; 0 without stereo."""
    outputs = cast("EnhancerDataManager", trainer.pipeline.datamanager).train_dataparser_outputs
    depths = outputs.metadata.get(STEREO_DEPTH, ())
    return share_with_depth(depths) if depths else 0.0


def set_seed(seed: int) -> None:
    """Seed the global generators as `ns-train` does."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _first_stage_config(cell: Cell, settings: CellSettings) -> TrainerConfig:
    config = cell_config(cell, settings)
    set_prior(config, "none")
    config.timestamp = FIRST_STAGE
    start = model_of(config).enhance.start
    assert start is not None  # decided with the schedule
    config.max_num_iterations = start
    return config


def _train(config: TrainerConfig) -> tuple[Trainer, float]:
    """Train as `ns-train` does; what an interrupted attempt left in the run's folder is removed first.

    Returns:
        The trainer, and the seconds from reading the scene to the last checkpoint.
    """
    shutil.rmtree(config.get_base_dir(), ignore_errors=True)
    config.save_config()
    if config.load_dir is not None and model_of(config).depth_weight == 0:
        # The splats come from a checkpoint: seed points would only be searched to be thrown away.
        with_seed_points(config, "none")
    begin_s = time.monotonic()
    set_seed(config.machine.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    _refuse_seen_test_views(trainer)
    trainer.train()
    return trainer, time.monotonic() - begin_s


def _refuse_seen_test_views(trainer: Trainer) -> None:
    """Refuse a cell in which nothing is held out: its figures would count as those of novel views.

    Raises:
        ValueError: test views are trained on.
    """
    datamanager = cast("EnhancerDataManager", trainer.pipeline.datamanager)
    seen = set(datamanager.train_dataset.image_filenames) & set(datamanager.eval_dataset.image_filenames)
    if seen:
        raise ValueError(
            f"a benchmark measures on photographs that are not trained on, but there are none beside the "
            f"{len(datamanager.train_dataset)} references; ask for fewer `--views`, or leave this scene out."
        )


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
