"""Sampling with a denoiser: Euler steps and classifier-free guidance that grows over the frames."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents, sigma as a 0-d tensor) -> denoised latents of the same shape."""


def sample_euler(
    denoise: Denoiser, noise: Float[Tensor, "*shape"], sigmas: Float[Tensor, " n"]
) -> Float[Tensor, "*shape"]:
    """Euler's method on the probability flow ODE (EDM algorithm 1 without the second-order correction).

    Args:
        denoise: estimate of the clean sample at a noise level.
        noise: unit normal noise.
        sigmas: falling noise levels that end in 0, see `noise.karras_sigmas`.
    """
    sample = noise * sigmas[0]
    for sigma, next_sigma in itertools.pairwise(sigmas):
        denoised = denoise(sample, sigma)
        # (EDM eq. 4) dx/dsigma = (x - D) / sigma; written so that the last step, next_sigma = 0, gives D exactly.
        ratio = next_sigma / sigma
        sample = denoised + ratio * (sample - denoised)
    return sample


def sample_heun(
    denoise: Denoiser, noise: Float[Tensor, "*shape"], sigmas: Float[Tensor, " n"]
) -> Float[Tensor, "*shape"]:
    """Heun's method on the same ODE (EDM algorithm 1): second order, two passes a step but for the last."""
    sample = noise * sigmas[0]
    for sigma, next_sigma in itertools.pairwise(sigmas):
        denoised = denoise(sample, sigma)
        ratio = next_sigma / sigma
        predicted = denoised + ratio * (sample - denoised)
        if next_sigma > 0:
            slope, next_slope = (sample - denoised) / sigma, (predicted - denoise(predicted, next_sigma)) / next_sigma
            predicted = sample + (next_sigma - sigma) * (slope + next_slope) / 2
        sample = predicted
    return sample


def sample_dpm_2m(
    denoise: Denoiser, noise: Float[Tensor, "*shape"], sigmas: Float[Tensor, " n"]
) -> Float[Tensor, "*shape"]:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order from the step before, one pass a step."""
    sample = noise * sigmas[0]
    before: Tensor | None = None
    step_before: Tensor | None = None
    for sigma, next_sigma in itertools.pairwise(sigmas):
        denoised = denoise(sample, sigma)
        ratio = next_sigma / sigma
        step = -ratio.log()  # the step in log-SNR / 2; infinite for the last, which needs no extrapolation
        estimate = denoised
        if before is not None and step_before is not None and next_sigma > 0:
            weight = step / (2 * step_before)
            estimate = (1 + weight) * denoised - weight * before
        sample = estimate + ratio * (sample - estimate)
        before, step_before = denoised, step
    return sample


SAMPLERS = {"euler": sample_euler, "heun": sample_heun, "dpm++2m": sample_dpm_2m}
"""Solvers by the names of `SamplingConfig.sampler`."""


def frame_guidance(num_frames: int, min_guidance: float, max_guidance: float) -> Float[Tensor, " t"]:
    """Guidance scale of every frame, rising linearly over the clip as in SVD."""
    return torch.linspace(min_guidance, max_guidance, num_frames)


def guide(
    conditional: Float[Tensor, "*b t c h w"],
    unconditional: Float[Tensor, "*b t c h w"],
    guidance: Float[Tensor, " t"],
) -> Float[Tensor, "*b t c h w"]:
    """Classifier-free guidance: unconditional + guidance * (conditional - unconditional), one scale per frame."""
    return unconditional + guidance.to(conditional)[:, None, None, None] * (conditional - unconditional)
