"""Train the spatial-temporal decoder on the latent diffusion model's own samples, everything else as it is.

L1 + LPIPS + an optional adversarial term (3DGS-Enhancer, section 4.2). The samples are drawn anew for every batch, so that
crops, mirroring and channel order vary them too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import tyro
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_prior.colour import match_first_reference
from diffusion_prior.conditioning import decoder_condition, encode_frames, to_signed
from diffusion_prior.data.clips import ClipBatch, ClipConfig, ClipDataset, to_float
from diffusion_prior.noise import karras_sigmas
from diffusion_prior.prior import VideoPrior, denoise
from diffusion_prior.sampler import frame_guidance, guide, sample_euler
from diffusion_prior.seeded import seeded
from diffusion_prior.std import widened
from diffusion_prior.training.config import UNET_SETTINGS, TrainingConfig
from diffusion_prior.training.discriminator import PatchDiscriminator
from diffusion_prior.training.loop import Losses, Task, Validation, make_accelerator, train
from diffusion_prior.training.objectives import discriminator_hinge, generator_hinge, perceptual_distance
from diffusion_prior.training.setup import (
    clip_to,
    clips_where,
    fit_to_prior,
    fixed_clips,
    log_to_console,
    starting_prior,
    training_gaps,
    write_prior,
)
from diffusion_prior.training.train_ldm import batch_condition
from diffusion_prior.training.validation import condition_clip, judge
from diffusion_prior.types import WARP_CHANNELS

VALIDATION_FRAMES = 8
INITIAL_BLEND = 0.8
"""Share of the render in the output of a decoder at the start of its training."""


@dataclass
class StdConfig(TrainingConfig):
    """Training of the spatial-temporal decoder."""

    clips: ClipConfig = field(default_factory=lambda: ClipConfig(num_frames=5, batch_size=3, crop_px=160))
    """Which clips are drawn, and how they are varied."""
    lpips_weight: float = 0.1
    """Weight of LPIPS beside the absolute error of pictures in [-1, 1]."""
    l2_weight: float = 0.0
    """Weight of the squared error beside the absolute one: where several pictures are possible it asks for their mean, which
    PSNR rewards, and not for their median."""
    adversarial_weight: float = 0.0
    """Weight of the patch discriminator's verdict; 0 trains without one."""
    adversarial_start: float = 0.5
    """Share of the training before the discriminator has a say."""
    warped_references: int = 2
    """Warped references that the decoder looks at; one that looked at fewer before is widened."""
    context_widths: tuple[int, ...] = (192, 256)
    """Channels of the context in the decoder's condition encoder, one for each further halving of the picture; a decoder
    that had none before gets it."""
    photograph_latent_probability: float = 0.1
    """Share of the clips which get the latents of the photographs instead of sampled ones."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale.refuse(UNET_SETTINGS, "the training of the spatial-temporal decoder")


@torch.no_grad()
def sample_batch(
    prior: VideoPrior, batch: ClipBatch, generator: torch.Generator, at_once: int | None = None
) -> Float[Tensor, "b f c h w"]:
    """Unscaled latents that the latent diffusion model samples for a batch of crops, as `VideoPrior` does for a clip.

    Args:
        prior: whose VAE, image encoder and UNet are used.
        batch: clips.
        generator: source of the first noise and of the noise augmentation.
        at_once: most frames that the VAE encodes together; None for all.
    """
    config = prior.config
    condition = batch_condition(prior, batch, generator, at_once)
    shape = (*condition.latents.shape[:2], prior.unet.config["out_channels"], *condition.latents.shape[-2:])
    noise = torch.randn(shape, generator=generator).to(condition.latents)
    guidance = frame_guidance(shape[1], config.min_guidance, config.max_guidance)

    def denoise_batch(noisy: Tensor, sigma: Tensor) -> Tensor:
        sigmas = sigma.to(noisy).expand(shape[0])
        conditional = denoise(prior.unet, noisy, sigmas, condition)
        if not config.uses_guidance:
            return conditional
        return guide(conditional, denoise(prior.unet, noisy, sigmas, prior.unconditional(condition)), guidance)

    sigmas = karras_sigmas(config.num_inference_steps, config.sigma_min, config.sigma_max)
    return sample_euler(denoise_batch, noise, sigmas) / prior.latent_scale


class StdLosses(Losses):
    """Frames from sampled latents and renders, against photographs."""

    def __init__(self, prior: VideoPrior, config: StdConfig) -> None:
        super().__init__()
        self.std = prior.std
        self.config = config
        self.discriminator = PatchDiscriminator() if config.adversarial_weight > 0 else None
        self._prior = (
            prior  # not a module: VAE, UNet and image encoder are neither trained nor saved with the checkpoint
        )
        self._made: Tensor | None = None
        self._real: Tensor | None = None

    @property
    def players(self) -> dict[str, nn.Module]:
        """The decoder, then the discriminator on what the decoder has just made."""
        players: dict[str, nn.Module] = {"std": self.std}
        return players if self.discriminator is None else players | {"discriminator": self.discriminator}

    def forward(self, batch: ClipBatch, generator: torch.Generator, progress: float, player: str) -> dict[str, Tensor]:
        """The decoder's or the discriminator's loss."""
        return self._judge_made() if player == "discriminator" else self._decode(batch, generator, progress)

    def _decode(self, batch: ClipBatch, generator: torch.Generator, progress: float) -> dict[str, Tensor]:
        prior, config = self._prior, self.config
        batch = clip_to(batch, prior.device)
        target = to_signed(to_float(batch.target))
        channels = WARP_CHANNELS * self.std.config["warped_references"]
        pictures = (batch.rgb, batch.alpha, batch.disparity, batch.warped[:, :, :channels])
        condition = decoder_condition(*map(to_float, pictures))
        pred = self.std(self._latents(batch, generator), condition).float()
        middle, truth = (rearrange(frames[:, 1:-1], "b t c h w -> (b t) c h w") for frames in (pred, target))
        error = pred - target
        parts = {"l1": error.abs().mean(), "l2": error.square().mean(), "lpips": perceptual_distance(middle, truth)}
        loss = parts["l1"] + config.l2_weight * parts["l2"] + config.lpips_weight * parts["lpips"]
        if self.discriminator is not None:
            self._made, self._real = middle.detach(), truth
            if progress >= config.adversarial_start:
                parts["adversarial"] = generator_hinge(self.discriminator(middle).float())
                loss = loss + config.adversarial_weight * parts["adversarial"]
        return {"loss": loss, **parts}

    def _judge_made(self) -> dict[str, Tensor]:
        assert self.discriminator is not None
        assert self._made is not None
        assert self._real is not None
        scores = self.discriminator(self._real).float(), self.discriminator(self._made).float()
        return {"loss": discriminator_hinge(*scores)}

    @torch.no_grad()
    def _latents(self, batch: ClipBatch, generator: torch.Generator) -> Float[Tensor, "b f c h w"]:
        """Those of the photographs for some clips, sampled ones for the others; no clip costs more than what it takes."""
        prior, at_once = self._prior, self.config.scale.encode_frames
        photographs = torch.rand(len(batch.target), generator=generator) < self.config.photograph_latent_probability
        parts = []
        if photographs.any():
            target = to_float(clips_where(batch, photographs).target)
            parts.append(encode_frames(prior.vae, target, prior.config.patch_size, at_once))
        if not photographs.all():
            parts.append(sample_batch(prior, clips_where(batch, ~photographs), generator, at_once))
        places = torch.cat([photographs.nonzero(), (~photographs).nonzero()]).flatten().argsort()
        return torch.cat(parts)[places.to(batch.target.device)]


class StdTask(Task):
    """The decoder's training."""

    name = "std"

    def __init__(self, config: StdConfig, prior: VideoPrior) -> None:
        self.config = config
        self.prior = prior
        self.losses = StdLosses(prior, config)
        for network in (prior.vae, prior.unet, prior.image_encoder):
            network.requires_grad_(False)
        self._validation = fixed_clips(config, VALIDATION_FRAMES, config.clips.size_multiple)

    def dataset(self, rank: int, world_size: int) -> ClipDataset:
        """Clips of the training scenes."""
        return ClipDataset(training_gaps(self.config), self.config.clips, self.config.seed, rank, world_size)

    def validate(self) -> Validation:
        """The whole prior, with and without colour correction, beside the same samples through the stock decoder."""
        predictors = {"stock": self._stock, "enhanced": self._enhance, "corrected": self._correct}
        metrics, sheet = judge(self._validation, predictors)
        return Validation(metrics, sheet)

    def _latents_of(self, clip: ClipBatch, number: int) -> Tensor:
        return self.prior.predict_latents(condition_clip(clip), torch.Generator().manual_seed(number))

    def _stock(self, clip: ClipBatch, number: int) -> Tensor:
        return self.prior.decode_stock(self._latents_of(clip, number)).cpu()

    def _enhance(self, clip: ClipBatch, number: int) -> Tensor:
        return self.prior.decode(self._latents_of(clip, number), condition_clip(clip)).cpu()

    def _correct(self, clip: ClipBatch, number: int) -> Tensor:
        return match_first_reference(self._enhance(clip, number), to_float(clip.rgb[0, 0]))


def start_from_the_render(prior: VideoPrior) -> None:
    """Let an untrained decoder begin near the render: from the stock decoder it would spend its first steps on the way there."""
    bias = prior.std.blend.bias
    if bias is not None and not bias.any():
        torch.nn.init.constant_(bias[: prior.config.patch_size**2], INITIAL_BLEND)


def run(config: StdConfig) -> None:
    """Train the spatial-temporal decoder and write the prior."""
    accelerator = make_accelerator(config)
    prior = starting_prior(config, accelerator.device)
    config = fit_to_prior(config, prior)
    with seeded(config.seed):
        prior.set_std(widened(prior.std, config.warped_references, config.context_widths))
        start_from_the_render(prior)
        task = StdTask(config, prior)
    train(task, config, accelerator)
    write_prior(task.finish(), config, accelerator)


if __name__ == "__main__":
    log_to_console()
    run(tyro.cli(StdConfig, description=__doc__))
