"""What the depth network is shown: few photographs of a scene as reference views, with matching costs and true depth.

Reference sets, windows and light are drawn anew for every sample: few scenes are known, and a network that sees the same
sets again learns them by heart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from nerfstudio_enhancer.conventions import world_to_camera_opencv
from nerfstudio_enhancer.initial_splats import SeedPointsConfig
from nerfstudio_enhancer.projection import back_project, project
from nerfstudio_enhancer.stereo.depth_network import UNKNOWN_COST, DepthNetworkConfig
from nerfstudio_enhancer.stereo.predict import NETWORK_PX, costs_of, picture_at, rays
from nerfstudio_enhancer.stereo.views import LUMA, StereoView, sources_of

NUM_REFERENCES = (3, 4, 6, 9, 12)
"""Sizes of the reference sets, drawn alike."""

MAX_SOURCES = 4
"""Most references that one is matched with."""

CONFIRMED_BY = 6
"""Nearest other views that are asked whether they see the same depth."""

DEPTH_TOLERANCE = 0.05
"""Relative difference up to which they do."""

ENOUGH_PIXELS = 400
"""A view of which the others see fewer pixels takes the depth range of all, as in `initial_splats`."""

MIN_TRUSTED = 0.05
"""A sample with less true depth than this share of its pixels is drawn again."""

MOST_TRIES = 300
"""Draws in a row without such a sample after which there is taken to be none."""

RANGE_JITTER = 0.12
"""Standard deviation of the logarithm of a factor on either end of the depth range."""

WINDOW_SHARE = 0.5
"""Share of the batches that show windows of the photographs; the others show whole ones, as the network is used."""

MIN_ZOOM = 0.65
"""Sides of the smallest window, relative to the largest that fits."""

BLIND_SHARE = 0.15
"""Share of the samples that are shown without matching costs, so that the network learns to go by the picture alone."""

SOURCE_LIGHT = 0.06
"""Standard deviation of the logarithm of a photograph's exposure where it is matched with others."""


@dataclass(frozen=True)
class TrueView:
    """A photograph and its depth."""

    stereo: StereoView
    depth: Float[Tensor, "h w"]
    trusted: Bool[Tensor, "h w"]
    """Pixels whose depth a nearby view and a second training confirm."""
    small: StereoView
    """As it is matched with others."""


@dataclass(frozen=True)
class TrueScene:
    """A scene's photographs and their depth."""

    views: Sequence[TrueView]
    _seen: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def seen_by_others(self, index: int, chosen: Sequence[int]) -> Float[Tensor, " n"]:
        """True depths of a view's pixels that another of the chosen views sees too."""
        own = self.views[index]
        visible = torch.zeros(own.stereo.size, dtype=torch.bool)
        for other in chosen:
            if other != index:
                if (index, other) not in self._seen:
                    theirs = self.views[other]
                    self._seen[index, other] = confirmed_by(own.stereo, own.depth, theirs.stereo, theirs.depth)
                visible |= self._seen[index, other]
        return own.depth[visible & own.trusted]


@dataclass(frozen=True)
class Batch:
    """Samples of one size."""

    cost: Float[Tensor, "b d h w"]
    rgb: Float[Tensor, "b 3 H W"]
    rays: Float[Tensor, "b 3 h w"]
    inverse_depth: Float[Tensor, "b h w"]
    """0 at the farthest plane, 1 at the nearest."""
    trusted: Bool[Tensor, "b h w"]

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def read_scene(path: Path) -> TrueScene:
    """Read what `whole_splats.store_views` wrote."""
    stored = torch.load(path, weights_only=True)
    stereo = [_stereo_view(view) for view in stored]
    depths = [view["depth"] for view in stored]
    views = []
    for index, view in enumerate(stored):
        confirmed = torch.zeros(depths[index].shape, dtype=torch.bool)
        for other in _nearest(stereo, index)[:CONFIRMED_BY]:
            confirmed |= confirmed_by(stereo[index], depths[index], stereo[other], depths[other])
        small = stereo[index].resized(min(NETWORK_PX, max(stereo[index].size)))
        trusted = confirmed & view["agreed"] & (view["alpha"] > 127)
        views.append(TrueView(stereo[index], depths[index], trusted, small))
    return TrueScene(views)


def _stereo_view(view: dict) -> StereoView:
    rgb = view["rgb"].float() / 255
    fx, fy, cx, cy = view["intrinsics"].double().tolist()
    matrix = torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64)
    grey = rgb @ rgb.new_tensor(LUMA)
    pose = world_to_camera_opencv(view["camera_to_world"][None].double())[0]
    return StereoView(rgb, grey, torch.ones_like(grey, dtype=torch.bool), matrix, pose)


