"""Train the coarse repair, everything else as it is: small networks that each leave out one fold of the scenes, and their gate.

Every step draws its clips from one fold. Another fold's network learns from them; in some of the steps the fold's own network,
which never learns from these scenes, is asked what it would say, and the gate learns how much of that to believe.

The networks look at small pictures, so small copies of the paired data are made once, below the output folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from diffusion_prior.coarse import COARSE_CHANNELS, CoarseRepair, coarse_condition, shrunk
from diffusion_prior.data.clips import ClipBatch, ClipConfig, ClipDataset, Gap, gaps_of, split_scenes, to_float
from diffusion_prior.data.small_runs import small_runs
from diffusion_prior.prior import VideoPrior
from diffusion_prior.seeded import seeded
from diffusion_prior.training.config import UNET_SETTINGS, TrainingConfig
from diffusion_prior.training.loop import Losses, Task, Validation, make_accelerator, train
from diffusion_prior.training.setup import (
    clip_to,
    fixed_clips,
    log_to_console,
    main_process_first,
    starting_prior,
    write_prior,
)
from diffusion_prior.training.validation import condition_clip, judge
from diffusion_prior.types import WARP_CHANNELS

VALIDATION_FRAMES = 8
SMALL_PAIRS_NAME = "small_pairs"
GATE_FLOOR = 2e-3
"""Added to a frame's squared error before the logarithm (27 dB): better frames than that are not worth more."""
ROWS_FROM = COARSE_CHANNELS - 3
"""Channels of a coarse condition from here on lie where the frame's own do: colours of the same row, then warps."""


