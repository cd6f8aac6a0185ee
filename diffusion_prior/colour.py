"""Colour correction against the first reference photograph."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

MIN_STD = 1e-5
"""Floor of a frame's standard deviation, so that a frame of one colour stays finite."""


def match_first_reference(
    frames: Float[Tensor, "t 3 h w"], reference: Float[Tensor, "3 h2 w2"]
) -> Float[Tensor, "t 3 h w"]:
    """Give every frame the per-channel mean and standard deviation of the first reference (3DGS-Enhancer, section 4.2).

    I' = (I - mean(I)) / std(I) * std(ref) + mean(ref). The result is not clamped.

    Args:
        frames: decoded frames, [0, 1].
        reference: the first reference photograph, [0, 1], of any size.
    """
    mean = frames.mean(dim=(-2, -1), keepdim=True)
    std = frames.std(dim=(-2, -1), keepdim=True, correction=0).clamp(min=MIN_STD)
    reference_mean = reference.mean(dim=(-2, -1), keepdim=True)
    reference_std = reference.std(dim=(-2, -1), keepdim=True, correction=0)
    return (frames - mean) / std * reference_std + reference_mean
