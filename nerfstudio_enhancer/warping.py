"""Reference photographs as another camera would see them, through the depth that the splats show there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras
from torch import Tensor

from diffusion_prior.types import WARP_CHANNELS
from nerfstudio_enhancer.conventions import camera_to_world_opencv, world_to_camera_opencv
from nerfstudio_enhancer.projection import NEAREST, back_project, project
from nerfstudio_enhancer.rendering import render_clip

if TYPE_CHECKING:
    from nerfstudio_enhancer.enhance_step import References
    from nerfstudio_enhancer.model import EnhancerModel

WARPED_REFERENCES = 2
"""Photographs kept for each pixel, best first."""
CANDIDATES = 4
"""References nearest to a camera which are tried."""
DEPTH_TOLERANCE = 0.05
"""Relative difference between a point's depth in a reference and the depth shown there at which it counts half as seen."""
SEEN = 0.5
"""A reference that sees a pixel less well than this does not count."""
TURN_WEIGHT = 1.0
"""How much a turn of one radian counts against nearness, in mean distances between a camera and the references."""


@dataclass(frozen=True)
class WarpSources:
    """Reference photographs with the splats' depth at each, on any device: of many, a camera is shown a few."""

    photographs: list[Float[Tensor, "_h _w 3"]]
    """sRGB in [0, 1]; sizes may differ."""
    depths: list[Float[Tensor, "_h _w 1"]]
    """Depth of the splats at the reference, along its optical axis, world units."""
    cameras: Cameras
    """Shape [k], of the photographs' sizes."""
    usable: list[Float[Tensor, "_h _w 1"]] | None = None
    """1 where a photograph may be used, 0 where a mask or transparency leaves it out; None: everywhere."""

    @classmethod
    def of(cls, model: EnhancerModel, references: References) -> WarpSources:
        """Render the splats' depth at every reference."""
        cameras = references.cameras
        views = (cameras[i : i + 1].to(model.device) for i in range(len(references.photographs)))
        depths = [render_clip(model, view).depth[0].cpu() for view in views]
        return cls(references.photographs, depths, cameras, references.usable)


def warp_references(
    depth: Float[Tensor, "t h w 1"],
    alpha: Float[Tensor, "t h w 1"],
    cameras: Cameras,
    sources: WarpSources,
) -> Float[Tensor, "t warps h w"]:
    """What the references show of the surfaces that each camera sees.

    Every pixel is put at its depth and looked up in the nearest references. A reference counts as seeing it where the splats
    show the same depth from there. Where depth is right, the references agree with each other; where it is wrong,
    they differ: either tells the prior something.

    Args:
        depth: of the splats at the cameras, along the optical axis, world units.
        alpha: accumulated opacity in [0, 1].
        cameras: shape [t], one size.
        sources: reference photographs and the splats' depth there.

    Returns:
        `ConditionClip.warped`: for each of `WARPED_REFERENCES`, the nearest reference that sees the pixel first, r, g, b and seen.
    """
    return torch.stack([_warped(depth[i], alpha[i], cameras[i : i + 1], sources) for i in range(len(depth))])


def _warped(depth: Tensor, alpha: Tensor, camera: Cameras, sources: WarpSources) -> Float[Tensor, "warps h w"]:
    points = back_project(depth[..., 0], _intrinsics(camera), camera_to_world_opencv(camera.camera_to_worlds.cpu())[0])
    slots = depth.new_zeros(WARPED_REFERENCES, WARP_CHANNELS, *depth.shape[:2])
    for index in nearest_references(camera, sources.cameras):
        looked_up = _looked_up(points, index, sources)
        looked_up[3] *= alpha[..., 0]
        left = looked_up[3] > SEEN
        for slot in slots:
            takes = left & (slot[3] == 0)
            slot.copy_(torch.where(takes, looked_up, slot))
            left = left & ~takes
    return slots.flatten(0, 1)


def seen_share(depth: Tensor, alpha: Tensor, cameras: Cameras, sources: WarpSources) -> float:
    """Share of the cameras' pixels that some reference sees, in [0, 1]; arguments as those of `warp_references`."""
    best = warp_references(depth, alpha, cameras, sources)[:, WARP_CHANNELS - 1]
    return float((best > SEEN).float().mean())


def frame_difference(rgb: Tensor, depth: Tensor, alpha: Tensor, cameras: Cameras) -> float | None:
    """How much a clip's frames differ from the ones before them where both show the same surface: flicker.

    Every pixel is looked up in the frame before through its depth, as references are looked up.

    Args:
        rgb: the frames, sRGB in [0, 1]. [t h w 3]
        depth: of the splats, which says what is the same surface. [t h w 1]
        alpha: accumulated opacity in [0, 1]. [t h w 1]
        cameras: of the frames, shape [t].

    Returns:
        Mean absolute difference of the colours in [0, 1]; None for a single frame, or where no surface is shown twice.
    """
    differences, weights = [], []
    for i in range(1, len(rgb)):
        sources = WarpSources([rgb[i - 1]], [depth[i - 1]], cameras[i - 1 : i])
        warped = warp_references(depth[i : i + 1], alpha[i : i + 1], cameras[i : i + 1], sources)[0]
        both = warped[WARP_CHANNELS - 1] > SEEN
        differences.append((warped[:3] - rgb[i].movedim(-1, 0)).abs().mean(0)[both].sum())
        weights.append(both.sum())
    shown = sum(map(int, weights))
    return float(sum(differences)) / shown if shown else None


def nearest_references(camera: Cameras, references: Cameras) -> list[int]:
    """Indices of the references nearest to a camera (shape [1]) in place and viewing direction, at most `CANDIDATES`."""
    own, theirs = camera.camera_to_worlds.cpu().double(), references.camera_to_worlds.cpu().double()
    distance = (theirs[:, :, 3] - own[:, :, 3]).norm(dim=-1)
    turn = torch.arccos((theirs[:, :, 2] * own[:, :, 2]).sum(-1).clamp(-1, 1))
    cost = distance / distance.mean().clamp(min=1e-12) + TURN_WEIGHT * turn
    return cost.argsort(stable=True)[:CANDIDATES].tolist()


def _looked_up(points: Float[Tensor, "h w 3"], index: int, sources: WarpSources) -> Float[Tensor, "4 h w"]:
    """Colour of each point in one reference, and how well it is seen there."""
    camera, photograph = sources.cameras[index : index + 1], sources.photographs[index]
    pixel, depth = project(points, _intrinsics(camera), world_to_camera_opencv(camera.camera_to_worlds.cpu())[0])
    height, width = photograph.shape[:2]
    grid = pixel / pixel.new_tensor([width, height]) * 2 - 1
    shown = sources.depths[index]
    usable = torch.ones_like(shown) if sources.usable is None else sources.usable[index]
    images = torch.cat([photograph, shown, usable], dim=-1).permute(2, 0, 1)[None].to(points)
    sampled = F.grid_sample(images, grid[None], padding_mode="border", align_corners=False)[0]
    colour, shown, usable = sampled.split([3, 1, 1])
    inside = (grid.abs().amax(-1) <= 1) & (depth > NEAREST)
    difference = (shown[0] / depth.clamp(min=NEAREST) - 1) / DEPTH_TOLERANCE
    return torch.cat([colour, inside * usable / (1 + difference**2)])


def _intrinsics(camera: Cameras) -> Float[Tensor, "3 3"]:
    return camera.get_intrinsics_matrices()[0].cpu()
