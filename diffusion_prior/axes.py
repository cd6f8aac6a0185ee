"""Camera axes: the turn between OpenGL's (x right, y up, z backward), nerfstudio's and paired data's, and OpenCV's (x right, y down, z forward)."""

from __future__ import annotations

from jaxtyping import Shaped
from torch import Tensor


def flip_camera_axes(camera_to_world: Shaped[Tensor, "*b r 4"]) -> Shaped[Tensor, "*b r 4"]:
    """Camera-to-world matrices (3x4 or 4x4) with OpenCV instead of OpenGL axes, or back: half a turn of the camera about its x axis."""
    return camera_to_world * camera_to_world.new_tensor([1, -1, -1, 1])
