"""When rounds run in a training, and what of them outlives it: the training callback and its state."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.datasets.base_dataset import InputDataset
from nerfstudio.utils.rich_utils import CONSOLE
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from nerfstudio_enhancer.contact_sheet import write_depth_sheet, write_round_pictures
from nerfstudio_enhancer.enhance_step import EnhanceConfig, References, RoundClip, enhance_step, mean_colour
from nerfstudio_enhancer.enhanced_views import LEAST_NEED, EnhancedViewStore, newest_settings, round_folder_name
from nerfstudio_enhancer.names import FLICKER, RENDER_FLICKER
from nerfstudio_enhancer.prior import LazyPrior
from nerfstudio_enhancer.random_state import step_generator
from nerfstudio_enhancer.scene.sparse_views import STEREO_DEPTH
from nerfstudio_enhancer.schedule import whole_length

if TYPE_CHECKING:
    from nerfstudio.engine.trainer import Trainer

    from nerfstudio_enhancer.datamanager import EnhancerDataManager
    from nerfstudio_enhancer.model import EnhancerModel

VIEWS_FOLDER = "enhanced_views"
"""Folder of the rounds, beside nerfstudio_models in the run's folder."""

DEPTH_SHEET = "stereo_depth.png"
"""Picture of the references' stereo depth, in the run's folder."""


