"""Cameras before a wall, on which every shift can be worked by hand."""

import torch
from nerfstudio.cameras.cameras import Cameras

from nerfstudio_enhancer.warping import WarpSources

SIZE = 8
DISTANCE = 2.0
"""Of the wall z = -2 from cameras in the plane z = 0, which look along -z."""


def cameras(*x: float) -> Cameras:
    """Cameras side by side, looking at the wall; a pixel is 0.25 wide there (distance 2, focal length 8)."""
    camera_to_world = torch.eye(4)[:3].repeat(len(x), 1, 1)
    camera_to_world[:, 0, 3] = torch.tensor(x)
    return Cameras(camera_to_world, fx=8.0, fy=8.0, cx=SIZE / 2, cy=SIZE / 2, width=SIZE, height=SIZE)


def wall(*x: float, depth: float = DISTANCE) -> WarpSources:
    photographs = [torch.rand(SIZE, SIZE, 3, generator=torch.Generator().manual_seed(i)) for i in range(len(x))]
    return WarpSources(photographs, [torch.full((SIZE, SIZE, 1), depth) for _ in x], cameras(*x))
