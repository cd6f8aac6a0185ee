"""The confidence-weighted photometric loss (3DGS-Enhancer, eq. 9)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nerfstudio_enhancer.rasterize import fused_ssim


def confidence_weighted_photometric(
    rendered: Float[Tensor, "h w 3"],
    target: Float[Tensor, "h w 3"],
    pixel_confidence: Float[Tensor, "h w 1"],
    image_confidence: float,
    ssim_lambda: float,
) -> Float[Tensor, ""]:
    """L = I_c ((1 - lambda) mean(P_c |C - C^|) + lambda (1 - SSIM)); with I_c = P_c = 1 it is splatfacto's loss.

    Args:
        rendered: image of the splats, sRGB in [0, 1].
        target: enhanced view, sRGB in [0, 1].
        pixel_confidence: P_c, any non-negative weight; mean 1 keeps the total weight.
        image_confidence: I_c, any non-negative weight.
        ssim_lambda: share of the D-SSIM term, in [0, 1].
    """
    l1 = (pixel_confidence * torch.abs(target - rendered)).mean()
    dssim = 1 - fused_ssim(rendered.permute(2, 0, 1)[None], target.permute(2, 0, 1)[None])
    return image_confidence * ((1 - ssim_lambda) * l1 + ssim_lambda * dssim)


def depth_loss(
    depth: Float[Tensor, "h w 1"],
    alpha: Float[Tensor, "h w 1"],
    known: Float[Tensor, "h w 1"],
    certainty: Float[Tensor, "h w 1"],
) -> Float[Tensor, ""]:
    """Mean of |log depth - log known depth| over the pixels, each weighted by its opacity and the certainty.

    The logarithm makes it free of the scene's scale, and one far splat counts no more than one near by.

    Args:
        depth: expected depth of the render, world units, > 0 where something is seen.
        alpha: accumulated opacity in [0, 1]; no gradient flows into it.
        known: depth to be had; without meaning where the certainty is 0.
        certainty: in [0, 1].
    """
    weight = alpha.detach() * certainty
    ratio = torch.log(depth.clamp(min=DEPTH_FLOOR)) - torch.log(known.clamp(min=DEPTH_FLOOR))
    return (weight * ratio.abs()).sum() / weight.sum().clamp(min=1.0)


def disparity_smoothness(depth: Float[Tensor, "h w 1"], photograph: Float[Tensor, "h w 3"]) -> Float[Tensor, ""]:
    """Mean change of disparity between neighbouring pixels, less where the photograph changes too.

    Disparity is relative to that of the picture's median depth, so that the scene's scale does not matter (edge-aware
    smoothness, Godard et al. 2017, eq. 5). It ties surfaces without texture together and leaves floaters no place.

    Args:
        depth: expected depth of the render, world units, > 0 where something is seen.
        photograph: what was seen there, sRGB in [0, 1].
    """
    disparity = (depth.detach().median() / depth.clamp(min=DEPTH_FLOOR)).clamp(max=MAX_DISPARITY)[..., 0]
    total = disparity.new_zeros(())
    for axis in (0, 1):
        edge = photograph.diff(dim=axis).abs().mean(-1)
        total = total + (disparity.diff(dim=axis).abs() * torch.exp(-edge / SMOOTHNESS_EDGE)).mean()
    return total


def ray_spread(moments: Float[Tensor, "h w 2"], alpha: Float[Tensor, "h w 1"]) -> Float[Tensor, ""]:
    """Mean over the pixels of alpha times the standard deviation of disparity along the ray.

    The deviation is relative to the picture's mean disparity, so that the scene's scale does not matter. Splats that share
    a ray are drawn to one surface (as the distortion loss of Mip-NeRF 360, eq. 15, does). The variance itself would let few
    rays that see something near through something far outweigh all others.

    Args:
        moments: disparity and its square, composited like colours over nothing.
        alpha: accumulated opacity in [0, 1]; no gradient flows into it where it weighs pixels.
    """
    opacity = alpha[..., 0]
    first, second = (moments / alpha.clamp(min=SPREAD_ALPHA_FLOOR)).unbind(-1)
    weight = opacity.detach()
    unit = (first.detach() * weight).sum() / weight.sum().clamp(min=1.0)
    variance = (second - first**2).clamp(min=0) / unit.clamp(min=1 / DEPTH_CEILING) ** 2
    return (weight * (torch.sqrt(variance + SPREAD_FLOOR**2) - SPREAD_FLOOR)).mean()


DEPTH_CEILING = 1e6
"""Pictures on the mean farther than this are not told from empty ones, world units."""
SPREAD_ALPHA_FLOOR = 1e-3
"""Opacities below this count as this much: what lies along such rays is not seen."""
SPREAD_FLOOR = 0.01
"""Spread of disparity, relative to the picture's mean, below which a ray counts as one surface."""
DEPTH_FLOOR = 1e-6
"""Smallest depth that is told from others, world units."""
MAX_DISPARITY = 5.0
"""Disparities above this (times that of the median depth) are not told from each other."""
SMOOTHNESS_EDGE = 0.05
"""Mean difference of neighbouring colours in [0, 1] across which the pull weakens by e."""
