"""Image- and pixel-level confidence of enhanced views (3DGS-Enhancer, section 4.3).

The paper leaves the normalisation open. Ours: both levels are first brought to [0, 1], then mixed with a floor, then divided
by their mean over the round, so that switching a level on moves weight between views and pixels and never changes the
total weight of the enhanced views.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PIXEL_QUANTILE = 0.95
"""Share of pixels whose scale product counts as less than full confidence; above it the map saturates at 1."""


def image_confidence(
    centres: Float[Tensor, "t 3"], reference_centres: Float[Tensor, "k 3"], floor: float = 0.0
) -> Float[Tensor, " t"]:
    """Weight of each enhanced view: distance to the nearest reference view, farther = higher (I_c in the paper).

    Args:
        centres: camera centres of the enhanced views, world units.
        reference_centres: camera centres of the reference views, world units.
        floor: in [0, 1); weight of a view that stands on a reference, relative to the farthest one.

    Returns:
        Weights of mean 1. All ones when every view is equally far.
    """
    distance = torch.cdist(centres, reference_centres).amin(dim=1)
    return _with_floor_and_mean_one(distance / distance.max().clamp(min=1e-12), floor)


def pixel_confidence(
    scale_map: Float[Tensor, "t h w 3"], alpha: Float[Tensor, "t h w 1"] | None = None, floor: float = 0.0
) -> Float[Tensor, "t h w 1"]:
    """Weight of each pixel: cube root of the product of the composited scales, P_c = cbrt(C_0 C_1 C_2).

    Large Gaussians stand where the references say little, so a large P_c lets the enhanced pixel count more. Where no
    Gaussian is (alpha below 0.5), the composited scale is small although nothing is known: there P_c is 1 before the floor.

    Args:
        scale_map: scale vectors of the Gaussians (world units, positive) composited as if they were colours.
        alpha: accumulated opacity in [0, 1]; holes count as fully unknown. None leaves them as they are.
        floor: in [0, 1); weight of the best reconstructed pixel relative to the worst.

    Returns:
        Weights of mean 1 over all frames.
    """
    confidence = relative_pixel_scale(scale_map)
    if alpha is not None:
        confidence = torch.where(alpha < 0.5, torch.ones_like(confidence), confidence)
    return _with_floor_and_mean_one(confidence, floor)


def pixel_scale(scale_map: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 1"]:
    """Geometric mean of the three composited scales, world units."""
    return scale_map.clamp(min=0).prod(dim=-1, keepdim=True).pow(1 / 3)


def relative_pixel_scale(scale_map: Float[Tensor, "*b 3"]) -> Float[Tensor, "*b 1"]:
    """`pixel_scale` over its own quantile `PIXEL_QUANTILE`, at most 1."""
    scale = pixel_scale(scale_map)
    return (scale / _quantile(scale, PIXEL_QUANTILE).clamp(min=1e-12)).clamp(max=1.0)


def _with_floor_and_mean_one(confidence: Tensor, floor: float) -> Tensor:
    if not 0 <= floor < 1:
        raise ValueError(f"The confidence floor must lie in [0, 1), got {floor}.")
    floored = floor + (1 - floor) * confidence
    mean = floored.mean()
    return floored / mean if mean > 1e-12 else torch.ones_like(floored)


def _quantile(values: Tensor, q: float) -> Tensor:
    """Quantile of all values; torch.quantile refuses more than 16 million."""
    rank = max(1, min(values.numel(), round(q * values.numel())))
    return values.flatten().kthvalue(rank).values
