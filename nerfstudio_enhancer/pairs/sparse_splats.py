"""Train sparse splats with the method's own model and render them at the cameras that were left out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.engine.callbacks import TrainingCallbackLocation
from nerfstudio.engine.trainer import Trainer, TrainerConfig
from torch import Tensor

from diffusion_prior.conditioning import normalised_disparity
from diffusion_prior.data.pairs import PairRun, run_folder, write_run
from nerfstudio_enhancer.contact_sheet import write_sheet
from nerfstudio_enhancer.conventions import to_channels_first, to_channels_last
from nerfstudio_enhancer.datamanager import EnhancerDataManager
from nerfstudio_enhancer.evaluation.cell import set_seed
from nerfstudio_enhancer.evaluation.methods import (
    datamanager_of,
    dataparser_of,
    method_config,
    set_prior,
    with_additions,
    with_seed_points,
)
from nerfstudio_enhancer.model import EnhancerModel
from nerfstudio_enhancer.pairs.make_pairs import SplatTraining, missing_kinds
from nerfstudio_enhancer.rendering import RenderedClip, render_clip
from nerfstudio_enhancer.scene.capture import Frame, natural_key, read_capture
from nerfstudio_enhancer.schedule import fit_schedule
from nerfstudio_enhancer.warping import WarpSources, warp_references

ASPECT_TOLERANCE = 0.02
"""Largest relative difference of aspect ratio at which a picture is resized to the run's size instead of left out."""
STEPS_OF_WHOLE_TRAINING = 1.5
"""The last run of a training is what a round would see: with the method's schedule it comes after two thirds."""
SHEET_ROWS = 5
"""Frames shown on a contact sheet."""


def make_runs(training: SplatTraining, steps: Sequence[int]) -> int:
    """Train once and store the runs that are missing after each of the numbers of steps.

    Returns:
        Number of runs stored.

    Raises:
        ValueError: if no left-out photograph has the references' shape.
    """
    from nerfstudio_enhancer.pairs.path_runs import PathRuns, ensure_whole_splats  # it builds upon this module

    config = _trainer_config(training)
    whole = ensure_whole_splats(training) if training.paths else None
    set_seed(config.machine.seed)
    trainer = config.setup(local_rank=0, world_size=1)
    trainer.setup()
    views = LeftOutViews.read(trainer.pipeline.datamanager)
    paths = None if whole is None else PathRuns(training, trainer, views, whole)
    begin = count = 0
    for end in sorted(steps):
        train_steps(trainer, begin, end)
        begin = end
        for kind in missing_kinds(training, end):
            if paths is None or kind == "photographs":
                run = _render_run(trainer, training, views, end)
            else:
                run = paths.paths(end) if kind == "paths" else paths.degraded(end)
            folder = run_folder(training.output, training.scene, training.num_views, training.seed, end, kind)
            write_run(folder, run)
            save_contact_sheet(run, folder / "contact_sheet.png")
            count += 1
    return count


class PairsDataManager(EnhancerDataManager):
    """References for training as always; the pictures for evaluation are the left-out ones that are to be stored."""

    def __init__(self, *args, max_frames: int, **kwargs) -> None:
        self.max_frames = max_frames
        super().__init__(*args, **kwargs)

    def create_eval_dataset(self) -> InputDataset:
        """The left-out photographs, thinned evenly to `max_frames`."""
        outputs = thinned(self.dataparser.get_dataparser_outputs(split=self.test_split), self.max_frames)
        return InputDataset(outputs, self._scale_factor(self.train_dataparser_outputs.cameras, outputs.cameras))


def thinned(outputs: DataparserOutputs, most: int) -> DataparserOutputs:
    """At most so many of the views, evenly spread over their order."""
    count = len(outputs.image_filenames)
    keep = np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
    masks = outputs.mask_filenames
    return dataclasses.replace(
        outputs,
        image_filenames=[outputs.image_filenames[i] for i in keep],
        mask_filenames=None if masks is None else [masks[i] for i in keep],
        cameras=outputs.cameras[torch.tensor(keep)],
        metadata={},
    )


def _trainer_config(training: SplatTraining) -> TrainerConfig:
    config = method_config()
    set_prior(config, "none")
    if not training.additions:
        with_additions(config, ())
    if training.random_points:
        with_seed_points(config, "random")
    config.machine.seed = training.seed
    fit_schedule(config, round(STEPS_OF_WHOLE_TRAINING * max(training.steps)))
    config.data = training.data
    datamanager, dataparser = datamanager_of(config), dataparser_of(config)
    datamanager.data = training.data
    datamanager.max_image_size = training.size
    # Every view that is no reference is a test view, and all of them are for storing.
    dataparser.reference_views = tuple(reference_names(read_capture(training.data).frames, training.num_views))
    dataparser.test_every = 1
    dataparser.seed = training.seed
    datamanager._target = functools.partial(  # pyright: ignore[reportAttributeAccessIssue]
        PairsDataManager, max_frames=training.max_frames
    )
    return config


