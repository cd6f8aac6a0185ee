"""Splats trained on all photographs of a scene, and their depth at each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from torch import Tensor

from diffusion_prior.files import whole_file
from nerfstudio_enhancer.datamanager import EnhancerDataManager
from nerfstudio_enhancer.evaluation.cell import set_seed
from nerfstudio_enhancer.evaluation.methods import (
    datamanager_of,
    dataparser_of,
    method_config,
    set_prior,
    with_seed_points,
    with_settings,
)
from nerfstudio_enhancer.model import EnhancerModel
from nerfstudio_enhancer.pairs.sparse_splats import train_steps
from nerfstudio_enhancer.rendering import render_clip
from nerfstudio_enhancer.scene.capture import read_capture
from nerfstudio_enhancer.schedule import fit_schedule

SETTINGS = {
    "opacity_decay": 1.0,
    "gaussian_dropout": 0.0,
    "depth_smoothness": 0.05,
    "ray_spread": 0.03,
    "lpips_weight": 0.0,
}
"""Many views keep splats in place; only their rays are drawn to one surface, so that expected depth is the surface's."""


@dataclass(frozen=True)
class WholeScene:
    """One scene whose splats are to be trained on all photographs."""

    data: Path
    output: Path
    """What is stored of them."""
    max_views: int
    steps: int
    size: int | None
    """Longest side of the photographs in pixels; None keeps them as they are."""
    seed: int


def train_on_all(scene: WholeScene, names: Sequence[str] | None = None) -> Trainer:
    """Train splats on as many of a scene's photographs as are asked for, all but one at most; or on those named."""
    config = _config(scene)
    if names is not None:
        dataparser_of(config).reference_views = tuple(names)
    set_seed(scene.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    train_steps(trainer, 0, scene.steps)
    return trainer


def store_views(scene: WholeScene) -> None:
    """Train splats and store, for each of their photographs, colours, depth, opacity and camera.

    The file holds a list with one dictionary a view: `rgb` uint8 [h w 3], `depth` [h w] along the optical axis, `alpha`
    uint8 [h w], `camera_to_world` [3 4] (OpenGL axes), `intrinsics` (fx, fy, cx, cy in pixels).
    """
    trainer = train_on_all(scene)
    model = cast(EnhancerModel, trainer.pipeline.model)
    datamanager = cast(EnhancerDataManager, trainer.pipeline.datamanager)
    views = []
    for index, item in enumerate(datamanager.cached_train):
        camera = datamanager.train_dataset.cameras[index : index + 1]
        clip = render_clip(model, camera.to(model.device))
        views.append(
            {
                "rgb": _as_uint8(item["image"][..., :3]),
                "depth": clip.depth[0, ..., 0].float().cpu(),
                "alpha": _as_uint8(clip.alpha[0, ..., 0]),
                "camera_to_world": camera.camera_to_worlds.reshape(3, 4).float(),
                "intrinsics": torch.tensor([float(value) for value in (camera.fx, camera.fy, camera.cx, camera.cy)]),
            }
        )
    with whole_file(scene.output) as partial:
        torch.save(views, partial)


def _config(scene: WholeScene) -> TrainerConfig:
    config = method_config()
    set_prior(config, "none")
    fit_schedule(config, scene.steps)
    # Many views need no stereo, whose mistakes must not become the truth.
    with_seed_points(config, "triangulated", depth_network=False)
    with_settings(config, {**SETTINGS, "few_views": scene.max_views})
    config.machine.seed = scene.seed
    config.data = scene.data
    datamanager, dataparser = datamanager_of(config), dataparser_of(config)
    datamanager.data = scene.data
    datamanager.max_image_size = scene.size
    frames = read_capture(scene.data).frames
    # One photograph at least stays out: the dataparser wants a test view.
    count = min(scene.max_views, len(frames) - 1)
    chosen = np.linspace(0, len(frames) - 1, count + 1).round().astype(int)[:-1]
    dataparser.reference_views = tuple(frames[i].name for i in chosen)
    dataparser.seed = scene.seed
    return config


def _as_uint8(image: Tensor) -> Tensor:
    image = image.detach().cpu()
    return image if image.dtype == torch.uint8 else (image.clamp(0, 1) * 255).round().to(torch.uint8)
