"""Step 4: camera paths between and around reference views; poses in, poses out.

Nothing here looks at a photograph, a splat or a test view. All poses are OpenGL camera-to-world matrices [3, 4].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial.transform import Rotation
from torch import Tensor

from nerfstudio_enhancer.focus import focus_of_axes


@dataclass
class TrajectoryConfig:
    """Which paths are planned and how many frames they have."""

    step: float = 0.08
    """Distance between two frames relative to the size of the scene; smaller makes more frames."""
    min_frames: int = 3
    """Smallest number of frames between two reference views."""
    max_frames: int = 14
    """Largest number of frames between two reference views."""
    max_total_frames: int = 60
    """Largest number of frames of all paths between references together; longer plans are thinned, then the shortest
    paths are left out."""
    close_loop: bool = True
    """Whether to go from the last reference back to the first where they are no farther apart than neighbours are."""
    turn_weight: float = 1.0
    """How much a turn of one radian counts in the order of the references, in mean distances between them."""
    perturbations: int = 0
    """Number of small loops around each reference view."""
    perturbation_frames: int = 4
    """Frames of such a loop."""
    perturbation_radius: float = 0.15
    """How far such a loop goes from its reference, relative to the size of the scene."""


@dataclass(frozen=True)
class Trajectory:
    """A camera path that begins and ends at reference views."""

    camera_to_world: Float[Tensor, "t 3 4"]
    """OpenGL axes; the first and the last pose are those of the references, bit for bit."""
    first: int
    """Index of the reference at which it begins."""
    last: int
    """Index of the reference at which it ends."""
    kind: str
    """`between` two references or `around` one."""


def plan_trajectories(
    camera_to_world: Float[Tensor, "k 3 4"], config: TrajectoryConfig, generator: torch.Generator
) -> list[Trajectory]:
    """Paths between neighbouring references along a short tour, then small loops around each.

    Args:
        camera_to_world: reference views in any order, at least one.
        config: numbers of frames, radii.
        generator: for the loops; the paths between references do not depend on it.

    Raises:
        ValueError: no reference view.
    """
    k = len(camera_to_world)
    if k == 0:
        raise ValueError("Paths need at least 1 reference view, got 0.")
    pairs = [pair for pair in _neighbours(camera_to_world, config) if not _same_view(camera_to_world, *pair)]
    frames = [
        num_frames_between(
            camera_to_world[i],
            camera_to_world[j],
            camera_to_world,
            step=config.step,
            min_frames=config.min_frames,
            max_frames=config.max_frames,
        )
        for i, j in pairs
    ]
    paths = [
        Trajectory(interpolate_views(camera_to_world[i], camera_to_world[j], n), i, j, "between")
        for (i, j), n in zip(pairs, _within_budget(frames, config))
        if n > 0
    ]
    size = scene_size(camera_to_world)
    focus = focus_of_axes(_centres(camera_to_world), _forward(camera_to_world))
    for i in range(k):
        distance = None if focus is None else float((focus - camera_to_world[i, :, 3].double()).norm())
        for _ in range(config.perturbations):
            radius = config.perturbation_radius * size
            loop = perturb_view(camera_to_world[i], config.perturbation_frames, radius, generator, distance)
            paths.append(Trajectory(loop, i, i, "around"))
    return paths


def order_reference_views(camera_to_world: Float[Tensor, "k 3 4"], turn_weight: float = 1.0) -> list[int]:
    """Indices along a short open tour over positions and viewing directions, from the end with the smaller index.

    The length of a step is its distance in units of the mean distance between two references, plus `turn_weight` times
    the angle between the viewing directions in radians. Nearest-neighbour tours from several starts are improved by
    reversing and moving parts (2-opt and or-opt) until nothing gets shorter.
    """
    k = len(camera_to_world)
    if k <= 2:
        return list(range(k))
    length = _step_lengths(camera_to_world, turn_weight)
    starts = np.unique(np.linspace(0, k - 1, min(k, MAX_STARTS)).round().astype(int))
    tours = [_improved(_nearest_neighbour_tour(length, int(start)), length) for start in starts]
    best = min(tours, key=lambda tour: (round(_tour_length(tour, length), 9), tour))
    return best if best[0] < best[-1] else best[::-1]


def interpolate_views(
    first: Float[Tensor, "3 4"], last: Float[Tensor, "3 4"], num_between: int
) -> Float[Tensor, "t 3 4"]:
    """Path of `num_between` evenly spaced views between two, with both of them at its ends.

    Rotations follow the shortest great arc (Slerp). Where the optical axes meet, the camera turns about that point: its
    place as seen from the camera changes evenly in direction and logarithmically in distance. Elsewhere the centre
    moves on a straight line. Swapping the views reverses the path.

    Raises:
        ValueError: `num_between` is negative.
    """
    if num_between < 0:
        raise ValueError(f"A path cannot have {num_between} views between its ends; pass 0 or more.")
    ends = torch.stack([first, last]).double()
    time = torch.linspace(0, 1, num_between + 2, dtype=torch.float64)
    rotation = _slerp(ends[:, :, :3], time)
    focus = focus_of_axes(ends[:, :, 3], _forward(ends), max_gap=0.25)
    if focus is None:
        centre = torch.lerp(ends[0, :, 3], ends[1, :, 3], time[:, None])
    else:
        offset = torch.einsum("kji,kj->ki", ends[:, :, :3], ends[:, :, 3] - focus)
        centre = focus + torch.einsum("tij,tj->ti", rotation, _interpolate_offset(offset, time))
    return _with_exact_ends(torch.cat([rotation, centre[..., None]], dim=-1), first, last)


def num_frames_between(
    first: Float[Tensor, "3 4"],
    last: Float[Tensor, "3 4"],
    camera_to_world: Float[Tensor, "k 3 4"],
    step: float = 0.08,
    min_frames: int = 3,
    max_frames: int = 14,
) -> int:
    """Number of frames between two views so that neighbouring frames are about `step` scene sizes apart.

    The way counts as the distance of the centres, or as the turn of the camera in radians where that is more.

    Args:
        first: one end of the path.
        last: the other end.
        camera_to_world: all reference views, for the size of the scene.
        step: distance between frames relative to the size of the scene.
        min_frames: lower bound.
        max_frames: upper bound.
    """
    distance = float((first[:, 3] - last[:, 3]).double().norm()) / scene_size(camera_to_world)
    cosine = float((_forward(first[None]) * _forward(last[None])).sum())
    way = max(distance, math.acos(min(1.0, max(-1.0, cosine))))
    return min(max_frames, max(min_frames, round(way / step) - 1))


def perturb_view(
    camera_to_world: Float[Tensor, "3 4"],
    num_between: int,
    radius: float,
    generator: torch.Generator,
    focus_distance: float | None = None,
) -> Float[Tensor, "t 3 4"]:
    """Loop of `num_between` views around a reference, which is its beginning and its end.

    The centre runs once round a circle of diameter `radius` through the reference's centre. The circle faces the
    camera and is tilted at random; its direction is random too.

    Args:
        camera_to_world: the reference view.
        num_between: number of views on the loop.
        radius: largest distance from the reference, in world units.
        generator: chooses the circle.
        focus_distance: if given, the camera keeps looking at the point so far ahead; else it keeps its direction.
    """
    if num_between < 0:
        raise ValueError(f"A loop cannot have {num_between} views; pass 0 or more.")
    angle, tilt = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    phi, depth = 2 * math.pi * angle, tilt - 0.5
    away = torch.tensor([math.cos(phi), math.sin(phi), depth], dtype=torch.float64)
    aside = torch.tensor([-math.sin(phi), math.cos(phi), 0.0], dtype=torch.float64)
    time = 2 * math.pi * torch.linspace(0, 1, num_between + 2, dtype=torch.float64)
    away = away / away.norm()
    in_camera = 0.5 * radius * ((1 - time.cos())[:, None] * away + time.sin()[:, None] * aside)
    rotation, centre = camera_to_world[:, :3].double(), camera_to_world[:, 3].double()
    rotations = rotation.expand(len(time), 3, 3)
    if focus_distance is not None:
        rotations = rotation @ _turns_towards(in_camera, focus_distance)
    path = torch.cat([rotations, (centre + in_camera @ rotation.T)[..., None]], dim=-1)
    return _with_exact_ends(path, camera_to_world, camera_to_world)


def scene_size(camera_to_world: Float[Tensor, "k 3 4"]) -> float:
    """Mean distance of the references from where their axes meet; where they do not, their largest distance from the mean.

    References at one point count as size 1, so that it can be divided by.
    """
    centres = _centres(camera_to_world)
    focus = focus_of_axes(centres, _forward(camera_to_world))
    if focus is not None:
        return float((centres - focus).norm(dim=1).mean())
    spread = float((centres - centres.mean(dim=0)).norm(dim=1).max())
    return spread if spread > 0 else 1.0


# -------------------------------------------------------------------------------------------------- the tour

MAX_STARTS = 24
"""Nearest-neighbour tours are begun at so many references at most."""
MAX_VIEWS_TO_MOVE = 24
"""Up to so many references parts of the tour are moved too; beyond, only reversed."""
CLOSING_SLACK = 1e-3
"""The step that closes a ring may be so much longer than the longest other one: evenly spread views differ by rounding."""
MIN_GAIN = 1e-9
"""A change must shorten the tour by more than rounding."""


def _neighbours(camera_to_world: Tensor, config: TrajectoryConfig) -> list[tuple[int, int]]:
    order = order_reference_views(camera_to_world, config.turn_weight)
    pairs = list(pairwise(order))
    if config.close_loop and len(order) > 2:
        length = _step_lengths(camera_to_world, config.turn_weight)
        longest = max(length[i, j] for i, j in pairs)
        if length[order[-1], order[0]] <= longest * (1 + CLOSING_SLACK):
            pairs.append((order[-1], order[0]))
    return pairs


def _step_lengths(camera_to_world: Tensor, turn_weight: float) -> np.ndarray:
    centres, forward = _centres(camera_to_world), _forward(camera_to_world)
    distance = torch.cdist(centres, centres)
    k = len(centres)
    mean = float(distance.sum()) / (k * (k - 1))
    turn = torch.arccos((forward @ forward.T).clamp(-1, 1)).fill_diagonal_(0)
    return (distance / (mean if mean > 0 else 1.0) + turn_weight * turn).numpy()


def _nearest_neighbour_tour(length: np.ndarray, start: int) -> list[int]:
    tour, left = [start], [i for i in range(len(length)) if i != start]
    while left:
        nearest = min(left, key=lambda i: (length[tour[-1], i], i))
        tour.append(nearest)
        left.remove(nearest)
    return tour


def _tour_length(tour: list[int], length: np.ndarray) -> float:
    return float(length[tour[:-1], tour[1:]].sum())


def _improved(tour: list[int], length: np.ndarray) -> list[int]:
    """Reverse parts of the tour (2-opt), and move parts where there are few views (or-opt), until nothing is gained."""
    tour = _untangled(tour, length)
    if len(tour) > MAX_VIEWS_TO_MOVE:
        return tour
    best = _tour_length(tour, length)
    for candidate in _moves(tour):
        if _tour_length(candidate, length) < best - MIN_GAIN:
            return _improved(candidate, length)
    return tour


def _untangled(tour: list[int], length: np.ndarray) -> list[int]:
    """Apply the best reversal of a part as long as one shortens the tour."""
    outside = len(tour)
    padded = np.pad(length, (0, 1))  # a step to or from outside costs nothing: the tour is open
    while True:
        t = np.array([outside, *tour, outside])
        # Reversing t[i..j] replaces the steps (i-1, i) and (j, j+1) by (i-1, j) and (i, j+1).
        before, at, after = t[:-2], t[1:-1], t[2:]
        gain = padded[before, at][:, None] + padded[at, after][None, :]
        gain = np.triu(gain - padded[before[:, None], at[None, :]] - padded[at[:, None], after[None, :]], k=1)
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= MIN_GAIN:
            return tour
        tour = [*tour[:i], *tour[i : j + 1][::-1], *tour[j + 1 :]]


def _moves(tour: list[int]) -> Iterator[list[int]]:
    """All moves of up to three neighbours to another place."""
    k = len(tour)
    for size in (1, 2, 3):
        for i in range(k - size + 1):
            part, rest = tour[i : i + size], tour[:i] + tour[i + size :]
            for j in range(len(rest) + 1):
                if j != i:
                    yield rest[:j] + part + rest[j:]


def _within_budget(frames: list[int], config: TrajectoryConfig) -> list[int]:
    """Fewer frames for each path, then none for the shortest, until all paths together have no more than allowed."""
    total = sum(frames)
    if total <= config.max_total_frames:
        return frames
    thinned = [max(config.min_frames, int(n * config.max_total_frames / total)) for n in frames]
    for index in sorted(range(len(frames)), key=lambda i: (frames[i], i)):
        if sum(thinned) <= config.max_total_frames:
            break
        thinned[index] = 0
    return thinned


def _same_view(camera_to_world: Tensor, i: int, j: int) -> bool:
    return bool(torch.equal(camera_to_world[i], camera_to_world[j]))


# ------------------------------------------------------------------------------------------------ the geometry


def _centres(camera_to_world: Tensor) -> Float[Tensor, "k 3"]:
    return camera_to_world[:, :, 3].double()


def _forward(camera_to_world: Tensor) -> Float[Tensor, "k 3"]:
    """Viewing directions: an OpenGL camera looks along its negative z axis."""
    return -camera_to_world[:, :, 2].double()


def _slerp(rotations: Float[Tensor, "2 3 3"], time: Float[Tensor, " t"]) -> Float[Tensor, "t 3 3"]:
    first, last = Rotation.from_matrix(rotations.numpy())
    turn = (first.inv() * last).as_rotvec()
    return torch.from_numpy((first * Rotation.from_rotvec(time.numpy()[:, None] * turn)).as_matrix())


def _interpolate_offset(offset: Float[Tensor, "2 3"], time: Float[Tensor, " t"]) -> Float[Tensor, "t 3"]:
    """Camera centres as seen from the focus, in camera axes: direction evenly, distance logarithmically."""
    distance = offset.norm(dim=1, keepdim=True)
    direction = torch.lerp(offset[0] / distance[0], offset[1] / distance[1], time[:, None])
    direction = direction / direction.norm(dim=1, keepdim=True)
    return direction * torch.exp(torch.lerp(distance[0].log(), distance[1].log(), time[:, None]))


def _turns_towards(in_camera: Float[Tensor, "t 3"], distance: float) -> Float[Tensor, "t 3 3"]:
    """Smallest rotations after which a camera moved by `in_camera` looks at the point `distance` ahead of where it was."""
    ahead = torch.tensor([0.0, 0.0, -1.0], dtype=torch.float64)
    wanted = distance * ahead - in_camera
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    axis = torch.linalg.cross(ahead.expand_as(wanted), wanted)
    sine = axis.norm(dim=1, keepdim=True)
    angle = torch.atan2(sine, (wanted * ahead).sum(dim=1, keepdim=True))
    rotvec = torch.where(sine > 0, axis / sine.clamp_min(1e-300) * angle, torch.zeros_like(axis))
    return torch.from_numpy(Rotation.from_rotvec(rotvec.numpy()).as_matrix())


def _with_exact_ends(path: Tensor, first: Tensor, last: Tensor) -> Float[Tensor, "t 3 4"]:
    path = path.to(dtype=first.dtype, device=first.device)
    path[0], path[-1] = first, last
    return path
