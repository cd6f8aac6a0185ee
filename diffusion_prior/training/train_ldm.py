"""Train the latent diffusion model: UNet and image encoder together, the VAE as it is.

At the highest noise level the denoiser's best answer is the mean of all that is possible: direct regression. The first
phase trains at that level alone, which is quick; lognormal levels follow, with some clips left at the highest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import tyro
from jaxtyping import Float
from torch import Tensor

from diffusion_prior.conditioning import LatentCondition, embed_frames, encode_frames
from diffusion_prior.data.clips import ClipBatch, ClipConfig, ClipDataset, to_float
from diffusion_prior.noise import add_noise, lognormal_sigmas
from diffusion_prior.prior import VideoPrior, denoise
from diffusion_prior.training.config import TrainingConfig
from diffusion_prior.training.loop import Losses, Task, Validation, make_accelerator, train
from diffusion_prior.training.objectives import LossKind, denoising_loss, draw_dropped_clips, drop_middle_frames
from diffusion_prior.training.setup import (
    clip_to,
    fit_to_prior,
    fixed_clips,
    log_to_console,
    starting_prior,
    training_gaps,
    write_prior,
)
from diffusion_prior.training.trainable import choose_trainable
from diffusion_prior.training.validation import condition_clip, judge

VALIDATION_FRAMES = 6


@dataclass
class LdmConfig(TrainingConfig):
    """Training of the UNet and the image encoder."""

    learning_rate: float = 5e-4
    """Highest learning rate, reached after the warm-up and then lowered to zero along a cosine."""
    clips: ClipConfig = field(default_factory=lambda: ClipConfig(num_frames=5, batch_size=3, crop_px=192))
    """Which clips are drawn, and how they are varied."""
    loss: LossKind = "l2"
    """l2: squared error (its best answer is the mean), every noise level alike. l1: absolute error, every noise level alike.
    authors: absolute error as their code weighs it, low noise levels most."""
    regression_share: float = 0.5
    """Share of the training that stays at the highest noise level: direct regression."""
    highest_noise_share: float = 0.25
    """Share of the clips at the highest noise level afterwards."""
    log_sigma_mean: float = 0.7
    """Mean of the natural logarithm of the other noise levels (SVD's)."""
    log_sigma_std: float = 1.6
    """Standard deviation of the natural logarithm of the other noise levels (SVD's)."""
    sampling_steps: int | None = None
    """Sampling steps that are recorded in the prior; None keeps those of the prior it starts from."""
    condition_dropout: float = 0.1
    """Share of the clips whose frames between the references lose their condition."""


def batch_condition(
    prior: VideoPrior, batch: ClipBatch, generator: torch.Generator | None, at_once: int | None = None
) -> LatentCondition:
    """What the UNet is told about a batch of crops; the embeddings, of whole frames, are differentiable.

    Args:
        prior: whose VAE and image encoder are used.
        batch: clips.
        generator: source of the noise augmentation; None adds none.
        at_once: most frames that the VAE encodes together; None for all.
    """
    config = prior.config
    rgb, alpha, disparity = (to_float(frames) for frames in (batch.rgb, batch.alpha, batch.disparity))
    with torch.no_grad():
        noised = rgb
        if generator is not None and config.noise_augmentation > 0:
            noise = torch.randn(rgb.shape, generator=generator).to(rgb)
            noised = rgb + config.noise_augmentation / 2 * noise  # half of it: [0, 1] is half as wide as [-1, 1]
        latents = encode_frames(prior.vae, noised, config.patch_size, at_once)
    return LatentCondition(
        latents=latents,
        extra=prior.extras(alpha, disparity),
        embeddings=embed_frames(prior.image_encoder, to_float(batch.thumbnail)),
        micro=prior.micro(rgb.shape[0], batch.camera_to_world, batch.fov_x_rad),
    )


class LdmLosses(Losses):
    """Denoising of the photographs' latents."""

    def __init__(self, prior: VideoPrior, config: LdmConfig) -> None:
        super().__init__()
        self.unet = prior.unet
        self.image_encoder = prior.image_encoder
        self.config = config
        self._prior = prior  # not a module: the VAE is neither trained nor saved with the checkpoint

    def forward(self, batch: ClipBatch, generator: torch.Generator, progress: float, player: str) -> dict[str, Tensor]:
        """EDM's weighted error at one noise level per clip."""
        prior, config = self._prior, self.config
        batch = clip_to(batch, prior.device)
        count, at_once = batch.rgb.shape[0], config.scale.encode_frames
        condition = batch_condition(prior, batch, generator, at_once)
        condition = drop_middle_frames(condition, draw_dropped_clips(count, config.condition_dropout, generator))
        with torch.no_grad():
            target = to_float(batch.target)
            clean = encode_frames(prior.vae, target, prior.config.patch_size, at_once) * prior.latent_scale
        sigma = draw_sigmas(count, progress, config, prior.config.sigma_max, generator).to(clean)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        denoised = denoise(self.unet, add_noise(clean, noise, sigma), sigma, condition)
        error = (denoised - clean)[:, 1:-1].square().mean()
        return {"loss": denoising_loss(denoised, clean, sigma, config.loss), "middle_error": error}


def draw_sigmas(
    count: int, progress: float, config: LdmConfig, sigma_max: float, generator: torch.Generator
) -> Float[Tensor, " b"]:
    """Noise levels of a batch: the highest alone in the first phase, then lognormal ones beside it."""
    highest = torch.full((count,), sigma_max)
    if progress < config.regression_share:
        return highest
    drawn = lognormal_sigmas(count, generator, config.log_sigma_mean, config.log_sigma_std).clamp(max=sigma_max)
    stays = torch.rand(count, generator=generator) < config.highest_noise_share
    return torch.where(stays, highest, drawn)


class LdmTask(Task):
    """The training of UNet and image encoder."""

    name = "ldm"

    def __init__(self, config: LdmConfig, prior: VideoPrior) -> None:
        self.config = config
        self.prior = prior
        choose_trainable(prior, config.scale, config.seed)
        self.losses = LdmLosses(prior, config)
        prior.vae.requires_grad_(False)
        self._validation = fixed_clips(config, VALIDATION_FRAMES, config.clips.size_multiple)

    def dataset(self, rank: int, world_size: int) -> ClipDataset:
        """Clips of the training scenes."""
        return ClipDataset(training_gaps(self.config), self.config.clips, self.config.seed, rank, world_size)

    def validate(self) -> Validation:
        """Sampled clips through the stock decoder, beside the photographs through VAE and back: their ceiling."""
        metrics, sheet = judge(self._validation, {"sampled": self._sample, "ceiling": self._reconstruct})
        return Validation(metrics, sheet)

    def _sample(self, clip: ClipBatch, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        return self.prior.decode_stock(self.prior.predict_latents(condition_clip(clip), generator)).cpu()

    def _reconstruct(self, clip: ClipBatch, number: int) -> Tensor:
        rgb = to_float(clip.target[0].to(self.prior.device))
        at_once = self.config.scale.encode_frames
        return self.prior.decode_stock(encode_frames(self.prior.vae, rgb, self.prior.config.patch_size, at_once)).cpu()


def run(config: LdmConfig) -> None:
    """Train UNet and image encoder and write the prior."""
    accelerator = make_accelerator(config)
    prior = starting_prior(config, accelerator.device)
    if config.sampling_steps is not None:
        prior.config = replace(prior.config, num_inference_steps=config.sampling_steps)
    config = fit_to_prior(config, prior)
    task = LdmTask(config, prior)
    train(task, config, accelerator)
    write_prior(task.finish(), config, accelerator)


if __name__ == "__main__":
    log_to_console()
    run(tyro.cli(LdmConfig, description=__doc__))
