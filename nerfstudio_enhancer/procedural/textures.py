"""Textures of procedural scenes: cut out of photographs, or noise and patterns."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

TEXTURE_PX = 256
"""Side of a texture; a power of two, so that it can be halved down to one pixel."""

SMALLEST_CUT = 0.12
"""Of a photograph's shorter side, that a texture shows."""

TextureKind = Literal["photograph", "tinted", "plain", "pattern"]


@dataclass(frozen=True)
class Texture:
    """A square picture that repeats mirrored, and its halved copies."""

    levels: tuple[Float[Tensor, "3 _ _"], ...]
    """In [0, 1], each half as large as the one before."""

    @classmethod
    def of(cls, picture: Float[Tensor, "3 s s"]) -> Texture:
        """With halved copies down to one pixel."""
        levels = [picture.clamp(0, 1)]
        while levels[-1].shape[-1] > 1:
            levels.append(F.avg_pool2d(levels[-1], 2))
        return cls(tuple(levels))

    def at(self, place: Float[Tensor, "n 2"], footprint: Float[Tensor, " n"]) -> Float[Tensor, "n 3"]:
        """Colours at places.

        Args:
            place: in sides of the texture; every other repetition is mirrored, so that there are no seams.
            footprint: pixels of the largest level that one pixel of the picture covers; a halved copy is read where it is more than one.
        """
        mirrored = 1 - (place.remainder(2) - 1).abs()
        level = footprint.clamp(min=1).log2().round().clamp(max=len(self.levels) - 1).long()
        colours = place.new_empty(len(place), 3)
        for number in level.unique().tolist():
            here = level == number
            grid = (mirrored[here] * 2 - 1)[None, None]
            picture = self.levels[number][None]
            colours[here] = F.grid_sample(picture, grid, padding_mode="border", align_corners=False)[0, :, 0].T
        return colours


def draw_texture(
    generator: np.random.Generator, photographs: Sequence[Path], kinds: Sequence[TextureKind] | None = None
) -> Texture:
    """A random texture.

    Args:
        generator: decides everything.
        photographs: files to cut out of; without any, all textures are noise and patterns.
        kinds: what it may be; by default mostly what photographs show.
    """
    if kinds is None:
        kind = str(generator.choice(["photograph", "tinted", "plain", "pattern"], p=[0.5, 0.25, 0.17, 0.08]))
    else:
        kind = str(generator.choice(list(kinds)))
    if not photographs and kind in ("photograph", "tinted"):
        kind = str(generator.choice(["plain", "pattern"]))
    if kind == "photograph":
        return Texture.of(_cut(generator, photographs))
    if kind == "tinted":
        grey = _cut(generator, photographs).mean(dim=0)
        return Texture.of(
            draw_colour(generator)[:, None, None] * (1 + generator.uniform(0.8, 2) * (grey - grey.mean()))
        )
    if kind == "plain":
        contrast = float(generator.choice([0.02, 0.06, 0.15]))
        return Texture.of(draw_colour(generator)[:, None, None] * (1 + contrast * _noise(generator)))
    return Texture.of(_pattern(generator) * (1 + 0.05 * _noise(generator)))


def draw_colour(generator: np.random.Generator) -> Float[Tensor, "3"]:
    """A random colour, more often pale than bright."""
    hue, saturation, value = generator.random(), generator.beta(1.2, 2.5), generator.beta(1.5, 1.5)
    return torch.tensor(colorsys.hsv_to_rgb(hue, saturation, value), dtype=torch.float32)


def _cut(generator: np.random.Generator, photographs: Sequence[Path]) -> Float[Tensor, "3 s s"]:
    path = photographs[int(generator.integers(len(photographs)))]
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    side = float(np.exp(generator.uniform(np.log(SMALLEST_CUT), 0))) * min(picture.size)
    left, top = (generator.uniform(0, length - side) for length in picture.size)
    box = (left, top, left + side, top + side)
    cut = np.array(picture.resize((TEXTURE_PX, TEXTURE_PX), Image.Resampling.BOX, box=box))
    return torch.from_numpy(cut).permute(2, 0, 1).float() / 255


def _noise(generator: np.random.Generator) -> Float[Tensor, "s s"]:
    """Noise of mean 0 and deviation 1 whose octaves fall off at a random rate."""
    falloff = generator.uniform(0.4, 0.8)
    total = torch.zeros(1, 1, TEXTURE_PX, TEXTURE_PX)
    for octave in range(1, 8):
        side = 2**octave
        waves = torch.from_numpy(generator.standard_normal((1, 1, side, side))).float()
        total += falloff**octave * F.interpolate(waves, size=TEXTURE_PX, mode="bilinear")
    return ((total - total.mean()) / total.std())[0, 0]


def _pattern(generator: np.random.Generator) -> Float[Tensor, "3 s s"]:
    """Two colours in squares, stripes, bricks or blots."""
    count = int(generator.choice([2, 4, 8, 16]))
    cell = TEXTURE_PX // count
    row, column = np.indices((TEXTURE_PX, TEXTURE_PX))
    kind = generator.choice(["squares", "stripes", "bricks", "blots"])
    if kind == "squares":
        first = (row // cell + column // cell) % 2 == 0
    elif kind == "stripes":
        first = column // cell % 2 == 0
    elif kind == "bricks":
        joint = max(2, cell // 8)
        shifted = column + (row // cell % 2) * cell
        first = (row % cell < joint) | (shifted % (2 * cell) < joint)
    else:
        first = _noise(generator).numpy() > generator.uniform(-0.5, 0.8)
    mask = torch.from_numpy(first)
    return torch.where(mask, draw_colour(generator)[:, None, None], draw_colour(generator)[:, None, None])