def reference_names(frames: Sequence[Frame], num_views: int) -> list[str]:
    """Names of the reference views, spread evenly over those photographs that have the shape which most of them have.

    Raises:
        ValueError: if fewer photographs than that share a shape.
    """
    sizes = [(frame.height, frame.width) for frame in frames]
    common = max(sizes, key=lambda wanted: sum(fits(size, wanted) for size in sizes))
    alike = [frame.name for frame, size in zip(frames, sizes) if fits(size, common)]
    if len(alike) < num_views + 1:
        raise ValueError(
            f"pairs need photographs of one shape, of which there are {len(alike)}; {num_views} references are too many."
        )
    return [alike[i] for i in np.linspace(0, len(alike) - 1, num_views).round().astype(int)]


def train_steps(trainer: Trainer, begin: int, end: int) -> None:
    """Nerfstudio's training loop without viewer, logging, evaluation and checkpoints."""
    pipeline = trainer.pipeline
    for step in range(begin, end):
        trainer.step = step
        pipeline.train()
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.BEFORE_TRAIN_ITERATION)
        trainer.train_iteration(step)
        for callback in trainer.callbacks:
            callback.run_callback_at_location(step, TrainingCallbackLocation.AFTER_TRAIN_ITERATION)


@dataclasses.dataclass(frozen=True)
class LeftOutViews:
    """Photographs and cameras of a run, read once for all its numbers of steps."""

    reference_cameras: Cameras
    references: UInt8[Tensor, "k 3 h w"]
    reference_photographs: list[Float[Tensor, "_h _w 3"]]
    """The same in [0, 1], each of its camera's size."""
    cameras: list[Cameras]
    photographs: UInt8[Tensor, "n 3 h w"]
    before: list[int]
    intrinsics: Float[Tensor, "n 4"]

    @classmethod
    def read(cls, datamanager: PairsDataManager) -> LeftOutViews:
        photographs = [_channels_first(data["image"]) for data in datamanager.cached_eval]
        references = [_channels_first(data["image"]) for data in datamanager.cached_train]
        size = tuple(references[0].shape[-2:])
        kept = [i for i, photograph in enumerate(photographs) if fits(tuple(photograph.shape[-2:]), size)]
        if not kept or not all(fits(tuple(reference.shape[-2:]), size) for reference in references):
            raise ValueError(
                f"pairs need photographs of one shape: the first reference has {size} pixels, which "
                f"{len(kept)} of {len(photographs)} left-out photographs share; leave the scene out."
            )
        cameras = datamanager.eval_dataset.cameras
        return cls(
            reference_cameras=datamanager.train_dataset.cameras,
            references=torch.stack([_resized(reference, size) for reference in references]),
            reference_photographs=[to_channels_last(reference[None])[0].float() / 255 for reference in references],
            cameras=[cameras[i : i + 1] for i in kept],
            photographs=torch.stack([_resized(photographs[i], size) for i in kept]),
            before=[
                last_reference_before(
                    datamanager.eval_dataset.image_filenames[i], datamanager.train_dataset.image_filenames
                )
                for i in kept
            ],
            intrinsics=torch.stack([intrinsics_at(cameras[i], size) for i in kept]),
        )


