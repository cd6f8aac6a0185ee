"""What the trainings minimise; pure functions."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from diffusion_prior.conditioning import LatentCondition, to_unit
from diffusion_prior.noise import expand_to, loss_weight
from diffusion_prior.perceptual import lpips_alex

LossKind = Literal["l1", "l2", "authors"]
"""How denoised latents are compared, see `denoising_loss`."""


def learning_rate_factor(step: int, progress: float, warmup_steps: int) -> float:
    """Linear warm-up times half a cosine from 1 to 0.

    Args:
        step: steps done so far.
        progress: share of the training that is done, [0, 1].
        warmup_steps: length of the warm-up.
    """
    warmup = min(1.0, (step + 1) / (warmup_steps + 1))
    return warmup * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))


def ema_decay_at(step: int, decay: float) -> float:
    """Decay of the running average after `step` steps: (1 + step) / (10 + step), at most `decay`."""
    return min(decay, (1 + step) / (10 + step))


def perceptual_distance(pred: Float[Tensor, "*b 3 h w"], target: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, ""]:
    """Mean LPIPS of pictures in [-1, 1]; values outside are clamped."""
    flat = (rearrange(to_unit(rgb).clamp(0, 1), "... c h w -> (...) c h w") for rgb in (pred, target))
    return lpips_alex(*flat).mean()


def kl_to_unit_normal(mean: Float[Tensor, "*shape"], log_variance: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1), mean over the elements, in nats."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def denoising_loss(
    denoised: Float[Tensor, "b f c h w"],
    clean: Float[Tensor, "b f c h w"],
    sigma: Float[Tensor, " b"],
    kind: LossKind,
) -> Float[Tensor, ""]:
    """Weighted error of the denoised latents (EDM section 5, sigma_data = 1).

    Args:
        denoised: D(x; sigma).
        clean: the scaled latents that noise was added to.
        sigma: noise level of every clip.
        kind: l2 weighs squared errors by w = (1 + sigma^2) / sigma^2, so that every noise level counts alike. l1 weighs
            absolute errors by the root of w, to the same end. authors: absolute errors by w itself, as the authors' code of
            3DGS-Enhancer does; the network's own error then counts sqrt(w) times, at low noise most.
    """
    weight = expand_to(loss_weight(sigma), clean)
    error = denoised - clean
    if kind == "l2":
        return (weight * error.square()).mean()
    return ((weight if kind == "authors" else weight.sqrt()) * error.abs()).mean()


def draw_dropped_clips(count: int, probability: float, generator: torch.Generator) -> Bool[Tensor, " b"]:
    """Which clips lose the condition of their middle frames."""
    return torch.rand(count, generator=generator) < probability


def drop_middle_frames(condition: LatentCondition, dropped: Bool[Tensor, " b"]) -> LatentCondition:
    """Zero the condition of all frames between the first and the last, in the chosen clips (3DGS-Enhancer, appendix)."""
    frames = condition.latents.shape[1]
    middle = torch.zeros(frames, dtype=torch.bool, device=condition.latents.device)
    middle[1:-1] = True
    keep = ~(dropped.to(middle.device)[:, None] & middle)

    def masked(values: Tensor) -> Tensor:
        return values * keep.reshape(*keep.shape, *([1] * (values.ndim - 2))).to(values.dtype)

    return LatentCondition(
        latents=masked(condition.latents),
        extra=masked(condition.extra),
        embeddings=masked(condition.embeddings),
        micro=condition.micro,
    )


def discriminator_hinge(
    real_scores: Float[Tensor, "*shape"], fake_scores: Float[Tensor, "*shape"]
) -> Float[Tensor, ""]:
    """Hinge loss of the discriminator: real above 1, made below -1."""
    return 0.5 * (F.relu(1 - real_scores).mean() + F.relu(1 + fake_scores).mean())


def generator_hinge(fake_scores: Float[Tensor, "*shape"]) -> Float[Tensor, ""]:
    """What the generator adds to its loss: minus the mean score of what it made."""
    return -fake_scores.mean()


def psnr(pred: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
    """Peak signal-to-noise ratio of each picture in [0, 1], in dB; at most 100."""
    error = (pred.clamp(0, 1) - target).square().mean(dim=(1, 2, 3))
    return -10 * torch.log10(error.clamp(min=1e-10))
