"""Train the VAE: photographs, and renders too since the condition is encoded, through latents and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import tyro
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from diffusion_prior.conditioning import encode_frames, to_signed
from diffusion_prior.data.clips import ClipBatch, ClipConfig, ClipDataset, to_float
from diffusion_prior.prior import VideoPrior
from diffusion_prior.seeded import seeded
from diffusion_prior.std import SpatialTemporalDecoder
from diffusion_prior.training.config import UNET_SETTINGS, TrainingConfig
from diffusion_prior.training.loop import Losses, Task, Validation, make_accelerator, train
from diffusion_prior.training.objectives import kl_to_unit_normal, perceptual_distance
from diffusion_prior.training.setup import (
    fit_to_prior,
    fixed_clips,
    log_to_console,
    starting_prior,
    training_gaps,
    write_prior,
)
from diffusion_prior.training.validation import judge

VALIDATION_FRAMES = 5


@dataclass
class VaeConfig(TrainingConfig):
    """Training of the VAE."""

    clips: ClipConfig = field(default_factory=lambda: ClipConfig(num_frames=4, batch_size=2, crop_px=160))
    """Which clips are drawn, and how they are varied."""
    lpips_weight: float = 0.1
    """Weight of LPIPS beside the absolute error of pictures in [-1, 1]."""
    kl_weight: float = 1e-3
    """Weight of the divergence of the latents from unit normals, in nats per element."""
    render_probability: float = 0.3
    """Share of the clips in which renders are reconstructed instead of photographs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.scale.refuse((*UNET_SETTINGS, "encode_frames"), "the training of the VAE")


class VaeLosses(Losses):
    """Reconstruction of clips."""

    def __init__(self, prior: VideoPrior, config: VaeConfig) -> None:
        super().__init__()
        self.vae = prior.vae
        self.patch_size = prior.config.patch_size
        self.config = config

    def forward(self, batch: ClipBatch, generator: torch.Generator, progress: float, player: str) -> dict[str, Tensor]:
        """L1 + LPIPS + KL of one batch."""
        device = self.vae.device
        rendered = torch.rand(batch.rgb.shape[0], generator=generator) < self.config.render_probability
        stored = torch.where(rendered[:, None, None, None, None], batch.rgb, batch.target)
        frames = to_signed(to_float(stored.to(device)))
        flat = rearrange(frames, "b t c h w -> (b t) c h w")
        pixels = F.pixel_unshuffle(flat, self.patch_size).contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(pixels).latent_dist  # pyright: ignore[reportAttributeAccessIssue]  # diffusers' union
        mean = posterior.mean.float()
        noise = torch.randn(mean.shape, generator=generator).to(device)
        latents = mean + posterior.std.float() * noise
        decoded = self.vae.decode(latents, num_frames=frames.shape[1], return_dict=False)[0]
        pred = F.pixel_shuffle(decoded.float(), self.patch_size)
        parts = {
            "l1": (pred - flat).abs().mean(),
            "lpips": perceptual_distance(pred, flat),
            "kl": kl_to_unit_normal(mean, posterior.logvar.float()),
        }
        loss = parts["l1"] + self.config.lpips_weight * parts["lpips"] + self.config.kl_weight * parts["kl"]
        return {"loss": loss, **parts}


class VaeTask(Task):
    """The VAE's training; the STD starts anew from the trained decoder."""

    name = "vae"

    def __init__(self, config: VaeConfig, prior: VideoPrior) -> None:
        self.config = config
        self.prior = prior
        self.losses = VaeLosses(prior, config)
        self._validation = fixed_clips(config, VALIDATION_FRAMES, config.clips.size_multiple)

    def dataset(self, rank: int, world_size: int) -> ClipDataset:
        """Clips of the training scenes."""
        return ClipDataset(training_gaps(self.config), self.config.clips, self.config.seed, rank, world_size)

    def validate(self) -> Validation:
        """Reconstructed photographs beside the photographs (and, as in every training, the renders)."""
        metrics, sheet = judge(self._validation, {"reconstruction": self._reconstruct(lambda clip: clip.target)})
        metrics |= {"latent_std": float(self._latents().std())}
        return Validation(metrics, sheet)

    def finish(self) -> VideoPrior:
        """The prior with the latents' scale recorded and an STD that equals the new decoder."""
        with torch.no_grad():
            self.prior.set_latent_scale(1.0 / float(self._latents().std()))
        std = self.prior.std
        with seeded(self.config.seed):
            self.prior.std = SpatialTemporalDecoder.from_vae(
                self.prior.vae, self.prior.config.patch_size, tuple(std.config["condition_widths"])
            )
        return self.prior

    def _latents(self) -> Float[Tensor, " n"]:
        """Unscaled latents of the validation clips' photographs and renders, all in a row."""
        frames = [source for clip in self._validation for source in (clip.target[0], clip.rgb[0])]
        device, patch = self.prior.device, self.prior.config.patch_size
        latents = [encode_frames(self.prior.vae, to_float(rgb.to(device)), patch).float().flatten() for rgb in frames]
        return torch.cat(latents)

    def _reconstruct(self, source: Callable[[ClipBatch], Tensor]) -> Callable[[ClipBatch, int], Tensor]:
        def reconstruct(clip: ClipBatch, number: int) -> Tensor:
            rgb = to_float(source(clip)[0].to(self.prior.device))
            return self.prior.decode_stock(encode_frames(self.prior.vae, rgb, self.prior.config.patch_size)).cpu()

        return reconstruct


def run(config: VaeConfig) -> None:
    """Train the VAE and write the prior."""
    accelerator = make_accelerator(config)
    prior = starting_prior(config, accelerator.device)
    config = fit_to_prior(config, prior)
    task = VaeTask(config, prior)
    train(task, config, accelerator)
    write_prior(task.finish(), config, accelerator)


if __name__ == "__main__":
    log_to_console()
    run(tyro.cli(VaeConfig, description=__doc__))
