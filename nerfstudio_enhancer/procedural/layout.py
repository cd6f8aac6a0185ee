"""What stands where in a procedural scene, its light, and the cameras that see it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nerfstudio_enhancer.procedural.shapes import Mesh, ball, box, cylinder, rock, vase
from nerfstudio_enhancer.procedural.textures import Texture, TextureKind, draw_colour, draw_texture

Vector = np.ndarray | tuple[float | int, float | int, float | int]

UPRIGHT = np.eye(3)
GROUND_HALF = 60.0
"""Half side of the ground, so large that its edge is out of sight."""

SKIN = 0.1
"""Half thickness of walls."""


@dataclass(frozen=True)
class Solid:
    """A textured mesh in the world."""

    mesh: Mesh
    centre: np.ndarray
    """[3] in the world, whose third axis points up."""
    half: np.ndarray
    """[3] half sides along its own axes."""
    turn: np.ndarray
    """[3, 3] from its own axes to the world's."""
    texture: Texture
    texture_side: float
    """Length in the world that the texture covers."""
    gloss: float
    """Strength of the highlight."""


@dataclass(frozen=True)
class Light:
    """A sun, which throws shadows, and light from everywhere."""

    to_sun: Float[Tensor, "3"]
    """Direction of the sun."""
    sun: float
    """Brightness of the sun on what faces it; 0: overcast or indoors, without shadows."""
    ambient: float
    """Brightness of what the sun does not reach."""


@dataclass(frozen=True)
class View:
    """A camera in OpenCV axes: x right, y down, z ahead."""

    centre: np.ndarray
    """[3] in the world."""
    axes: np.ndarray
    """[3, 3] its axes as columns."""


@dataclass
class Scene:
    """A scene while it is built, and then to be rendered."""

    generator: np.random.Generator
    photographs: Sequence[Path] = ()
    """Files that textures are cut out of."""
    solids: list[Solid] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    light: Light = field(init=False)
    sky: Float[Tensor, "2 3"] = field(init=False)
    """Colours at the horizon's lower end and overhead."""
    field_of_view: float = field(init=False)
    """Along the longer side, in degrees."""
    nearest: float = 0.35
    """A view of which more than a quarter is nearer than this is blocked."""

    def __post_init__(self) -> None:
        draw = self.generator
        turn, height = draw.uniform(0, 2 * math.pi), draw.uniform(0.35, 1.4)
        to_sun = [math.cos(turn) * math.cos(height), math.sin(turn) * math.cos(height), math.sin(height)]
        sun = float(draw.choice([0, 0.3, 0.6, 0.9]))
        self.light = Light(torch.tensor(to_sun, dtype=torch.float32), sun, 1 - 0.6 * sun)
        blue = torch.tensor([0.55, 0.65, 0.85]) * float(draw.uniform(0.7, 1.1))
        overcast = torch.full((3,), float(draw.uniform(0.8, 1.6)))  # often brighter than a photograph can show
        self.sky = torch.stack([draw_colour(draw) * 0.5 + 0.4, blue]) if draw.random() < 0.5 else overcast.expand(2, 3)
        self.field_of_view = float(draw.uniform(45, 75))

    def texture(self, kinds: Sequence[TextureKind] | None = None) -> Texture:
        """A new texture."""
        return draw_texture(self.generator, self.photographs, kinds)

    def add(
        self,
        mesh: Mesh,
        centre: Vector,
        half: Vector,
        turn: np.ndarray | None = None,
        texture: Texture | None = None,
        texture_side: float | None = None,
        gloss: float | None = None,
    ) -> None:
        """Add a solid; what is not given is drawn."""
        draw, half = self.generator, np.asarray(half, dtype=np.float64)
        if turn is None:
            turn = self.any_turn()
        if texture is None:
            texture = self.texture()
        if texture_side is None:
            texture_side = 2 * float(half.max()) * math.exp(draw.uniform(math.log(0.3), math.log(2)))
        if gloss is None:
            gloss = float(draw.choice([0, 0, 0, 0.3, 0.7]))
        self.solids.append(Solid(mesh, np.asarray(centre, dtype=np.float64), half, turn, texture, texture_side, gloss))

    def upright_turn(self) -> np.ndarray:
        """About the vertical."""
        angle = self.generator.uniform(0, 2 * math.pi)
        return np.array([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0], [0, 0, 1]])

    def any_turn(self) -> np.ndarray:
        """About the vertical, or in one of three cases anyhow."""
        if self.generator.random() > 1 / 3:
            return self.upright_turn()
        axes, _ = np.linalg.qr(self.generator.normal(size=(3, 3)))
        return axes * np.sign(np.linalg.det(axes))


