"""Pictures and exact depth of procedural scenes, by casting rays (Open3D's Embree)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import open3d as o3d
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nerfstudio_enhancer.procedural.layout import Scene, Solid, View
from nerfstudio_enhancer.procedural.textures import TEXTURE_PX

OVERSAMPLING = 1.5
"""Rays along a pixel's side, against jagged edges; textures are read as blurred as they have to be."""

OFFSET = 2e-3
"""How far above a surface a ray to the sun begins, so that nothing shadows itself."""

HIGHLIGHT_POWER = 30


@dataclass(frozen=True)
class Picture:
    """What a view shows."""

    rgb: Float[Tensor, "h w 3"]
    """Linear in the light and not limited to 1."""
    depth: Float[Tensor, "h w"]
    """Along the optical axis, in world units; infinite where the sky is."""


@dataclass(frozen=True)
class _Hits:
    distance: Float[Tensor, " n"]
    """Along the ray; infinite where it meets nothing."""
    solid: Int[Tensor, " n"]
    """Number of what is met."""
    normal: Float[Tensor, "n 3"]
    """Of the surface, towards where the ray comes from."""


class Renderer:
    """Casts rays into one scene."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._rays = o3d.t.geometry.RaycastingScene()
        for solid in scene.solids:
            vertices = (solid.mesh.vertices * solid.half) @ solid.turn.T + solid.centre
            self._rays.add_triangles(_tensor(vertices.astype(np.float32)), _tensor(solid.mesh.triangles))

    def render(self, view: View, width: int, height: int) -> Picture:
        """A view's picture.

        Args:
            view: camera.
            width: of the picture in pixels; the optical axis goes through its middle.
            height: of the picture in pixels.
        """
        fine = (round(height * OVERSAMPLING), round(width * OVERSAMPLING))
        focal = focal_px(self._scene.field_of_view, fine[1], fine[0])
        row, column = torch.meshgrid(torch.arange(fine[0]) + 0.5, torch.arange(fine[1]) + 0.5, indexing="ij")
        straight = torch.stack(
            [(column - fine[1] / 2) / focal, (row - fine[0] / 2) / focal, torch.ones_like(row)], dim=-1
        )
        length = straight.norm(dim=-1).flatten()
        direction = (straight.view(-1, 3) / length[:, None]) @ torch.from_numpy(view.axes).float().T
        origin = torch.from_numpy(view.centre).float().expand_as(direction)
        hits = self._cast(origin, direction)
        rgb = self._shade(origin, direction, hits, pixel_angle=1 / focal)
        picture = F.interpolate(rgb.view(1, *fine, 3).permute(0, 3, 1, 2), size=(height, width), mode="area")
        rows, columns = (((torch.arange(to) + 0.5) * of / to).long() for to, of in zip((height, width), fine))
        depth = (hits.distance / length).view(fine)[rows][:, columns]
        return Picture(picture[0].permute(1, 2, 0), depth)

    def _cast(self, origin: Float[Tensor, "n 3"], direction: Float[Tensor, "n 3"]) -> _Hits:
        found = self._rays.cast_rays(_tensor(torch.cat([origin, direction], dim=1).numpy()), nthreads=1)
        normal = F.normalize(torch.from_numpy(found["primitive_normals"].numpy().copy()), dim=1)
        away = (normal * direction).sum(dim=1, keepdim=True) > 0
        return _Hits(
            torch.from_numpy(found["t_hit"].numpy().copy()),
            torch.from_numpy(found["geometry_ids"].numpy().astype(np.int64)),
            torch.where(away, -normal, normal),
        )

    def _shade(
        self, origin: Float[Tensor, "n 3"], direction: Float[Tensor, "n 3"], hits: _Hits, pixel_angle: float
    ) -> Float[Tensor, "n 3"]:
        colours = self._sky(direction)
        met = hits.distance.isfinite()
        for number in hits.solid[met].unique().tolist():
            here = met & (hits.solid == number)
            at = origin[here] + direction[here] * hits.distance[here, None]
            colours[here] = self._surface(
                self._scene.solids[number], at, direction[here], hits.distance[here] * pixel_angle, hits.normal[here]
            )
        return colours

    def _sky(self, direction: Float[Tensor, "n 3"]) -> Float[Tensor, "n 3"]:
        up = (direction[:, 2:] * 0.5 + 0.5).clamp(0, 1)
        return self._scene.sky[0] * (1 - up) + self._scene.sky[1] * up

    def _surface(
        self,
        solid: Solid,
        at: Float[Tensor, "n 3"],
        direction: Float[Tensor, "n 3"],
        pixel: Float[Tensor, " n"],
        normal: Float[Tensor, "n 3"],
    ) -> Float[Tensor, "n 3"]:
        """Colours of a solid's points, seen along a direction, with pixels of a size there."""
        place = _texture_place(solid, at, normal)
        slant = -(normal * direction).sum(dim=1)
        footprint = pixel / slant.clamp(min=0.15).sqrt() / solid.texture_side * TEXTURE_PX
        own = solid.texture.at(place, footprint)
        light = self._scene.light
        # What looks up gets more of the light from everywhere, and one side more than the other.
        around = light.ambient * (0.62 + 0.27 * normal[:, 2] + 0.1 * normal[:, 0])
        to_sun = (normal @ light.to_sun).clamp(min=0)
        lit = self._reached(at + normal * OFFSET, to_sun > 0) if light.sun > 0 else torch.zeros_like(around)
        halfway = F.normalize(light.to_sun - direction, dim=1)
        highlight = 0.6 * solid.gloss * lit * (normal * halfway).sum(dim=1).clamp(min=0) ** HIGHLIGHT_POWER
        return own * (around + 1.1 * light.sun * lit * to_sun)[:, None] + highlight[:, None]

    def _reached(self, at: Float[Tensor, "n 3"], facing: Bool[Tensor, " n"]) -> Float[Tensor, " n"]:
        """1 where the sun reaches a point, of those that face it."""
        to_sun = self._scene.light.to_sun.expand(int(facing.sum()), 3)
        rays = torch.cat([at[facing], to_sun], dim=1)
        free = ~self._rays.test_occlusions(_tensor(rays.numpy()), nthreads=1).numpy()
        lit = torch.zeros(len(at))
        lit[facing] = torch.from_numpy(free).float()
        return lit


def _tensor(values: np.ndarray) -> o3d.core.Tensor:
    return o3d.core.Tensor.from_numpy(np.ascontiguousarray(values))


def focal_px(field_of_view: float, width: int, height: int) -> float:
    """Focal length in pixels, from the angle in degrees that the longer side covers."""
    return max(width, height) / 2 / math.tan(math.radians(field_of_view) / 2)


def _texture_place(solid: Solid, at: Float[Tensor, "n 3"], normal: Float[Tensor, "n 3"]) -> Float[Tensor, "n 2"]:
    """Places in sides of the texture, which is thrown onto the solid along that of its axes which the surface faces most."""
    turn = torch.from_numpy(solid.turn).float()
    own = (at - torch.from_numpy(solid.centre).float()) @ turn / solid.texture_side
    facing = (normal @ turn).abs().argmax(dim=1)
    first = torch.where(facing == 0, own[:, 1], own[:, 0])
    second = torch.where(facing == 2, own[:, 1], own[:, 2])
    return torch.stack([first, second], dim=1)