@dataclass
class CoarseConfig(TrainingConfig):
    """Training of the coarse repair."""

    learning_rate: float = 5e-4
    """Highest learning rate, reached after the warm-up and then lowered to zero along a cosine."""
    clips: ClipConfig = field(
        default_factory=lambda: ClipConfig(
            num_frames=6, batch_size=3, crop_px=None, size_multiple=1, permute_channels=False
        )
    )
    """Which clips are drawn, and how they are varied, of the small pictures: in their own colours, since what colour lies where
    is what is to be learnt, and not cropped, since `zoom` takes windows."""
    folds: int = 4
    """Networks, each trained without a fold of the scenes; more learn from more scenes each, in more time. Of a prior that
    has a coarse repair already it must be the number that that has."""
    gate_every: int = 3
    """The gate, which is much smaller than the networks, learns in one of so many rounds through the folds."""
    l2_weight: float = 10.0
    """Weight of the squared error: where several pictures are possible, their mean is wanted."""
    l1_weight: float = 0.3
    """Weight of the absolute error beside it."""
    gate_weight: float = 0.2
    """Weight of the gate's error: the logarithm of a frame's squared error, which counts decibels. So it spares frames that are
    good already, where little of what the networks say does harm."""
    colour_jitter: float = 0.12
    """Standard deviation of the logarithm of what each colour channel is multiplied by, in all pictures of a clip alike."""
    zoom: float = 0.55
    """Smallest window, as a part of a frame's sides, that a zoomed clip shows of its renders and photographs at the size of the
    whole; the references stay whole. 1 zooms never."""
    zoomed_share: float = 0.7
    """Share of the clips that are zoomed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.zoom <= 1:
            raise ValueError(f"zoom must be a part of the sides, above 0 and at most 1, got {self.zoom}.")
        if self.gate_every < 1:
            raise ValueError(f"gate_every must be at least 1, got {self.gate_every}.")
        self.scale.refuse((*UNET_SETTINGS, "encode_frames", "shards"), "the training of the coarse repair")


@dataclass(frozen=True)
class FoldBatch(ClipBatch):
    """Clips of the scenes of one fold."""

    fold: int = 0
    gate: bool = True
    """Whether the gate learns from them too."""


class FoldedClips(Dataset[ClipBatch]):
    """Batches by step, each from the scenes of one fold, the folds in turn."""

    def __init__(self, gaps: Sequence[Gap], config: ClipConfig, seed: int, folds: int, gate_every: int = 1) -> None:
        """Deal the scenes out to the folds, in the order of their names.

        Args:
            gaps: what is drawn from.
            config: which clips are drawn.
            seed: another seed gives other batches.
            folds: number of folds.
            gate_every: the gate learns in one of so many rounds through the folds.

        Raises:
            ValueError: if there are fewer scenes than folds.
        """
        scenes = sorted({gap.header.scene for gap in gaps})
        if len(scenes) < folds:
            raise ValueError(
                f"{folds} folds need as many training scenes at least, got {len(scenes)}: add paired data, or set `folds`."
            )
        self._folds = [
            ClipDataset([gap for gap in gaps if gap.header.scene in set(scenes[fold::folds])], config, seed + fold)
            for fold in range(folds)
        ]
        self._gate_every = gate_every

    def __getitem__(self, step: int) -> FoldBatch:
        """The batch of one step."""
        turn, fold = divmod(step, len(self._folds))
        return FoldBatch(**vars(self._folds[fold][step]), fold=fold, gate=turn % self._gate_every == 0)


class CoarseLosses(Losses):
    """A network's error on scenes that it learns from, and the gate's on scenes that are new to a network."""

    def __init__(self, coarse: CoarseRepair, config: CoarseConfig, device: torch.device) -> None:
        super().__init__()
        self.coarse = coarse
        self.config = config
        self._device = device

    def forward(self, batch: ClipBatch, generator: torch.Generator, progress: float, player: str) -> dict[str, Tensor]:
        """Errors of the small pictures between the references."""
        assert isinstance(batch, FoldBatch)  # without its fold a network would be asked of what it knows
        fold = batch.fold
        told, target = self._pictures(batch, generator)
        other = 1 + int(torch.randint(self.coarse.folds - 1, (), generator=generator))
        error = told[:, :3] + self.coarse.missing(told, (fold + other) % self.coarse.folds) - target
        parts = {"l1": error.abs().mean(), "l2": error.square().mean()}
        loss = self.config.l1_weight * parts["l1"] + self.config.l2_weight * parts["l2"]
        parts["render_l2"] = (told[:, :3] - target).square().mean()
        if batch.gate:
            new = self._said_without_knowing(told, fold)
            parts["new_l2"] = (told[:, :3] + new - target).square().mean()
            gated = (told[:, :3] + self.coarse.believed(told, new) * new - target).square().mean(dim=(1, 2, 3))
            parts["gated_l2"] = gated.mean()
            parts["gated_log_l2"] = torch.log(gated + GATE_FLOOR).mean()
            loss = loss + self.config.gate_weight * parts["gated_log_l2"]
        return {"loss": loss, **parts}

    @torch.no_grad()
    def _said_without_knowing(self, told: Float[Tensor, "n c h w"], fold: int) -> Float[Tensor, "n 3 h w"]:
        """By the network that leaves these scenes out, as it is used: nothing dropped."""
        self.coarse.eval()
        try:
            return self.coarse.missing(told, fold)
        finally:
            self.coarse.train()

    def _pictures(self, batch: ClipBatch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Conditions and photographs of all frames between the references, small, in one row."""
        clip = clip_to(batch, self._device)
        channels = WARP_CHANNELS * self.coarse.config["warped_references"]
        side = self.coarse.config["side"]
        pictures = map(to_float, (clip.rgb, clip.alpha, clip.disparity, clip.warped[:, :, :channels]))
        told = coarse_condition(*pictures, side=side)[:, 1:-1]
        target = shrunk(to_float(clip.target), side)[:, 1:-1]
        factors = torch.randn(len(told), 3, generator=generator).mul(self.config.colour_jitter).exp().to(told)
        told, target = jittered(told, factors), target * factors[:, None, :, None, None]
        for clip_told, clip_target in zip(told, target):
            if float(torch.rand((), generator=generator)) < self.config.zoomed_share:
                zoom_in(clip_told, clip_target, self.config.zoom, generator)
        return told.flatten(0, 1).clamp(0, 1), target.flatten(0, 1).clamp(0, 1)