def draw_scene(generator: np.random.Generator, photographs: Sequence[Path], num_views: int) -> Scene:
    """A scene of one of four kinds: things on a table or floor, buildings and trees, a street front, the inside of a room."""
    scene = Scene(generator, photographs)
    builders = (_build_table, _build_outdoors, _build_room, _build_street)
    builders[int(generator.choice(len(builders), p=[1 / 3, 1 / 4, 1 / 4, 1 / 6]))](scene, num_views)
    return scene


def _build_table(scene: Scene, num_views: int) -> None:
    draw = scene.generator
    _ground(scene, draw.uniform(1.5, 10))
    if draw.random() < 0.6:
        _walls(scene, draw.uniform(3.2, 7), draw.uniform(3.2, 7), draw.uniform(2.5, 4))
        scene.light = Light(scene.light.to_sun, 0.0, 1.0)
    height = 0.0
    if draw.random() < 0.6:
        height = draw.uniform(0.3, 0.8)
        top = box() if draw.random() < 0.5 else cylinder()
        scene.add(top, (0, 0, height / 2), (draw.uniform(0.8, 1.4), draw.uniform(0.7, 1.3), height / 2),
                  scene.upright_turn(), gloss=0.0)  # fmt: skip
    _thing(scene, (0, 0, height), draw.uniform(0.4, 0.8))
    for _ in range(draw.integers(1, 6)):
        _thing(scene, (draw.normal(0, 0.5), draw.normal(0, 0.5), height), draw.uniform(0.1, 0.4))
    for _ in range(draw.integers(2, 11)):
        far = draw.random() < 0.5
        distance, angle = draw.uniform(3.2, 6) if far else draw.uniform(1.8, 2.8), draw.uniform(0, 2 * math.pi)
        size = draw.uniform(0.3, 0.9) * (1.5 if far else 1)
        _thing(scene, (distance * math.cos(angle), distance * math.sin(angle), 0), size)
    _orbit(scene, num_views, np.array([0, 0, height + 0.4]), draw.uniform(1.7, 2.9), furthest=2.9)


def _build_outdoors(scene: Scene, num_views: int) -> None:
    draw = scene.generator
    scene.nearest = 0.7
    _ground(scene, draw.uniform(2, 12))
    for _ in range(draw.integers(2, 7)):
        _thing(scene, (draw.normal(0, 1.2), draw.normal(0, 1.2), 0), draw.uniform(0.5, 1.6))
    for _ in range(draw.integers(4, 13)):
        distance, angle = draw.uniform(7, 25), draw.uniform(0, 2 * math.pi)
        place = (distance * math.cos(angle), distance * math.sin(angle), 0)
        if draw.random() < 0.6:
            _building(scene, place, draw.uniform(1.5, 5), scene.upright_turn())
        else:
            _thing(scene, place, draw.uniform(1, 4))
    _orbit(scene, num_views, np.array([0, 0, draw.uniform(0.4, 1.2)]), draw.uniform(3.5, 6), furthest=6.0)


