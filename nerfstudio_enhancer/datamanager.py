"""Batches from reference photographs and, once a round has run, from enhanced views at a set ratio."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datamanagers.full_images_datamanager import FullImageDatamanager, FullImageDatamanagerConfig
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset

from nerfstudio_enhancer.enhanced_views import EnhancedViewStore
from nerfstudio_enhancer.random_state import step_generator
from nerfstudio_enhancer.scene.sparse_views import STEREO_DEPTH, SparseViewsDataParserConfig

KNOWN_DEPTH = "known_depth"
"""Key of a batch under which what is known of the depth of its reference lies."""


@dataclass
class EnhancerDataManagerConfig(FullImageDatamanagerConfig):
    """Settings of the data manager."""

    _target: type = field(default_factory=lambda: EnhancerDataManager)
    max_image_size: int | None = None
    """Longest image side in pixels that training and evaluation use; larger photographs are reduced in memory. None keeps
    them as they are read (times `camera_res_scale_factor`), see the dataparser's `image_folder`; a round then takes 3 to 4 GB of the GPU's memory a megapixel."""


class EnhancerDataManager(FullImageDatamanager[InputDataset]):
    """Full-image data manager whose draws depend on seed and step alone, so that a resumed run draws the same batches."""

    config: EnhancerDataManagerConfig  # pyright: ignore[reportIncompatibleVariableOverride]  # as nerfstudio's own do

    def __init__(
        self,
        config: EnhancerDataManagerConfig,
        device: torch.device | str = "cpu",
        test_mode: Literal["test", "val", "inference"] = "val",
        **kwargs,
    ) -> None:
        if config.train_cameras_sampling_strategy != "random":
            raise ValueError(
                "`--pipeline.datamanager.train-cameras-sampling-strategy` must be random, got "
                f"{config.train_cameras_sampling_strategy}: which photograph a step takes follows from seed and step alone, so "
                "that a resumed run takes the same."
            )
        self._held_out: DataparserOutputs | None = None
        if isinstance(config.dataparser, SparseViewsDataParserConfig):
            if test_mode == "test":
                # The splats come from a checkpoint: seed points would be searched only to be thrown away.
                config = replace(config, dataparser=replace(config.dataparser, seed_points="none"))
            elif test_mode == "val":
                # What is wrong with a held-out photograph is told before seed points are searched, which can take minutes.
                parser = (
                    config.dataparser if config.data is None else replace(config.dataparser, data=Path(config.data))
                )
                self._held_out = parser.setup().get_dataparser_outputs(split="val")
        self.enhanced_views: EnhancedViewStore | None = None
        self.enhanced_ratio = 0.0
        self.seed = 0
        self.gives_depth = True  # batches carry `KNOWN_DEPTH`
        self._depth_at_reference: dict[int, torch.Tensor] = {}
        super().__init__(config=config, device=device, test_mode=test_mode, **kwargs)

    def create_train_dataset(self) -> InputDataset:
        """The reference photographs, reduced to `max_image_size`."""
        return InputDataset(self.train_dataparser_outputs, self._scale_factor(self.train_dataparser_outputs.cameras))

    def create_eval_dataset(self) -> InputDataset:
        """The held-out photographs, at the same scale."""
        outputs = self._held_out or self.dataparser.get_dataparser_outputs(split=self.test_split)
        return InputDataset(outputs, self._scale_factor(self.train_dataparser_outputs.cameras, outputs.cameras))

    def unused_views(self) -> InputDataset:
        """Views that are neither reference nor test. Only the oracle of the benchmark may ask for them."""
        outputs = self.dataparser.get_dataparser_outputs(split="unused")
        return InputDataset(outputs, self._scale_factor(self.train_dataparser_outputs.cameras, outputs.cameras))

    def next_train(self, step: int) -> tuple[Cameras, dict]:
        """A reference photograph or, with probability `enhanced_ratio` times their share, an enhanced view."""
        generator = step_generator(self.seed, step, "batch")
        enhanced = self.enhanced_views
        ratio = 0.0 if enhanced is None else self.enhanced_ratio * enhanced.share
        if enhanced is not None and torch.rand((), generator=generator) < ratio:
            return enhanced.draw(generator, self.device)
        index = self._reference_index(step)
        self.train_unseen_cameras = [index]
        camera, batch = super().next_train(step)
        depth = self._known_depth(index)
        if depth is not None:
            batch[KNOWN_DEPTH] = depth
        return camera, batch

    def _known_depth(self, index: int) -> torch.Tensor | None:
        """Depth of a reference at its training camera and its certainty [h w 2]; None without stereo or where nobody asks."""
        depths = self.train_dataparser_outputs.metadata.get(STEREO_DEPTH, ())
        if not depths or not self.gives_depth:
            return None
        if index not in self._depth_at_reference:
            from nerfstudio_enhancer.stereo.seeds import known_depth

            depth = known_depth(depths[index], self.train_cameras[index : index + 1])
            self._depth_at_reference[index] = depth.to(self.device)
        return self._depth_at_reference[index]

    def reference_photographs(self) -> tuple[InputDataset, list[dict]]:
        """The references as a training reads them, also where nerfstudio opens no photograph (`inference`)."""
        if self.test_mode != "inference":
            return self.train_dataset, self.cached_train
        config = self.dataparser_config
        if isinstance(config, SparseViewsDataParserConfig):
            config = replace(config, seed_points="none")
        outputs = config.setup().get_dataparser_outputs(split="train")
        dataset = InputDataset(outputs, self._scale_factor(outputs.cameras))
        return dataset, self.load_images(dataset)

    def _load_images(self, split: Literal["train", "eval"], cache_images_device: Literal["cpu", "gpu"]) -> list[dict]:
        # Nerfstudio pins what stays on the CPU for a GPU, also where there is none.
        on_cpu = torch.device(self.device).type == "cpu"
        return super()._load_images(split, "gpu" if on_cpu else cache_images_device)

    def load_images(self, dataset: InputDataset) -> list[dict]:
        """Read and undistort a dataset's photographs as nerfstudio does for training; updates its cameras in place."""
        kept, self.train_dataset = self.train_dataset, dataset
        kept_cameras = self.train_cameras if hasattr(self, "train_cameras") else None
        try:
            return self._load_images("train", cache_images_device="gpu")
        finally:
            self.train_dataset = kept
            if kept_cameras is not None:
                self.train_cameras = kept_cameras

    def _reference_index(self, step: int) -> int:
        """Every reference once per epoch in an order drawn from seed and epoch."""
        count = len(self.train_dataset)
        epoch, position = divmod(step, count)
        return int(torch.randperm(count, generator=step_generator(self.seed, epoch, "epoch"))[position])

    def _scale_factor(self, reference_cameras: Cameras, cameras: Cameras | None = None) -> float:
        """Scale that brings the longest side of the references to `max_image_size`."""
        cameras = reference_cameras if cameras is None else cameras
        factor = self.config.camera_res_scale_factor
        longest = max(int(reference_cameras.width.max()), int(reference_cameras.height.max())) * factor
        limit = self.config.max_image_size
        if limit is not None and longest > limit:
            factor *= limit / longest
        sides = torch.cat([cameras.width.flatten(), cameras.height.flatten()]).unique()
        return _factor_with_one_rounding(factor, sides)


def _factor_with_one_rounding(factor: float, sides: torch.Tensor) -> float:
    """The next larger factor with which image (float64) and camera (float32) sizes are truncated to the same integers."""
    for _ in range(1000):
        exact = [int(int(side) * factor) for side in sides]
        if exact == (sides * factor).to(torch.int64).tolist() and all(
            abs(int(side) * factor - round(int(side) * factor)) > 1e-4 or factor == 1.0 for side in sides
        ):
            return factor
        factor *= 1 + 1e-6
    return factor
