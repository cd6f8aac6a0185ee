"""Train the coarse repair, everything else as it is: small networks that each leave out one fold of the scenes, and their gate.

Every step draws its clips from one fold. Another fold's network learns from them; the fold's own network, which never learns
from these scenes, is asked what it would say, and the gate learns how much of that to believe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from diffusion_prior.coarse import COARSE_CHANNELS, CoarseRepair, coarse_condition, shrunk
from diffusion_prior.data.clips import ClipBatch, ClipConfig, ClipDataset, Gap, to_float
from diffusion_prior.prior import VideoPrior
from diffusion_prior.training.config import UNET_SETTINGS, TrainingConfig
from diffusion_prior.training.loop import Losses, Task, Validation, make_accelerator, train
from diffusion_prior.training.setup import (
    clip_to,
    fixed_clips,
    log_to_console,
    starting_prior,
    training_gaps,
    write_prior,
)
from diffusion_prior.training.validation import condition_clip, judge
from diffusion_prior.types import WARP_CHANNELS

VALIDATION_FRAMES = 8


@dataclass
class CoarseConfig(TrainingConfig):
    """Training of the coarse repair."""

    learning_rate: float = 5e-4
    """Highest learning rate, reached after the warm-up and then lowered to zero along a cosine."""
    clips: ClipConfig = field(
        default_factory=lambda: ClipConfig(num_frames=6, batch_size=6, crop_px=None, permute_channels=False)
    )
    """Which clips are drawn, and how they are varied. Whole frames in their own colours: what lies where in a picture, and what
    colour it has, is what is to be learnt."""
    folds: int = 4
    """Networks, each trained without a fold of the scenes; more learn from more scenes each, in more time. Of a prior that
    has a coarse repair already it must be the number that that has."""
    l2_weight: float = 10.0
    """Weight of the squared error: where several pictures are possible, their mean is wanted."""
    l1_weight: float = 0.3
    """Weight of the absolute error beside it."""
    colour_jitter: float = 0.12
    """Standard deviation of the logarithm of what each colour channel is multiplied by, in all pictures of a clip alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale.refuse((*UNET_SETTINGS, "encode_frames", "shards"), "the training of the coarse repair")


@dataclass(frozen=True)
class FoldBatch(ClipBatch):
    """Clips of the scenes of one fold."""

    fold: int = 0


class FoldedClips(Dataset[ClipBatch]):
    """Batches by step, each from the scenes of one fold, the folds in turn."""

    def __init__(self, gaps: Sequence[Gap], config: ClipConfig, seed: int, folds: int) -> None:
        """Deal the scenes out to the folds, in the order of their names.

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

    def __getitem__(self, step: int) -> FoldBatch:
        """The batch of one step."""
        fold = step % len(self._folds)
        return FoldBatch(**vars(self._folds[fold][step]), fold=fold)


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
        new = self._said_without_knowing(told, fold)
        gated = (told[:, :3] + self.coarse.believed(told, new) * new - target).square().mean()
        with torch.no_grad():
            shown = {
                "render_l2": (told[:, :3] - target).square().mean(),
                "new_l2": (told[:, :3] + new - target).square().mean(),
            }
        loss = self.config.l1_weight * parts["l1"] + self.config.l2_weight * (parts["l2"] + gated)
        return {"loss": loss, **parts, "gated_l2": gated, **shown}

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
        return told.flatten(0, 1).clamp(0, 1), target.flatten(0, 1).clamp(0, 1)


def jittered(told: Float[Tensor, "b t c h w"], factors: Float[Tensor, "b 3"]) -> Float[Tensor, "b t c h w"]:
    """A coarse condition whose colours are multiplied by factors, in every picture alike; what is no colour stays."""
    wide = torch.ones(len(told), told.shape[2], dtype=told.dtype, device=told.device)
    pictures_of_references = range(5, COARSE_CHANNELS, 3)  # behind the render, opacity and disparity
    for first in (0, *pictures_of_references, *range(COARSE_CHANNELS, told.shape[2], WARP_CHANNELS)):
        wide[:, first : first + 3] = factors
    return told * wide[:, None, :, None, None]


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
        """Clips of the training scenes, fold by fold."""
        return FoldedClips(training_gaps(self.config), self.config.clips, self.config.seed, self.config.folds)

    def validate(self) -> Validation:
        """The renders mended alone, and the whole prior with and without it."""
        predictors = {"coarse": self._mend, "without": self._without, "enhanced": self._enhance}
        metrics, sheet = judge(self._validation, predictors)
        return Validation(metrics, sheet)

    def finish(self) -> VideoPrior:
        """The prior with the trained coarse repair."""
        return self.prior

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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
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
