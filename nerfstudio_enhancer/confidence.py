"""Image- and pixel-level confidence of enhanced views (3DGS-Enhancer, section 4.3), and what the references say of them.

The paper leaves the normalisation open. Ours: both levels are first brought to [0, 1], then mixed with a floor, then divided
by their mean over the round, so that switching a level on moves weight between views and pixels and never changes the
total weight of the enhanced views.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_prior.types import WARP_CHANNELS

PIXEL_QUANTILE = 0.95
"""Share of pixels whose scale product counts as less than full confidence; above it the map saturates at 1."""

CONTRADICTION = 0.05
"""Mean absolute difference of colours in [0, 1], beyond that of the render, at which a pixel keeps half of its weight."""
AGREEMENT_WINDOW_PX = 5
"""Side of the window over which differences are averaged: a shift of a pixel is no contradiction."""


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


def reference_agreement(
    rgb: Float[Tensor, "t h w 3"], render: Float[Tensor, "t h w 3"], warped: Float[Tensor, "t warps h w"]
) -> Float[Tensor, "t h w 1"]:
    """How far the references let each enhanced pixel stand: 1 where none contradicts it, towards 0 where all that see it do.

    A frame may leave the render, but not away from what a reference shows of the same surface. By how much it lies farther
    from the reference than the render did is its excess x: the agreement is 1 / (1 + (x / `CONTRADICTION`)^2), and the
    reference that agrees best counts. Pixels that no reference sees are trusted as those that one sees are in the mean: what
    contradicts the references where they can tell is not to be believed beside.

    Args:
        rgb: enhanced frames of one clip, sRGB in [0, 1].
        render: what the splats showed.
        warped: `ConditionClip.warped` of the same frames.
    """
    least = torch.full_like(rgb[..., :1], torch.inf)
    for slot in warped.to(rgb).split(WARP_CHANNELS, dim=1):
        reference, seen = slot.movedim(1, -1).split([3, 1], dim=-1)
        excess = _window_mean((rgb - reference).abs() - (render - reference).abs())
        least = torch.where(seen > 0.5, torch.minimum(least, excess), least)
    checked = least.isfinite()
    agreement = 1 / (1 + (least.clamp(min=0) / CONTRADICTION) ** 2)
    believed = agreement[checked].mean() if checked.any() else agreement.new_ones(())
    return torch.where(checked, agreement, believed)


def _window_mean(difference: Float[Tensor, "t h w 3"]) -> Float[Tensor, "t h w 1"]:
    """Mean over colours and over a window around each pixel, within the picture."""
    mean = difference.mean(-1)[:, None]
    half = AGREEMENT_WINDOW_PX // 2
    return F.avg_pool2d(mean, AGREEMENT_WINDOW_PX, 1, half, count_include_pad=False)[:, 0, ..., None]


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
