"""Pinhole projection of whole pictures: pixels to points and back. OpenCV axes; the first pixel's centre is (0.5, 0.5)."""

import torch
from jaxtyping import Float
from torch import Tensor


def pixel_centres(height: int, width: int, like: Tensor) -> Float[Tensor, "3 h w"]:
    """Homogeneous pixel centres (u, v, 1), of the dtype and on the device of `like`."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=like.device, dtype=like.dtype) + 0.5,
        torch.arange(width, device=like.device, dtype=like.dtype) + 0.5,
        indexing="ij",
    )
    return torch.stack([columns, rows, torch.ones_like(rows)])


def back_project(
    depth: Float[Tensor, "h w"], intrinsics: Float[Tensor, "3 3"], camera_to_world: Float[Tensor, "4 4"]
) -> Float[Tensor, "h w 3"]:
    """The point that each pixel shows, of the depth's dtype.

    Args:
        depth: along the optical axis, world units; the camera's centre comes of 0.
        intrinsics: pinhole matrix in pixels.
        camera_to_world: OpenCV axes; with the identity the points are in the camera's axes.
    """
    rays = torch.linalg.inv(intrinsics.double()).to(depth)
    in_camera = torch.einsum("ij,jhw->hwi", rays, pixel_centres(*depth.shape, like=depth)) * depth[..., None]
    pose = camera_to_world.to(depth)
    return in_camera @ pose[:3, :3].T + pose[:3, 3]


def project(
    points: Float[Tensor, "h w 3"], intrinsics: Float[Tensor, "3 3"], world_to_camera: Float[Tensor, "4 4"]
) -> tuple[Float[Tensor, "h w 2"], Float[Tensor, "h w"]]:
    """Where a camera sees points, of the points' dtype.

    Returns:
        Pixels (u, v), without meaning where the depth is not positive; depth along the optical axis.
    """
    pose = world_to_camera.to(points)
    in_camera = points @ pose[:3, :3].T + pose[:3, 3]
    homogeneous = in_camera @ intrinsics.to(points).T
    return homogeneous[..., :2] / homogeneous[..., 2:].clamp(min=NEAREST), in_camera[..., 2]


NEAREST = 1e-9
"""Depths below this are behind the camera, world units."""
