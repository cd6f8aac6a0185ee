"""Rasterisation of Gaussians on any device, and the loss that goes with it."""

from nerfstudio_enhancer.rasterize.dispatch import backend_name, rasterization
from nerfstudio_enhancer.rasterize.ssim import fused_ssim

__all__ = ["backend_name", "fused_ssim", "rasterization"]
