"""A training that is measured on held-out views as it goes on."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from nerfstudio.engine.trainer import Trainer

from nerfstudio_enhancer.evaluation.cell import set_seed
from nerfstudio_enhancer.evaluation.leave_one_out import LEFT_OUT, TEST, Fold, write_split
from nerfstudio_enhancer.evaluation.methods import datamanager_of, dataparser_of, method_config, set_prior
from nerfstudio_enhancer.evaluation.tables import FIGURES
from nerfstudio_enhancer.scene.sparse_views import PHOTOGRAPH_NAMES
from nerfstudio_enhancer.schedule import fit_schedule
from nerfstudio_enhancer.trainer import EnhancerTrainer


class MeasuredTrainer(EnhancerTrainer):
    """Calls back where nerfstudio evaluates, after the given numbers of steps, and keeps no checkpoint."""

    measured_after: Sequence[int] = ()
    on_measure: Callable[[int], None]

    def eval_iteration(self, step: int) -> None:
        """Nerfstudio calls this after every step, counted from 0."""
        if step + 1 in self.measured_after:
            self.on_measure(step + 1)

    def save_checkpoint(self, step: int) -> None:
        """Nothing: only the figures are kept."""


def check_steps(steps: int, checks: int) -> list[int]:
    """Numbers of steps after which a training is measured, the last one its whole length."""
    return sorted({max(1, round(steps * (i + 1) / checks)) for i in range(checks)})


def measured_training(fold: Fold) -> list[dict[str, Any]]:
    """Train without prior and measure along the way.

    Returns:
        For every check its step, and psnr, ssim and lpips of the reference left out and of the test views, if there are any.
    """
    config = method_config()
    fit_schedule(config, fold.steps)
    set_prior(config, "none")
    config._target = MeasuredTrainer
    datamanager, dataparser = datamanager_of(config), dataparser_of(config)
    config.data = datamanager.data = fold.data
    dataparser.split_file, dataparser.seed, config.machine.seed = write_split(fold), fold.seed, fold.seed
    if fold.max_image_size is not None:
        datamanager.max_image_size = fold.max_image_size
    config.output_dir = fold.folder
    config.experiment_name = config.timestamp = "run"
    shutil.rmtree(config.get_base_dir(), ignore_errors=True)
    set_seed(fold.seed)
    trainer = cast(MeasuredTrainer, config.setup(local_rank=0, world_size=1))
    trainer.setup()
    curve: list[dict[str, Any]] = []
    trainer.measured_after = check_steps(fold.steps, fold.checks)
    trainer.on_measure = lambda steps: curve.append({"step": steps, **_measure(trainer, fold)})
    trainer.train()
    return curve


@torch.no_grad()
def _measure(trainer: Trainer, fold: Fold) -> dict[str, dict[str, float]]:
    """Means of the figures over the reference left out and over the test views; the generators stay as they are."""
    pipeline = trainer.pipeline
    datamanager = cast(Any, pipeline.datamanager)
    names = datamanager.eval_dataset.metadata[PHOTOGRAPH_NAMES]
    found: dict[str, list[dict]] = {}
    random_state = torch.get_rng_state()
    pipeline.eval()
    for camera, batch in datamanager.fixed_indices_eval_dataloader:
        group = LEFT_OUT if names[int(batch["image_idx"])] == fold.left_out else TEST
        outputs = pipeline.model.get_outputs_for_camera(camera=camera)
        found.setdefault(group, []).append(pipeline.model.get_image_metrics_and_images(outputs, batch)[0])
    pipeline.train()
    torch.set_rng_state(random_state)
    return {
        group: {figure: float(np.mean([float(image[figure]) for image in images])) for figure in FIGURES}
        for group, images in found.items()
    }