class Rounds:
    """Runs a round when it is due, stores its views, and finds them again when a run is resumed."""

    def __init__(self, model: EnhancerModel, datamanager: EnhancerDataManager, trainer: Trainer) -> None:
        self.model = model
        self.datamanager = datamanager
        self.trainer = trainer
        self.config = model.config.enhance
        self.seed = trainer.config.machine.seed
        self.folder = Path(trainer.base_dir) / VIEWS_FOLDER
        self.references = references_of(datamanager.train_dataset, datamanager.cached_train)
        self.done: set[int] = set()
        self._made_up_before: int | None = None
        check_settings(self.config, len(self.references.photographs))
        _check_steps(self.config)
        model.seed = datamanager.seed = self.seed
        datamanager.gives_depth = model.config.depth_weight > 0
        model.set_reference_mean(mean_colour(self.references))
        self.store = datamanager.enhanced_views = EnhancedViewStore()
        self.controls = model.enhancer_controls
        datamanager.enhanced_ratio = self.config.ratio
        self._show_depth()
        if self.active:
            self._warn_of_late_rounds()
            self._take_up_rounds()
        to_come = self._made_up_before is not None or not self.done.issuperset(self.scheduled)
        if self.config.uses_prior and to_come:
            self._prior().find()  # before thousands of steps, not after them

    @property
    def feeds(self) -> bool:
        """Whether rounds can be run: a prior is set, or the feed is a control that needs none."""
        return self.config.uses_prior or self.config.feed != "enhanced"

    @property
    def active(self) -> bool:
        """Whether any round is to run by itself."""
        return self.config.rounds > 0 and self.feeds

    @property
    def scheduled(self) -> list[int]:
        """Steps before which a round is to run."""
        if not self.active:
            return []
        start, every = self.config.start, self.config.every
        assert start is not None  # decided by the length of the training, see `fit_to`
        assert every is not None
        return [start + i * every for i in range(self.config.rounds)]

    def run_if_due(self, step: int) -> None:
        """The training callback: a round of the schedule, or one asked for in the viewer."""
        asked = self.controls.take_request() and step > 0
        if asked and not self.feeds:
            CONSOLE.log(
                "[yellow]No round is run: this is a training without prior (`--pipeline.model.enhance.prior none`)."
            )
            asked = False
        if (asked or step in self.scheduled or step == self._made_up_before) and step not in self.done:
            self.run(step)
        self.datamanager.enhanced_ratio = self.controls.ratio

    def run(self, step: int) -> None:
        """Run one round. A checkpoint is written first: whatever stops the round, nothing trained so far is lost."""
        self.trainer.save_checkpoint(step - 1)
        references = dataclasses.replace(self.references, cameras=self.model.learnt_cameras(self.references.cameras))
        oracle = self._oracle() if self.config.feed == "photographs" else None
        prior = self._prior_of(step) if self.config.feed == "enhanced" else None
        faultless = self._faultless() if self.config.feed == "faultless" else None
        CONSOLE.log(f"Enhancement round before step {step} (feed: {self.config.feed})")
        with _progress() as progress:
            task = progress.add_task("Enhancing frames", total=None)
            clips = enhance_step(
                self.model,
                references,
                self.config,
                prior,
                step_generator(self.seed, step, "round"),
                oracle,
                lambda done, total: progress.update(task, completed=done, total=total),
                faultless,
            )
        self._keep(step, clips)
        self.done.add(step)

    def _prior(self) -> LazyPrior:
        return LazyPrior(self.config.prior, self.model.device, self.config.sampling)

    def _prior_of(self, step: int) -> LazyPrior:
        """The prior as a round runs it: early ones of the schedule by its coarse repair alone, those asked for in the viewer whole."""
        whole = self.config.rounds if self.config.diffusion_rounds is None else self.config.diffusion_rounds
        early = self.scheduled[: max(self.config.rounds - whole, 0)]
        return self._prior().without_diffusion() if step in early else self._prior()

    def _keep(self, step: int, clips: list[RoundClip]) -> None:
        self.store.add(step, [clip.views for clip in clips])
        try:
            figures = _flicker(clips)
            folder = self.store.save_round(self.folder, step, dataclasses.asdict(self.config), figures)
            if self.config.save_frames:
                write_round_pictures(folder, clips)
            CONSOLE.log(
                f"{self.store.num_views} enhanced views saved in {folder}; needed at {self.store.mean_need:.0%}, since the "
                "references see the rest or contradict it."
            )
            if self.store.share == 0:
                CONSOLE.log(f"That is less than {LEAST_NEED:.0%}: the training goes on without them.")
            left = self.store.num_views - sum(len(clip.fed) for clip in clips)
            if left:
                CONSOLE.log(
                    f"{left} of {self.store.num_views} views are left as rendered: the references see what they show."
                )
            if figures:
                CONSOLE.log(
                    f"From frame to frame they differ by {figures[FLICKER]:.4f}, the renders by {figures[RENDER_FLICKER]:.4f} "
                    "(mean absolute difference of colours in [0, 1] where both frames show the same surface)."
                )
        except OSError as error:
            CONSOLE.log(
                f"[bold red]The enhanced views could not be saved in {self.folder} ({error}). Training goes on with them; "
                "free some space: a run resumed from a later checkpoint has to make this round again."
            )

    def _show_depth(self) -> None:
        """Write what stereo found at the references, for people, once per run."""
        depths = self.datamanager.train_dataparser_outputs.metadata.get(STEREO_DEPTH, ())
        path = Path(self.trainer.base_dir) / DEPTH_SHEET
        resumed = getattr(self.trainer, "_start_step", 0) > 0
        if not depths or not self.config.save_frames or (resumed and path.exists()):
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_depth_sheet(path, depths)
        except OSError as error:
            CONSOLE.log(f"[yellow]The pictures of the stereo depth could not be written to {path} ({error}).")

    def _warn_of_late_rounds(self) -> None:
        """Of those that the training ends before, by someone's own numbers of steps."""
        end = whole_length(self.trainer)
        late = [step for step in self.scheduled if step >= end]
        if late:
            CONSOLE.log(
                f"[bold yellow]{len(late)} of {self.config.rounds} rounds will not run: they are due before steps "
                f"{', '.join(map(str, late))}, the training ends with step {end - 1}. Leave out `--pipeline.model.enhance.start` "
                "and `.every`, and rounds follow the length of the training."
            )

    def _take_up_rounds(self) -> None:
        """Read the rounds of the run that is resumed."""
        start = getattr(self.trainer, "_start_step", 0)
        if start == 0:
            self._set_older_aside()
            return
        found: set[int] = set()
        for folder in dict.fromkeys([_source_folder(self.trainer), self.folder]):
            if folder is not None and folder.is_dir():
                found.update(self.store.load_rounds(folder, up_to_step=start - 1))
        self._keep_taken_up(found)
        if found:
            CONSOLE.log(f"Resuming with {self.store.num_views} enhanced views of the round before step {max(found)}.")
        behind = [step for step in self.scheduled if step < start]
        self.done.update(found, behind)
        if behind and max(found, default=0) < behind[-1]:  # of several rounds the newest alone is drawn from
            CONSOLE.log(
                f"The round before step {behind[-1]} lies behind step {start} and its views are not beside the checkpoint: "
                "one round is run first in its place."
            )
            self._made_up_before = start  # not yet: by now a browser may render, and only a step keeps it from that

    def _set_older_aside(self) -> None:
        """Rename the enhanced views of another training in the same folder: this one's checkpoints do not go with them."""
        if any(self.folder.glob("round-step-*")):
            names = (self.folder.with_name(f"{VIEWS_FOLDER}-older-{number}") for number in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            self.folder.rename(aside)
            CONSOLE.log(f"The enhanced views of an older training in this folder are now in {aside}.")

    def _keep_taken_up(self, found: set[int]) -> None:
        """Link or copy the newest round into this run's folder, so that a run that goes on from this one finds it too."""
        source = _source_folder(self.trainer)
        name = round_folder_name(max(found, default=0))
        if source is None or source == self.folder or not (source / name).is_dir() or (self.folder / name).exists():
            return
        partial = self.folder / f".partial-{name}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(source / name, partial, copy_function=_link_or_copy)
            partial.rename(self.folder / name)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            CONSOLE.log(
                f"[yellow]The enhanced views that this run goes on with could not be written to {self.folder} ({error}); a run "
                "that is resumed from this one has to make them again."
            )

    def _faultless(self) -> Callable[[Cameras], Float[Tensor, "t h w 3"]]:
        from nerfstudio_enhancer.evaluation.faultless import (
            FaultlessFrames,
        )  # of the benchmark: it trains like this one

        return FaultlessFrames(self.trainer)

    def _oracle(self) -> References:
        dataset = self.datamanager.unused_views()
        if len(dataset) == 0:
            return References([], dataset.cameras)
        return references_of(dataset, self.datamanager.load_images(dataset))


def check_settings(config: EnhanceConfig, num_references: int) -> None:
    """Refuse settings of rounds with which none can be run, whenever they are due.

    Raises:
        ValueError: names the setting, its rule and the value given.
    """
    if not 0 <= config.ratio <= 1:
        raise ValueError(f"enhance.ratio is a probability in [0, 1], got {config.ratio}.")
    if not 0 <= config.repair_share <= 1:
        raise ValueError(f"enhance.repair_share is a share in [0, 1], got {config.repair_share}.")
    if config.diffusion_rounds is not None and config.diffusion_rounds < 0:
        raise ValueError(f"enhance.diffusion_rounds must be at least 0, got {config.diffusion_rounds}.")
    low, high = config.unseen_range
    if not (0 <= low < high <= 1 or low == high == 0):
        raise ValueError(
            f"enhance.unseen_range must be two growing shares in [0, 1], or 0 0 to need every view in full, got {low} {high}."
        )
    path = config.trajectory
    between = path.min_frames, path.max_frames, path.max_total_frames
    if config.rounds > 0 and config.feed != "photographs" and not 1 <= between[0] <= between[1] <= between[2]:
        raise ValueError(
            "enhance.trajectory must have 1 <= min_frames <= max_frames <= max_total_frames, so that a path has frames, got "
            f"{between[0]}, {between[1]}, {between[2]}."
        )
    if num_references < 2 and config.rounds > 0 and config.uses_prior:
        raise ValueError(
            f"Enhancement needs at least 2 reference views, got {num_references}. Add photographs, raise `--num-views`, "
            "or train without it by `--pipeline.model.enhance.prior none`."
        )


def _check_steps(config: EnhanceConfig) -> None:
    """Of a schedule that is decided, see `EnhancerModelConfig.fit_to`."""
    assert config.start is not None
    assert config.every is not None
    if config.every < 1:
        raise ValueError(f"enhance.every must be at least 1 step, got {config.every}.")
    if config.start < 1 and config.rounds > 0:
        raise ValueError(
            f"enhance.start must be at least step 1, got {config.start}: there are no splats to repair before."
        )


def references_of(dataset: InputDataset, cached: list[dict]) -> References:
    """Photographs and cameras of a dataset that the data manager has read, in the CPU's memory."""
    read = [_photograph(item) for item in cached]
    whole = all(bool((usable == 1).all()) for _, usable in read)
    transparent = any(
        item["image"].shape[-1] == 4 and bool((_unit(item["image"])[..., 3] < 1).any()) for item in cached
    )
    return References(
        [rgb for rgb, _ in read], dataset.cameras, None if whole else [usable for _, usable in read], transparent
    )


def _photograph(item: dict) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w 1"]]:
    """Float sRGB and what of it is usable; the rest takes the photograph's own mean colour, so that it pulls nowhere."""
    image = _unit(item["image"].cpu())
    rgb, usable = image[..., :3], torch.ones_like(image[..., :1])
    if image.shape[-1] == 4:
        usable = image[..., 3:]
    if "mask" in item:
        usable = usable * item["mask"].cpu().reshape(usable.shape)
    if bool((usable == 1).all()):
        return rgb, usable
    mean = (rgb * usable).sum((0, 1)) / usable.sum().clamp(min=1e-6)
    return rgb * usable + mean * (1 - usable), usable


def _unit(image: Tensor) -> Tensor:
    """As nerfstudio keeps it, in [0, 1]."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def _flicker(clips: list[RoundClip]) -> dict[str, float]:
    """Means over the clips that have more than one frame."""
    told = [clip.frame_difference for clip in clips if clip.frame_difference is not None]
    return {key: sum(values) / len(values) for key, values in zip((FLICKER, RENDER_FLICKER), zip(*told))}


def take_up_schedule(config: EnhanceConfig, trainer: Trainer, begin: int) -> None:
    """Decide, in place, what is left open (None) of when rounds run by the newest round before the step a run resumes at."""
    for folder in dict.fromkeys([_source_folder(trainer), Path(trainer.base_dir) / VIEWS_FOLDER]):
        settings = {} if folder is None else newest_settings(folder, up_to_step=begin - 1)
        for name in ("start", "every"):
            if getattr(config, name) is None and isinstance(settings.get(name), int):
                setattr(config, name, settings[name])


def _link_or_copy(source: str, target: str) -> None:
    """Nobody writes into a round's files: another name for them costs no space, where the file system has such."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _source_folder(trainer: Trainer) -> Path | None:
    """Enhanced views of the run that `--load-dir` or `--load-checkpoint` names."""
    if trainer.config.load_dir is not None:
        return Path(trainer.config.load_dir).parent / VIEWS_FOLDER
    if trainer.config.load_checkpoint is not None:
        return Path(trainer.config.load_checkpoint).parent.parent / VIEWS_FOLDER
    return None


def _progress() -> Progress:
    return Progress(
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=CONSOLE,
    )
