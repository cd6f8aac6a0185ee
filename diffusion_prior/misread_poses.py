"""Poses as the authors' code of the pose-conditioned layout (A) read them."""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor


def misread_poses(camera_to_world: Float[Tensor, "t 3 4"]) -> Float[Tensor, "t 3 4"]:
    """Poses whose world-to-camera quaternions (w, x, y, z) were taken for (x, y, z, w), the translation kept.

    COLMAP writes the real part first; the authors' training and sampling hand its four numbers to a reader that wants it
    last. Weights trained on such poses need such poses.

    Args:
        camera_to_world: rigid poses, OpenCV axes.
    """
    world_to_camera = camera_to_world[..., :3].transpose(-1, -2)
    translation = -einsum(world_to_camera, camera_to_world[..., 3], "t i j, t j -> t i")
    w, x, y, z = quaternions(world_to_camera).unbind(-1)
    misread = rotations(torch.stack([z, w, x, y], dim=-1))  # real part last: (x y z w) <- (w x y z)
    centres = -einsum(misread, translation, "t i j, t i -> t j")
    return torch.cat([misread.transpose(-1, -2), centres[..., None]], dim=-1)


def quaternions(rotation: Float[Tensor, "t 3 3"]) -> Float[Tensor, "t 4"]:
    """Unit quaternions (w, x, y, z) of rotations, up to their sign (Bar-Itzhack 2000: a dominant eigenvector)."""
    r = rotation.double()
    trace = r[..., 0, 0] + r[..., 1, 1] + r[..., 2, 2]
    corner = torch.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], -1)
    matrix = torch.zeros(*r.shape[:-2], 4, 4, dtype=r.dtype, device=r.device)
    matrix[..., 0, 0] = trace
    matrix[..., 0, 1:] = matrix[..., 1:, 0] = corner
    matrix[..., 1:, 1:] = r + r.transpose(-1, -2) - trace[..., None, None] * torch.eye(3).to(r)
    return torch.linalg.eigh(matrix).eigenvectors[..., -1].to(rotation)


def rotations(quaternion: Float[Tensor, "t 4"]) -> Float[Tensor, "t 3 3"]:
    """Rotation matrices of quaternions (w, x, y, z) of any length but 0."""
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