def _nearest(views: Sequence[StereoView], index: int) -> list[int]:
    centres = torch.stack([view.centre for view in views])
    forward = torch.stack([view.world_to_camera[2, :3] for view in views])
    turn = torch.arccos((forward @ forward[index]).clamp(-1, 1))
    cost = (centres - centres[index]).norm(dim=1) + turn
    cost[index] = torch.inf
    return cost.argsort(stable=True).tolist()[:-1]


def confirmed_by(
    view: StereoView, depth: Float[Tensor, "h w"], other: StereoView, other_depth: Float[Tensor, "H W"]
) -> Bool[Tensor, "h w"]:
    """Pixels whose point another view sees at the depth it has there."""
    points = back_project(depth.double(), view.intrinsics, torch.linalg.inv(view.world_to_camera))
    pixel, distance = project(points, other.intrinsics, other.world_to_camera)
    height, width = other.size
    grid = pixel / pixel.new_tensor([width, height]) * 2 - 1
    shown = F.grid_sample(other_depth.double()[None, None], grid[None], padding_mode="border", align_corners=False)[
        0, 0
    ]
    inside = (grid.abs().amax(-1) <= 1) & (distance > 1e-6)
    return inside & ((shown / distance.clamp(min=1e-6) - 1).abs() < DEPTH_TOLERANCE)


class References(torch.utils.data.Dataset):
    """The batches of a training by their step: each follows from its number and the seed alone."""

    def __init__(self, scenes: Sequence[TrueScene], batch: int, seed: int, num_planes: int | None = None) -> None:
        """Take the scenes.

        Raises:
            ValueError: if no scene has the views of a reference set.
        """
        self.scenes = [scene for scene in scenes if len(scene.views) >= NUM_REFERENCES[0]]
        if not self.scenes:
            raise ValueError(f"no scene has {NUM_REFERENCES[0]} photographs; give scenes with more.")
        self.batch, self.seed = batch, seed
        self.num_planes = num_planes or DepthNetworkConfig().num_planes
        self.sizes = [scene.views[0].small.size for scene in self.scenes]
        # A scene with many photographs counts with their square root.
        self.weights = np.array([len(scene.views) ** 0.5 for scene in self.scenes])

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step.

        Raises:
            ValueError: if in many draws no reference view had depth that other views confirm.
        """
        generator = np.random.default_rng((self.seed, step))
        first = self._drawn_scene(range(len(self.scenes)), generator)
        size, alike = self._size_like(first, generator)
        samples: list[dict[str, Tensor]] = []
        for _ in range(MOST_TRIES):
            sample = drawn_sample(self.scenes[self._drawn_scene(alike, generator)], size, self.num_planes, generator)
            if float(sample["trusted"].float().mean()) >= MIN_TRUSTED:
                samples.append(sample)
            if len(samples) == self.batch:
                return collated(samples)
        raise ValueError("No reference view has depth that other views confirm; give scenes with more overlap.")

    def _drawn_scene(self, of: Sequence[int], generator: np.random.Generator) -> int:
        weights = self.weights[list(of)]
        return int(generator.choice(list(of), p=weights / weights.sum()))

    def _size_like(self, first: int, generator: np.random.Generator) -> tuple[tuple[int, int], list[int]]:
        """Size of a batch, and the scenes that it may show: whole pictures of one size, or windows of one format."""
        rows, columns = self.sizes[first]
        if generator.random() >= WINDOW_SHARE:
            return (rows, columns), [i for i, size in enumerate(self.sizes) if size == (rows, columns)]
        upright = rows > columns or (rows == columns and generator.random() < 0.5)
        longer, shorter = max(rows, columns), round(0.75 * max(rows, columns))
        alike = [i for i, (h, w) in enumerate(self.sizes) if h == w or (h > w) == upright]
        return ((longer, shorter) if upright else (shorter, longer)), alike


def drawn_sample(
    scene: TrueScene, size: tuple[int, int], num_planes: int, generator: np.random.Generator
) -> dict[str, Tensor]:
    """One reference view of a set: whole, if it has the size's format, else a window of it; in light of its own.

    Returns:
        Fields of `Batch`, without the dimension of the batch.
    """
    views = scene.views
    chosen = _drawn_set(len(views), int(generator.choice(NUM_REFERENCES)), generator)
    place = int(generator.integers(len(chosen)))
    view = views[chosen[place]]
    near, far = _depth_range(_depths_for_range(scene, chosen, place), generator)
    rows, columns = _window(view.stereo.size, size, generator, whole=view.small.size == size)
    seen = view.stereo.cut(rows, columns)
    small = seen.resized_to(*size)
    planes = torch.linspace(1 / far, 1 / near, num_planes)
    if generator.random() < BLIND_SHARE:
        cost = torch.full((num_planes, *size), UNKNOWN_COST)
    else:
        others = sources_of(place, [views[i].stereo for i in chosen], (near, far), MAX_SOURCES)
        sources = [_in_other_light(views[chosen[other]].small, generator) for other in others]
        cost = costs_of(small, sources, planes)
    at = [((torch.arange(to) + 0.5) / to * of).long() for to, of in zip(size, seen.size)]
    depth, trusted = (values[rows, columns][at[0]][:, at[1]] for values in (view.depth, view.trusted))
    inverse = ((1 / depth - 1 / far) / (1 / near - 1 / far)).clamp(-1, 2)
    picture = _relit(picture_at(seen.rgb, size), generator)
    sample = {
        "cost": cost,
        "rgb": picture,
        "rays": rays(small, (near, far)),
        "inverse_depth": inverse,
        "trusted": trusted,
    }
    return mirrored(sample) if generator.random() < 0.5 else sample


def _depths_for_range(scene: TrueScene, chosen: Sequence[int], place: int) -> Float[Tensor, " n"]:
    """Depths that triangulated points would tell of: what other references see too, of the view or, if few, of all."""
    own = scene.seen_by_others(chosen[place], chosen)
    if len(own) > ENOUGH_PIXELS:
        return own
    everything = torch.cat([scene.seen_by_others(index, chosen) for index in chosen])
    return everything if len(everything) > 0 else scene.views[chosen[place]].depth.flatten()


def _drawn_set(count: int, num_views: int, generator: np.random.Generator) -> list[int]:
    """Views spread evenly over the capture or, more often, unevenly over a part of it."""
    num_views = min(num_views, count)
    if generator.random() < 0.25:
        return sorted({int(i) for i in np.linspace(0, count - 1, num_views).round()})
    span = min(count, max(num_views + 1, int(count * generator.uniform(0.35, 1.0))))
    start = int(generator.integers(0, count - span + 1))
    moved = generator.uniform(-0.3, 0.3, num_views) * span / num_views
    places = np.linspace(start, start + span - 1, num_views) + moved
    return sorted({int(i) for i in places.round().clip(0, count - 1)})


def _window(
    of: tuple[int, int], size: tuple[int, int], generator: np.random.Generator, whole: bool
) -> tuple[slice, slice]:
    """Rows and columns of a window with the size's format."""
    if whole:
        return slice(0, of[0]), slice(0, of[1])
    scale = min(of[0] / size[0], of[1] / size[1]) * generator.uniform(MIN_ZOOM, 1)
    sides = [max(2, round(side * scale)) for side in size]
    starts = [int(generator.integers(0, length - side + 1)) for length, side in zip(of, sides)]
    rows, columns = (slice(start, start + side) for start, side in zip(starts, sides))
    return rows, columns