def _build_street(scene: Scene, num_views: int) -> None:
    draw = scene.generator
    scene.nearest = 0.6
    _ground(scene, draw.uniform(2, 8))
    edge = -12.0
    while edge < 12:
        width = draw.uniform(1.5, 4)
        _building(scene, (edge + width, draw.uniform(8, 9.5), 0), width, UPRIGHT)
        edge += 2 * width + float(draw.choice([0, 0, 0.5, 1.5]))
    for _ in range(draw.integers(2, 10)):
        _thing(scene, (draw.uniform(-6, 6), draw.uniform(2, 5), 0), draw.uniform(0.3, 1.2))
    length = draw.uniform(3, 6)
    inward = draw.uniform(0.4, 0.6)
    for along, sway in _along_the_path(draw, num_views):
        place = (2 * along - 1) * length
        centre = np.array([place, -1 + 0.6 * sway[0], 1.6 + 0.3 * sway[1]])
        _look(scene, centre, np.array([inward * place + 0.4 * sway[2], 6, 1.5 + 0.3 * sway[3]]))


def _build_room(scene: Scene, num_views: int) -> None:
    draw = scene.generator
    _ground(scene, draw.uniform(1.5, 10))
    half_width, half_depth, height = draw.uniform(2.5, 5), draw.uniform(2.5, 5), draw.uniform(2.3, 3.5)
    _walls(scene, half_width, half_depth, height)
    scene.light = Light(scene.light.to_sun, 0.0, 1.0)
    for _ in range(draw.integers(6, 17)):
        angle, out = draw.uniform(0, 2 * math.pi), draw.uniform(0.6, 1.05, 2)
        place = np.array([math.cos(angle) * half_width, math.sin(angle) * half_depth]) * out
        limit = np.array([half_width, half_depth]) - 0.3
        _thing(scene, (*np.clip(place, -limit, limit), 0), draw.uniform(0.25, 0.75))
    start, arc = draw.uniform(0, 2 * math.pi), float(draw.choice([1.2, 2, 3.2, 5, 6.28]))
    for along, sway in _along_the_path(draw, num_views):
        angle = start + arc * along
        centre = np.array([
            0.3 * half_width * math.cos(0.7 * angle) + 0.1 * sway[0],
            0.3 * half_depth * math.sin(0.7 * angle) + 0.1 * sway[1],
            0.5 * height + 0.15 * sway[2],
        ])  # fmt: skip
        ahead = angle + 0.2 * sway[3]
        _look(scene, centre, centre + np.array([math.cos(ahead), math.sin(ahead), -0.15 + 0.15 * sway[4]]))


def _ground(scene: Scene, texture_side: float) -> None:
    half = (GROUND_HALF, GROUND_HALF, 1)
    scene.add(box(), (0, 0, -1), half, UPRIGHT, texture_side=texture_side, gloss=0.0)


def _walls(scene: Scene, half_width: float, half_depth: float, height: float) -> None:
    """Four walls with pictures, doors or shelves on them, and a ceiling."""
    draw = scene.generator
    alike = scene.texture() if draw.random() < 0.5 else None
    half = np.array([half_width, half_depth])
    for axis in (0, 1):
        for side in (-1, 1):
            centre, size = np.array([0, 0, height / 2]), np.array([*half, height / 2])
            centre[axis], size[axis] = side * (half[axis] + SKIN), SKIN
            scene.add(box(), centre, size, UPRIGHT, alike, draw.uniform(2, 2 * half.max()), gloss=0.0)
            for _ in range(draw.integers(0, 5)):
                place, size = np.zeros(3), np.zeros(3)
                place[axis] = side * (half[axis] - draw.uniform(0, 0.15))
                place[1 - axis] = draw.uniform(-0.85, 0.85) * half[1 - axis]
                place[2] = draw.uniform(0.3, 0.9) * height
                size[axis], size[1 - axis] = draw.uniform(0.03, 0.25), draw.uniform(0.2, 1.2)
                size[2] = draw.uniform(0.08, 0.3) * height
                scene.add(box(), place, size, UPRIGHT, gloss=0.0)
    ceiling = scene.texture(["plain"])
    scene.add(box(), (0, 0, height + SKIN), (*half, SKIN), UPRIGHT, ceiling, 3.0, gloss=0.0)


