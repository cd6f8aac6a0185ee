"""Overlapping tiles of a picture, worked on one at a time and mixed without seams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from diffusion_prior.conditioning import LatentCondition, narrow_pose_conditions

TILE_OVERLAP = 1 / 4
"""Share of a tile's side that it has in common with its neighbour, at least."""


@dataclass(frozen=True)
class Tile:
    """A rectangle of a picture."""

    top: int
    left: int
    height: int
    width: int

    def of(self, frames: Tensor) -> Tensor:
        """The rectangle out of pictures [... h w]."""
        return frames[..., self.top : self.top + self.height, self.left : self.left + self.width]

    def times(self, factor: int) -> Tile:
        """The same rectangle in a picture that is larger by a factor."""
        return Tile(self.top * factor, self.left * factor, self.height * factor, self.width * factor)


def tile_grid(height: int, width: int, tile: tuple[int, int] | None) -> list[Tile]:
    """Tiles of one size that cover a picture and overlap by a quarter of a tile at least.

    Args:
        height: of the picture.
        width: of the picture.
        tile: height and width of a tile; None, or a picture no larger than one, gives the whole picture.
    """
    if tile is None:
        return [Tile(0, 0, height, width)]
    rows, columns = min(tile[0], height), min(tile[1], width)
    return [Tile(top, left, rows, columns) for top in _starts(height, rows) for left in _starts(width, columns)]


def blend_tiles(run: Callable[[Tile], Tensor], tiles: list[Tile], factor: int = 1) -> Tensor:
    """Run a function on each tile and mix the results with weights that fall linearly towards the tiles' edges.

    Args:
        run: tile -> pictures [... h w] of it, `factor` times its size.
        tiles: see `tile_grid`.
        factor: size of the result's pixels per unit of the tiles.
    """
    if len(tiles) == 1:
        return run(tiles[0])
    height = factor * max(tile.top + tile.height for tile in tiles)
    width = factor * max(tile.left + tile.width for tile in tiles)
    total: Tensor | None = None
    weight_sum: Tensor | None = None
    for tile in tiles:
        pictures = run(tile)
        if total is None or weight_sum is None:
            total = pictures.new_zeros(*pictures.shape[:-2], height, width)
            weight_sum = pictures.new_zeros(height, width)
        weight = _ramp(pictures.shape[-2], pictures)[:, None] * _ramp(pictures.shape[-1], pictures)
        large = tile.times(factor)
        large.of(total).add_(pictures * weight)
        large.of(weight_sum).add_(weight)
    assert total is not None
    assert weight_sum is not None
    return total / weight_sum


def crop_condition(condition: LatentCondition, tile: Tile) -> LatentCondition:
    """What the UNet is told about one tile: everything that has a place in the picture is cut, the rest stays.

    Layout A's field of view is narrowed to the tile's columns, as that of crops is in training (`data.clips.cut`).

    Args:
        condition: of the whole picture; columns that pad it to whole latents count as its own.
        tile: in latents.
    """
    size = condition.latents.shape[-2:]
    cut = {}
    if condition.micro.ndim == 3 and tile.width < size[1]:
        cut["micro"] = narrow_pose_conditions(condition.micro, tile.width, size[1])
    for entry in fields(condition):
        value = getattr(condition, entry.name)
        if isinstance(value, Tensor) and value.ndim == 5 and value.shape[-2:] == size:
            cut[entry.name] = tile.of(value)
    return replace(condition, **cut)


def _starts(length: int, tile: int) -> list[int]:
    if length <= tile:
        return [0]
    step = tile - max(1, int(tile * TILE_OVERLAP))
    count = -(-(length - tile) // max(1, step)) + 1
    return torch.linspace(0, length - tile, count).round().int().tolist()


def _ramp(length: int, like: Tensor) -> Tensor:
    position = torch.arange(length, device=like.device, dtype=torch.float32)
    return torch.minimum(position + 1, length - position).to(like.dtype)