def jittered(told: Float[Tensor, "b t c h w"], factors: Float[Tensor, "b 3"]) -> Float[Tensor, "b t c h w"]:
    """A coarse condition whose colours are multiplied by factors, in every picture alike; what is no colour stays."""
    wide = torch.ones(len(told), told.shape[2], dtype=told.dtype, device=told.device)
    pictures_of_references = range(5, COARSE_CHANNELS, 3)  # behind the render, opacity and disparity
    for first in (0, *pictures_of_references, *range(COARSE_CHANNELS, told.shape[2], WARP_CHANNELS)):
        wide[:, first : first + 3] = factors
    return told * wide[:, None, :, None, None]


def zoom_in(
    told: Float[Tensor, "t c h w"], target: Float[Tensor, "t 3 h w"], smallest: float, generator: torch.Generator
) -> None:
    """Show a random window of a clip at the size of the whole, in place; the references and their mean colour stay whole.

    Args:
        told: a coarse condition.
        target: what should be seen.
        smallest: least part of the height and the width that is shown.
        generator: of the window.
    """
    height, width = target.shape[-2:]
    part, across, down = torch.rand(3, generator=generator).tolist()
    part = smallest + (1 - smallest) * part
    rows, columns = max(1, round(part * height)), max(1, round(part * width))
    top, left = round(down * (height - rows)), round(across * (width - columns))
    window = (..., slice(top, top + rows), slice(left, left + columns))
    in_the_frame = [*range(5), *range(ROWS_FROM, told.shape[1])]
    told[:, in_the_frame] = _at_size(told[:, in_the_frame][window], (height, width))
    target.copy_(_at_size(target[window], (height, width)))


def _at_size(pictures: Float[Tensor, "t c _ _"], size: tuple[int, int]) -> Float[Tensor, "t c h w"]:
    return F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)


class CoarseTask(Task):
    """The training of the coarse repair."""

    name = "coarse"

    def __init__(self, config: CoarseConfig, prior: VideoPrior) -> None:
        assert prior.coarse is not None
        self.config = config
        self.prior = prior
        self.coarse: CoarseRepair = prior.coarse
        self.losses = CoarseLosses(self.coarse, config, prior.device)
        self._validation = fixed_clips(config, VALIDATION_FRAMES, prior.latent_factor)

    def dataset(self, rank: int, world_size: int) -> Dataset[ClipBatch]:
        """Clips of the training scenes, small, fold by fold."""
        config = self.config
        scenes = split_scenes(config.pairs, config.validation_scenes)[0]
        with main_process_first():
            headers = small_runs(config.pairs, config.output / SMALL_PAIRS_NAME, self.coarse.config["side"], scenes)
        gaps = [gap for header in headers for gap in gaps_of(header)]
        return FoldedClips(gaps, config.clips, config.seed, config.folds, config.gate_every)

    def validate(self) -> Validation:
        """The renders mended alone, and the whole prior with and without it."""
        predictors = {"coarse": self._mend, "without": self._without, "enhanced": self._enhance}
        metrics, sheet = judge(self._validation, predictors)
        return Validation(metrics, sheet)

    def _mend(self, clip: ClipBatch, number: int) -> Tensor:
        return self.coarse.repaired(condition_clip(clip)).rgb.cpu()

    def _without(self, clip: ClipBatch, number: int) -> Tensor:
        return self.prior.sample(condition_clip(clip), torch.Generator().manual_seed(number)).cpu()

    def _enhance(self, clip: ClipBatch, number: int) -> Tensor:
        return self.prior.enhance(condition_clip(clip), torch.Generator().manual_seed(number)).rgb.cpu()


def run(config: CoarseConfig) -> None:
    """Train the coarse repair and write the prior.

    Raises:
        ValueError: where the prior's own coarse repair has another number of folds.
    """
    accelerator = make_accelerator(config)
    prior = starting_prior(config, accelerator.device)
    if prior.coarse is None:
        with seeded(config.seed):
            prior.set_coarse(CoarseRepair(folds=config.folds))
    assert prior.coarse is not None
    if prior.coarse.folds != config.folds:
        raise ValueError(
            f"the prior's coarse repair has {prior.coarse.folds} folds, got folds={config.folds}: give that number."
        )
    task = CoarseTask(config, prior)
    train(task, config, accelerator)
    write_prior(task.finish(), config, accelerator)


if __name__ == "__main__":
    log_to_console()
    run(tyro.cli(CoarseConfig, description=__doc__))