def _building(scene: Scene, place: Vector, half_width: float, turn: np.ndarray) -> None:
    """A block with rows of windows on two sides."""
    draw = scene.generator
    half = np.array([half_width, draw.uniform(1.5, 5), draw.uniform(1.5, 6)])
    place = np.asarray(place, dtype=np.float64)
    scene.add(box(), _above(place, half[2]), half, turn, texture_side=draw.uniform(2, 8), gloss=0.0)
    if draw.random() > 0.7:
        return
    pane, gloss, out = scene.texture(), float(draw.choice([0, 0.5])), float(draw.choice([0, 0.02, 0.1]))
    columns, rows = int(draw.integers(1, 6)), int(draw.integers(1, 5))
    for column in range(columns):
        for row in range(rows):
            for side in (-1, 1):
                across = turn @ np.array([(2 * (column + 0.5) / columns - 1) * half[0], side * (half[1] + out), 0])
                centre = _above(place + across, (row + 0.5) / rows * 2 * half[2])
                size = (0.45 * half[0] / columns, 0.05, 0.5 * half[2] / rows)
                scene.add(box(), centre, size, turn, pane, gloss=gloss)


def _thing(scene: Scene, place: Vector, size: float) -> None:
    """Something that stands at a place: [3], the middle of its foot."""
    things = (_crate, _vessel, _boulder, _tower, _heap, _bush, _desk, _figure)
    share = np.array([3, 2.5, 1, 2, 3, 2, 1.5, 1.5])
    thing = things[int(scene.generator.choice(len(things), p=share / share.sum()))]
    thing(scene, np.asarray(place, dtype=np.float64), size)


def _above(foot: np.ndarray, height: float) -> np.ndarray:
    return foot + np.array([0, 0, height])


def _crate(scene: Scene, foot: np.ndarray, size: float) -> None:
    half = size * scene.generator.uniform([0.3, 0.3, 0.3], [1, 1, 1.3])
    scene.add(box(), _above(foot, half[2]), half, scene.upright_turn())


def _vessel(scene: Scene, foot: np.ndarray, size: float) -> None:
    radius, height = size * scene.generator.uniform([0.2, 0.4], [0.8, 1.1])
    scene.add(vase(scene.generator), _above(foot, height), (radius, radius, height), scene.upright_turn())


def _boulder(scene: Scene, foot: np.ndarray, size: float) -> None:
    half = size * scene.generator.uniform(0.4, 0.9, 3)
    scene.add(rock(scene.generator), _above(foot, 0.9 * half[2]), half, scene.upright_turn())


def _tower(scene: Scene, foot: np.ndarray, size: float) -> None:
    draw = scene.generator
    turn, textures = scene.upright_turn(), [scene.texture() for _ in range(2)]
    for _ in range(draw.integers(2, 6)):
        half = size * draw.uniform([0.2, 0.2, 0.1], [0.7, 0.7, 0.6])
        mesh = (box, cylinder, cylinder, ball)[int(draw.integers(4))]()
        scene.add(mesh, _above(foot, half[2]), half, turn, textures[int(draw.integers(2))])
        foot = _above(foot, 2 * half[2])


def _heap(scene: Scene, foot: np.ndarray, size: float) -> None:
    draw = scene.generator
    textures = [scene.texture() for _ in range(3)]
    for _ in range(draw.integers(3, 10)):
        half = size * draw.uniform(0.1, 0.45, 3)
        moved = size * draw.normal(0, 0.4, 3)
        moved[2] = abs(moved[2]) + 0.6 * half.min()
        mesh = (box(), cylinder(), rock(draw), vase(draw))[int(draw.integers(4))]
        scene.add(mesh, foot + moved, half, texture=textures[int(draw.integers(3))])


def _bush(scene: Scene, foot: np.ndarray, size: float) -> None:
    draw = scene.generator
    leaves: list[TextureKind] = ["plain", "tinted", "photograph"]
    textures = [scene.texture(leaves) for _ in range(2)]
    height = size * draw.uniform(0.6, 1.5)
    stem = (0.08 * size, 0.08 * size, height / 2)
    scene.add(cylinder(), _above(foot, height / 2), stem, UPRIGHT)
    for _ in range(draw.integers(8, 23)):
        half = size * draw.uniform(0.1, 0.35) * np.array([1, *draw.uniform(0.5, 1, 2)])
        centre = _above(foot, height) + size * draw.normal(0, [0.35, 0.35, 0.3])
        scene.add(rock(draw), centre, half, texture=textures[int(draw.integers(2))])


