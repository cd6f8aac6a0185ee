"""Noise levels and preconditioning of EDM (Karras et al. 2022) as Stable Video Diffusion uses them: sigma_data = 1."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Preconditioning:
    """Factors around the network F: D(x; sigma) = skip * x + out * F(input * x; noise) (EDM eq. 7)."""

    skip: Float[Tensor, " *b"]
    out: Float[Tensor, " *b"]
    input: Float[Tensor, " *b"]
    noise: Float[Tensor, " *b"]


def precondition(sigma: Float[Tensor, " *b"]) -> Preconditioning:
    """EDM table 1 with sigma_data = 1 and the sign of SVD's v-prediction: c_out = -sigma / sqrt(sigma^2 + 1).

    Args:
        sigma: noise levels, > 0.
    """
    norm = torch.sqrt(sigma**2 + 1)
    return Preconditioning(skip=1 / norm**2, out=-sigma / norm, input=1 / norm, noise=torch.log(sigma) / 4)


def loss_weight(sigma: Float[Tensor, " *b"]) -> Float[Tensor, " *b"]:
    """Weight of the denoised sample's error, (1 + sigma^2) / sigma^2: one over c_out squared (EDM section 5)."""
    return (1 + sigma**2) / sigma**2


def lognormal_sigmas(
    count: int, generator: torch.Generator, log_mean: float = 0.7, log_std: float = 1.6
) -> Float[Tensor, " n"]:
    """Noise levels for training, ln sigma ~ N(log_mean, log_std) (SVD's values), on the generator's device."""
    return torch.exp(torch.randn(count, generator=generator, device=generator.device) * log_std + log_mean)


def karras_sigmas(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Float[Tensor, " n"]:
    """Falling noise levels of EDM eq. 5, `steps` of them from sigma_max to sigma_min, and a closing 0.

    Raises:
        ValueError: unless steps >= 1 and 0 < sigma_min < sigma_max.
    """
    _check_levels(steps, sigma_min, sigma_max)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


def exponential_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Float[Tensor, " n"]:
    """Falling noise levels evenly spaced in their logarithm, `steps` of them, and a closing 0; errors as in `karras_sigmas`."""
    _check_levels(steps, sigma_min, sigma_max)
    levels = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()
    return torch.cat([levels, levels.new_zeros(1)]).float()


def _check_levels(steps: int, sigma_min: float, sigma_max: float) -> None:
    if steps < 1:
        raise ValueError(f"sampling needs at least 1 step, got {steps}.")
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"noise levels need 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")


def add_noise(
    clean: Float[Tensor, "b ..."], noise: Float[Tensor, "b ..."], sigma: Float[Tensor, " b"]
) -> Float[Tensor, "b ..."]:
    """The noisy sample x = clean + sigma * noise, one sigma per clip."""
    return clean + expand_to(sigma, clean) * noise


def expand_to(value: Float[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Tensor:
    """`value` with trailing axes of length 1, so that it broadcasts against `like`."""
    return value.reshape(-1, *([1] * (like.ndim - 1)))
