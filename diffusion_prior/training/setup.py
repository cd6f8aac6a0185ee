"""What every training starts from: a prior, the clips to train on and the fixed ones to validate with."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import TypeVar

import torch
from accelerate import Accelerator, PartialState
from jaxtyping import Bool
from torch import Tensor

from diffusion_prior.checkpoints import load_prior, save_prior
from diffusion_prior.conditioning import encoder_side
from diffusion_prior.data.clips import ClipBatch, Gap, find_gaps, split_scenes, validation_clips
from diffusion_prior.prior import VideoPrior, build_compact_prior
from diffusion_prior.seeded import seeded
from diffusion_prior.training.config import TrainingConfig
from diffusion_prior.training.loop import PRIOR_NAME
from diffusion_prior.training.trainable import merge_additions

AnyConfig = TypeVar("AnyConfig", bound=TrainingConfig)


def starting_prior(config: TrainingConfig, device: torch.device) -> VideoPrior:
    """The prior named by the settings in float32, or a compact one with random weights."""
    if config.prior is None:
        return build_compact_prior(config.seed).to(device)
    with seeded(config.seed):  # of a decoder that the folder lacks
        return load_prior(str(config.prior), device, torch.float32)


def training_gaps(config: TrainingConfig) -> list[Gap]:
    """The gaps of the scenes that train."""
    return find_gaps(config.pairs, split_scenes(config.pairs, config.validation_scenes)[0])


def fixed_clips(config: TrainingConfig, num_frames: int, size_multiple: int) -> list[ClipBatch]:
    """The whole clips of the scenes that validate."""
    sharded = config.scale.shards is not None
    gaps = find_gaps(config.pairs, split_scenes(config.pairs, config.validation_scenes, train_elsewhere=sharded)[1])
    return validation_clips(gaps, config.validation_clips, num_frames, size_multiple, config.clips.thumbnail_px)


def fit_to_prior(config: AnyConfig, prior: VideoPrior) -> AnyConfig:
    """The settings with crops that the prior's latents divide and thumbnails of its image encoder's size, whatever was asked."""
    factor = prior.latent_factor
    multiple = -(-config.clips.size_multiple // factor) * factor
    clips = replace(config.clips, size_multiple=multiple, thumbnail_px=encoder_side(prior.image_encoder))
    return replace(config, clips=clips)


def clip_to(clip: ClipBatch, device: torch.device) -> ClipBatch:
    """A batch on another device."""
    return ClipBatch(**{entry.name: getattr(clip, entry.name).to(device) for entry in fields(ClipBatch)})


def clips_where(batch: ClipBatch, chosen: Bool[Tensor, " b"]) -> ClipBatch:
    """Some clips of a batch, in their order."""
    return ClipBatch(**{name: frames[chosen.to(frames.device)] for name, frames in vars(batch).items()})


def write_prior(prior: VideoPrior, config: TrainingConfig, accelerator: Accelerator) -> None:
    """Write the trained prior below the output folder, float16, by the main process alone."""
    merge_additions(prior.unet)
    if accelerator.is_main_process:
        save_prior(prior, config.output / PRIOR_NAME, torch.float16)
    accelerator.wait_for_everyone()


def is_main_process() -> bool:
    """Whether this process is the one that writes."""
    return PartialState(cpu=not torch.cuda.is_available()).is_main_process


def wait_for_everyone() -> None:
    """Wait until all processes are here."""
    PartialState().wait_for_everyone()


def main_process_first() -> AbstractContextManager[None]:
    """What the main process makes inside is there for the others, which enter after it."""
    return PartialState(cpu=not torch.cuda.is_available()).main_process_first()


def log_to_console() -> None:
    """Show the trainings' messages with their time."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