def _desk(scene: Scene, foot: np.ndarray, size: float) -> None:
    draw = scene.generator
    turn, texture = scene.upright_turn(), scene.texture()
    width, depth, height = size * draw.uniform([0.5, 0.4, 0.5], [1.2, 0.9, 0.9])
    thick = 0.05 * size
    scene.add(box(), _above(foot, height), (width, depth, thick), turn, texture)
    for across in (-0.9, 0.9):
        for along in (-0.9, 0.9):
            leg = turn @ np.array([across * width, along * depth, 0])
            scene.add(box(), _above(foot + leg, height / 2), (thick, thick, height / 2), turn, texture)
    if draw.random() < 0.7:
        _thing(scene, _above(foot, height + thick), 0.4 * size)


def _figure(scene: Scene, foot: np.ndarray, size: float) -> None:
    """A body with a head and two arms."""
    draw = scene.generator
    turn, clothes = scene.upright_turn(), scene.texture()
    height = size * draw.uniform(0.9, 1.4)
    scene.add(cylinder(), _above(foot, 0.45 * height), (0.25 * size, 0.18 * size, 0.45 * height), turn, clothes)
    head = (0.2 * size, 0.2 * size, 0.25 * size)
    scene.add(rock(draw), _above(foot, 1.1 * height), head, turn, scene.texture(["plain"]))
    for side in (-0.35, 0.35):
        arm = turn @ np.array([side * size, 0, 0])
        scene.add(cylinder(), _above(foot + arm, 0.6 * height), (0.08 * size, 0.08 * size, 0.35 * height),
                  texture=clothes)  # fmt: skip


def _orbit(scene: Scene, num_views: int, focus: np.ndarray, radius: float, furthest: float) -> None:
    """Cameras on an arc about a focus, some nearer and higher than others."""
    draw = scene.generator
    start, arc = draw.uniform(0, 2 * math.pi), float(draw.choice([1.2, 2, 3.2, 5, 6.28]))
    height, swing = draw.uniform(0.1, 0.8), draw.uniform(0.02, 0.3)
    for along, sway in _along_the_path(draw, num_views):
        angle = start + arc * along + 0.05 * sway[0]
        distance = min(radius * (1 + 0.12 * sway[1]), furthest)
        elevation = min(1.3, max(0.02, height + swing * sway[2]))
        out = [math.cos(angle) * math.cos(elevation), math.sin(angle) * math.cos(elevation), math.sin(elevation)]
        _look(scene, focus + distance * np.array(out), focus + 0.05 * radius * sway[3:6])


def _along_the_path(draw: np.random.Generator, num_views: int) -> list[tuple[float, np.ndarray]]:
    """How far along its path each camera is, from 0 to 1, and six numbers about 1 large by which it sways."""
    waves, phase = np.array([1, 2, 0.7, 1.5, 2.3, 0.9]), draw.uniform(0, 2 * math.pi, 6)
    along = np.linspace(0, 1, num_views)
    return [(float(a), np.sin(2 * math.pi * waves * a + phase) + draw.normal(0, 0.25, 6)) for a in along]


def _look(scene: Scene, centre: np.ndarray, at: np.ndarray) -> None:
    """Add a view from a place towards another, a little rolled."""
    ahead = (at - centre) / np.linalg.norm(at - centre)
    right = np.cross(ahead, [0, 0, 1])
    right /= np.linalg.norm(right)
    roll = scene.generator.normal(0, 0.03)
    down = np.cross(ahead, right)
    right, down = right * math.cos(roll) + down * math.sin(roll), down * math.cos(roll) - right * math.sin(roll)
    scene.views.append(View(centre, np.stack([right, down, ahead], axis=1)))