def _in_other_light(view: StereoView, generator: np.random.Generator) -> StereoView:
    return view.recoloured((view.rgb * math.exp(generator.normal(0, SOURCE_LIGHT))).clamp(0, 1))


def _relit(rgb: Float[Tensor, "3 H W"], generator: np.random.Generator) -> Float[Tensor, "3 H W"]:
    """The picture with another gamma, exposure and white balance."""
    gamma, exposure = math.exp(generator.normal(0, 0.2)), math.exp(generator.normal(0, 0.15))
    balance = torch.from_numpy(np.exp(generator.normal(0, 0.12, (3, 1, 1)))).float()
    return (rgb.clamp(min=1e-3) ** gamma * balance * exposure).clamp(0, 1)


def mirrored(sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sample of the scene seen in a mirror."""
    flipped = {name: value.flip(-1) for name, value in sample.items()}
    flipped["rays"][0] *= -1
    return flipped


def collated(samples: Sequence[dict[str, Tensor]]) -> Batch:
    """Samples of one size as a batch."""
    stacked = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    for name in ("cost", "rgb"):
        stacked[name] = stacked[name].contiguous(memory_format=torch.channels_last)
    return Batch(**stacked)


def _depth_range(depths: Float[Tensor, " n"], generator: np.random.Generator) -> tuple[float, float]:
    """As triangulated points give it in `initial_splats`, a little off."""
    seeds = SeedPointsConfig()
    near, far = np.quantile(depths[:: max(1, len(depths) // 2000)], [seeds.depth_quantile, 1 - seeds.depth_quantile])
    off = np.exp(generator.normal(0, RANGE_JITTER, 2))
    return float(near * seeds.stereo.nearer * off[0]), float(far * seeds.stereo.farther * off[1])
