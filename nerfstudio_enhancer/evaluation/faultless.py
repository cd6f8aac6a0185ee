"""The ceiling of any prior on the paths of a run: what splats of all photographs but the test views show there."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from nerfstudio_enhancer.depth_training.whole_splats import WholeScene, train_on_all
from nerfstudio_enhancer.pairs.path_runs import World, read_whole_splats, store_whole_splats
from nerfstudio_enhancer.rendering import render_clip
from nerfstudio_enhancer.scene.capture import read_capture
from nerfstudio_enhancer.scene.sparse_views import PHOTOGRAPH_NAMES
from nerfstudio_enhancer.schedule import whole_length

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import Trainer

    from nerfstudio_enhancer.datamanager import EnhancerDataManager

SPLATS_FILE = "whole_splats_{steps}_{size}.ckpt"
"""Beside the run's folder, so that runs of the same references, length and size share it."""
STEPS_PER_STEP = 2.4
"""Training steps of these splats for each one of the run: many photographs take longer."""


class FaultlessFrames:
    """Frames as splats of references and unused views show them."""

    def __init__(self, trainer: Trainer) -> None:
        """Read these splats, or train them first.

        Args:
            trainer: of the run; its references and unused views are what the splats learn from, never its test views.
        """
        datamanager = cast("EnhancerDataManager", trainer.pipeline.datamanager)
        steps, size = round(STEPS_PER_STEP * whole_length(trainer)), datamanager.config.max_image_size
        path = Path(trainer.base_dir).parent / SPLATS_FILE.format(steps=steps, size=size or "full")
        if not path.is_file():
            known = (datamanager.train_dataset.metadata, datamanager.unused_views().metadata)
            data = Path(cast(Path, trainer.config.data or datamanager.config.data))
            names = names_in_capture(data, {name for metadata in known for name in metadata[PHOTOGRAPH_NAMES]})
            scene = WholeScene(data, path, len(names), steps, size, seed=0)
            with torch.random.fork_rng():  # the run goes on as if nothing had been trained beside it
                store_whole_splats(train_on_all(scene, names), path)
        self._whole = read_whole_splats(path, trainer)
        self._world = World.of(trainer)

    def __call__(self, cameras: Cameras) -> Float[Tensor, "t h w 3"]:
        """What they show at cameras of the run's world; sRGB in [0, 1]."""
        there = cameras[:]
        poses = self._whole.world.poses_from(self._world, cameras.camera_to_worlds)
        there.camera_to_worlds = poses.to(cameras.camera_to_worlds)
        return render_clip(self._whole.model, there.to(self._whole.model.device)).rgb


def names_in_capture(data: Path, wanted: Set[str]) -> tuple[str, ...]:
    """Names of photographs in the order of their capture."""
    return tuple(frame.name for frame in read_capture(data).frames if frame.name in wanted)