def fits(size: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether a picture (height, width) has nearly the wanted aspect ratio."""
    return abs(size[1] / size[0] * wanted[0] / wanted[1] - 1) <= ASPECT_TOLERANCE


def last_reference_before(name: Path, references: Sequence[Path]) -> int:
    """Index of the last reference that comes before a photograph in capture order, such that one also comes after it.

    A photograph before the first or after the last reference counts to the first or last pair.
    """
    place = natural_key(name.as_posix())
    earlier = sum(natural_key(reference.as_posix()) < place for reference in references)
    return min(max(earlier - 1, 0), len(references) - 2)


def _render_run(trainer: Trainer, training: SplatTraining, views: LeftOutViews, steps: int) -> PairRun:
    model = cast(EnhancerModel, trainer.pipeline.model)
    before = torch.tensor(views.before)
    return run_of(
        training,
        views,
        lambda camera: render_clip(model, camera.to(model.device)),
        views.cameras,
        (before, before + 1),
        steps,
        target=views.photographs,
        intrinsics=views.intrinsics,
        settings={"splats": model.num_points},
    )


def run_of(
    training: SplatTraining,
    views: LeftOutViews,
    show: Callable[[Cameras], RenderedClip],
    cameras: Sequence[Cameras],
    ends: tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]],
    steps: int,
    *,
    target: UInt8[Tensor, "n 3 h w"],
    intrinsics: Float[Tensor, "n 4"],
    settings: dict[str, Any],
) -> PairRun:
    """What splats show at some cameras, with the references warped there.

    Args:
        training: of the sparse splats that the run belongs to.
        views: its references.
        show: renders the splats at a camera.
        cameras: of the frames, each of shape [1].
        ends: `PairRun.before` and `after`.
        steps: how long the splats were trained.
        target: what should be seen.
        intrinsics: at the size of the stored pictures.
        settings: whatever else made the run what it is.
    """
    size = tuple(views.references.shape[-2:])
    clips = [show(camera) for camera in cameras]
    at_references = [show(views.reference_cameras[i : i + 1]) for i in range(training.num_views)]
    photographs = [photo.to(clip.depth) for photo, clip in zip(views.reference_photographs, at_references)]
    sources = WarpSources(photographs, [clip.depth[0] for clip in at_references], views.reference_cameras)
    warped = [
        _stored(warp_references(clip.depth, clip.alpha, camera, sources), size) for clip, camera in zip(clips, cameras)
    ]
    return PairRun(
        scene=training.scene,
        num_views=training.num_views,
        seed=training.seed,
        steps=steps,
        render=torch.cat([stored_colours(clip, size) for clip in clips]),
        alpha=torch.cat([_stored(to_channels_first(clip.alpha), size) for clip in clips]),
        disparity=torch.cat([_disparity(clip, size) for clip in clips]),
        warped=torch.cat(warped),
        target=target,
        references=views.references,
        reference_disparity=torch.cat([_disparity(clip, size) for clip in at_references]),
        before=ends[0],
        after=ends[1],
        camera_to_world=torch.cat([camera.camera_to_worlds for camera in cameras]).float().cpu(),
        reference_camera_to_world=views.reference_cameras.camera_to_worlds.float().cpu(),
        intrinsics=intrinsics,
        settings={
            "additions": training.additions,
            "random_points": training.random_points,
            "max_image_size": training.size,
            **settings,
        },
    )


def stored_colours(clip: RenderedClip, size: tuple[int, ...]) -> UInt8[Tensor, "t 3 H W"]:
    """The colours of a render as they are stored."""
    return _stored(to_channels_first(clip.rgb), size)


def _disparity(clip: RenderedClip, size: tuple[int, ...]) -> UInt8[Tensor, "t 1 H W"]:
    """Normalised disparity of a render as 8-bit pictures."""
    return _stored(normalised_disparity(to_channels_first(clip.depth), to_channels_first(clip.alpha)), size)


def _stored(picture: Float[Tensor, "t c h w"], size: tuple[int, ...]) -> UInt8[Tensor, "t c H W"]:
    """Pictures in [0, 1] as they are stored."""
    return _resized(_to_uint8(picture.cpu()), size)


def _channels_first(image: Tensor) -> UInt8[Tensor, "3 h w"]:
    """A photograph [h w c] as nerfstudio keeps it, as 8-bit colours; an opacity is cut off."""
    image = image[..., :3].cpu().movedim(-1, 0)
    return image if image.dtype == torch.uint8 else _to_uint8(image)


def _to_uint8(picture: Tensor) -> Tensor:
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def _resized(picture: UInt8[Tensor, "*t c h w"], size: tuple[int, ...]) -> UInt8[Tensor, "*t c H W"]:
    if tuple(picture.shape[-2:]) == size:
        return picture
    batch = picture.reshape(-1, *picture.shape[-3:]).float() / 255
    resized = F.interpolate(batch, size=list(size), mode="bilinear", antialias=True, align_corners=False)
    return _to_uint8(resized).reshape(*picture.shape[:-2], *size)


def intrinsics_at(camera: Cameras, size: tuple[int, ...]) -> Float[Tensor, "4"]:
    scale_y, scale_x = size[0] / float(camera.height), size[1] / float(camera.width)
    return torch.tensor(
        [
            float(camera.fx) * scale_x,
            float(camera.fy) * scale_y,
            float(camera.cx) * scale_x,
            float(camera.cy) * scale_y,
        ]
    )


def save_contact_sheet(run: PairRun, path: Path) -> None:
    """A picture for people: reference before | render | opacity | disparity | best warp | photograph | reference after."""
    count = run.render.shape[0]
    rows = [
        [
            run.references[run.before[i]],
            run.render[i],
            run.alpha[i].expand(3, -1, -1),
            run.disparity[i].expand(3, -1, -1),
            run.warped[i, :3],
            run.target[i],
            run.references[run.after[i]],
        ]
        for i in np.linspace(0, count - 1, min(SHEET_ROWS, count)).round().astype(int).tolist()
    ]
    write_sheet(path, [[picture.movedim(0, -1) / 255 for picture in row] for row in rows])
