"""Axes and layouts: the only place of the plugin that turns OpenGL into OpenCV cameras and channels-last into channels-first images.

nerfstudio keeps camera-to-world matrices with OpenGL axes (x right, y up, z backward) and images as [t h w c].
Rasteriser, stereo and video prior want world-to-camera matrices with OpenCV axes (x right, y down, z forward) and
images as [t c h w].
"""

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor

from diffusion_prior.axes import flip_camera_axes


def as_4x4(transform: Shaped[Tensor, "*b r 4"]) -> Shaped[Tensor, "*b 4 4"]:
    """Complete a 3x4 rigid transform by the row (0, 0, 0, 1); a 4x4 matrix is returned unchanged.

    Raises:
        ValueError: the matrices have neither 3 nor 4 rows.
    """
    rows = transform.shape[-2]
    if rows == 4:
        return transform
    if rows != 3:
        raise ValueError(f"A transform must be 3x4 or 4x4, got shape {tuple(transform.shape)}.")
    last_row = transform.new_tensor([0, 0, 0, 1]).expand(*transform.shape[:-2], 1, 4)
    return torch.cat([transform, last_row], dim=-2)


def world_to_camera_opencv(camera_to_world: Shaped[Tensor, "*b r 4"]) -> Shaped[Tensor, "*b 4 4"]:
    """OpenCV world-to-camera (viewmat) of an OpenGL camera-to-world, which must be rigid (3x4 or 4x4)."""
    return _rigid_inverse(flip_camera_axes(as_4x4(camera_to_world)))


def camera_to_world_opengl(world_to_camera: Shaped[Tensor, "*b r 4"]) -> Shaped[Tensor, "*b 4 4"]:
    """OpenGL camera-to-world of an OpenCV world-to-camera (viewmat): the inverse of `world_to_camera_opencv`."""
    return flip_camera_axes(_rigid_inverse(as_4x4(world_to_camera)))


def camera_to_world_opencv(camera_to_world: Shaped[Tensor, "*b r 4"]) -> Shaped[Tensor, "*b 4 4"]:
    """The same camera-to-world with OpenCV axes instead of OpenGL axes; its own inverse."""
    return flip_camera_axes(as_4x4(camera_to_world))


def to_channels_first(images: Shaped[Tensor, "*t h w c"]) -> Shaped[Tensor, "*t c h w"]:
    """Nerfstudio's image layout [t h w c] to the layout of the video prior, [t c h w]."""
    return rearrange(images, "... h w c -> ... c h w")


def to_channels_last(images: Shaped[Tensor, "*t c h w"]) -> Shaped[Tensor, "*t h w c"]:
    """The video prior's image layout [t c h w] to nerfstudio's, [t h w c]."""
    return rearrange(images, "... c h w -> ... h w c")


def _rigid_inverse(transform: Shaped[Tensor, "*b 4 4"]) -> Shaped[Tensor, "*b 4 4"]:
    """Inverse of a rotation and translation, without a matrix inversion and its rounding."""
    rotation = transform[..., :3, :3].mT
    translation = -rotation @ transform[..., :3, 3:]
    return as_4x4(torch.cat([rotation, translation], dim=-1))
