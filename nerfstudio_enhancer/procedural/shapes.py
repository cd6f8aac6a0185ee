"""Solids of procedural scenes as triangles within [-1, 1] on each axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SEGMENTS = 40
"""Of a circle."""


@dataclass(frozen=True)
class Mesh:
    """Triangles of a closed surface."""

    vertices: np.ndarray
    """[v, 3] float32."""
    triangles: np.ndarray
    """[t, 3] uint32, counter-clockwise seen from outside."""


def box() -> Mesh:
    """A cube of side 2."""
    corners = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float32)
    quads = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]
    return Mesh(corners, np.array([t for a, b, c, d in quads for t in ([a, b, c], [a, c, d])], dtype=np.uint32))


def revolved(radii: np.ndarray, heights: np.ndarray) -> Mesh:
    """A profile turned about the third axis; its first and last points lie on the axis.

    Args:
        radii: [n] of the profile's points from the bottom up; the first and the last are taken for 0.
        heights: [n] of the same points.
    """
    angle = np.arange(SEGMENTS) / SEGMENTS * 2 * np.pi
    inner = slice(1, -1)
    rings = np.stack(
        [np.outer(radii[inner], np.cos(angle)), np.outer(radii[inner], np.sin(angle)),
         np.repeat(heights[inner, None], SEGMENTS, axis=1)], axis=-1,
    )  # fmt: skip
    ends = np.array([[0, 0, heights[0]], [0, 0, heights[-1]]])
    vertices = np.concatenate([ends, rings.reshape(-1, 3)]).astype(np.float32)
    here = np.arange(SEGMENTS)
    beside = (here + 1) % SEGMENTS
    triangles = [np.stack([np.zeros_like(here), 2 + beside, 2 + here], axis=1)]
    for ring in range(len(radii) - 3):
        low, high = 2 + ring * SEGMENTS, 2 + (ring + 1) * SEGMENTS
        triangles.append(np.stack([low + here, low + beside, high + beside], axis=1))
        triangles.append(np.stack([low + here, high + beside, high + here], axis=1))
    top = 2 + (len(radii) - 3) * SEGMENTS
    triangles.append(np.stack([np.ones_like(here), top + here, top + beside], axis=1))
    return Mesh(vertices, np.concatenate(triangles).astype(np.uint32))


def cylinder() -> Mesh:
    """Of radius 1 and height 2."""
    return revolved(np.array([0, 1, 1, 0]), np.array([-1, -1, 1, 1]))


def ball() -> Mesh:
    """Of radius 1."""
    latitude = np.linspace(-np.pi / 2, np.pi / 2, SEGMENTS // 2 + 1)
    return revolved(np.cos(latitude), np.sin(latitude))


def vase(generator: np.random.Generator) -> Mesh:
    """Something turned: bottles, bowls, cones, pillars."""
    knots = generator.uniform(0.15, 1, 5)
    heights = np.linspace(-1, 1, 17)
    smooth = np.interp(heights, np.linspace(-1, 1, 5), knots)
    radii = np.concatenate([[0], smooth / smooth.max(), [0]])
    return revolved(radii, np.concatenate([[-1], heights, [1]]))


def rock(generator: np.random.Generator) -> Mesh:
    """A ball with dents and bumps."""
    mesh = ball()
    direction = generator.normal(0, 2.5, (6, 3))
    phase = generator.uniform(0, 2 * np.pi, 6)
    size = generator.uniform(0.02, 0.1)
    radius = 1 + size * np.sin(mesh.vertices @ direction.T + phase).sum(axis=1, keepdims=True)
    vertices = mesh.vertices * radius
    return Mesh((vertices / np.abs(vertices).max()).astype(np.float32), mesh.triangles)
