"""Step 2: seed points for the first splats, from nothing but the reference views.

Points are placed where reference photographs agree (SIFT matches on known epipolar lines, triangulated; stereo), and
at random in the references' frusta elsewhere, as the depth network says. pycolmap is imported only where features are
extracted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from nerfstudio.utils.rich_utils import CONSOLE
from torch import Tensor

from nerfstudio_enhancer.conventions import world_to_camera_opencv
from nerfstudio_enhancer.focus import focus_of_axes
from nerfstudio_enhancer.stereo.config import StereoConfig
from nerfstudio_enhancer.threads import map_on_threads

if TYPE_CHECKING:
    from nerfstudio_enhancer.stereo.depth import StereoDepth

STEREO_SEED = 0
"""Of the random changes in stereo refinement and of the choice among its points: what is seen depends on no seed."""

ROWS_AT_ONCE = 512
"""Features of one photograph that are held against all of another at once."""
CANDIDATES_AT_ONCE = 1 << 16
"""Descriptor pairs compared at once: bounds the memory, not the result."""

SeedSource = Literal["auto", "sfm", "stereo", "triangulated", "random", "none"]
"""Where seed points come from."""

NUM_NEIGHBOURS = 8
"""Neighbours in the picture whose depth a point is compared with."""


@dataclass
class TriangulationConfig:
    """How points are triangulated from the reference photographs."""

    max_image_size: int = 1000
    """Long side in pixels at which features are searched; larger photographs are scaled down."""
    max_features: int = 8192
    """Features per photograph; more of them find weaker points and take longer."""
    peak_threshold: float = 0.003
    """Contrast a feature needs; smaller finds more and weaker ones (COLMAP: 0.0067)."""
    epipolar_px: float = 1.5
    """Distance from the epipolar line, at feature resolution, at which a match is considered."""
    max_ratio: float = 0.85
    """Descriptor distance of a match relative to the second best one beside the same epipolar line; smaller is stricter."""
    max_distance: float = 0.8
    """Largest descriptor distance (angle in rad) of a match."""
    max_reprojection_px: float = 2.0
    """Largest distance between a point's image and its feature, at feature resolution."""
    min_angle_deg: float = 1.5
    """Smallest angle between two rays of a point; smaller admits points of uncertain depth."""
    agreeing_neighbours: int = 3
    """A point that only two views see must have so many of its 8 neighbours in the picture at its depth; 0 lets all pass.
    Wrong matches on the right epipolar line have no other witness against them."""
    neighbour_depth: float = 0.1
    """Relative difference of depth up to which neighbours agree."""
    exhaustive_up_to: int = 12
    """Up to this many reference views every pair is matched, above it each view with its nearest ones."""
    neighbours: int = 8
    """Number of views that a view is matched with when pairs are not exhaustive."""


@dataclass
class SeedPointsConfig:
    """How many seed points there are and how they are found."""

    num_random_points: int = 8000
    """Random points added to triangulated or SfM points, for what no feature shows."""
    min_points: int = 12000
    """Smallest number of seed points altogether; random points fill up to it."""
    min_triangulated: int = 50
    """With fewer triangulated points their depth range is not trusted and all points are random."""
    depth_quantile: float = 0.02
    """Share of the triangulated depths left out at either end before the depth range of random points is taken."""
    far_margin: float = 1.5
    """The depth range of random points ends at this multiple of the farthest trusted depth."""
    max_stereo_points: int = 20000
    """Most points taken from stereo depth."""
    max_stereo_views: int = 32
    """With more reference views stereo is left out unless asked for: its time grows with them, its use shrinks."""
    triangulation: TriangulationConfig = field(default_factory=TriangulationConfig)
    """Features, matching and triangulation."""
    stereo: StereoConfig = field(default_factory=StereoConfig)
    """Depth of the reference views."""


@dataclass(frozen=True)
class SeedPoints:
    """Points from which splats start."""

    xyz: Float[Tensor, "n 3"]
    """World positions."""
    rgb: UInt8[Tensor, "n 3"]
    """sRGB."""
    num_seen: int
    """The first so many are placed where photographs agree, the others random."""
    depths: tuple["StereoDepth", ...] = ()
    """Stereo depth of each reference view; empty where stereo was not used."""


@dataclass(frozen=True)
class Tracks:
    """Points by their observations: row i says that point `point[i]` is seen by view `view[i]` at `pixel[i]`."""

    view: Int[np.ndarray, " m"]
    point: Int[np.ndarray, " m"]
    """0 to num_points - 1, each seen by at least two views, by none twice."""
    pixel: Float[np.ndarray, "m 2"]
    """x, y in pixels of the photograph; the centre of the first pixel is (0.5, 0.5)."""
    num_points: int

    @classmethod
    def of_observations(cls, view: np.ndarray, point: np.ndarray, pixel: np.ndarray) -> "Tracks":
        """Keep one observation per view and point, and points that two views see; number these points from 0."""
        _, first = np.unique(np.stack([point, view]), axis=1, return_index=True)
        view, point, pixel = view[first], point[first], pixel[first]
        _, inverse, count = np.unique(point, return_inverse=True, return_counts=True)
        kept = count[inverse] >= 2
        ids, point = np.unique(point[kept], return_inverse=True)
        return cls(view[kept].astype(np.int64), point.astype(np.int64), pixel[kept].astype(np.float64), len(ids))


@dataclass(frozen=True)
class ReferenceView:
    """Camera of a reference view, and its pixels once somebody asks for them."""

    world_to_camera: Float[np.ndarray, "4 4"]
    """OpenCV axes, float64."""
    fx: float
    fy: float
    cx: float
    cy: float
    width: int
    height: int
    distortion: tuple[float, ...]
    """k1, k2, k3, k4, p1, p2 (fisheye: k1 to k4)."""
    fisheye: bool
    read_pixels: Callable[[], tuple[np.ndarray, np.ndarray]]
    """Reads the photograph: uint8 [h, w, 3], and which pixels may be used, bool [h, w]."""
    keeps_pixels: bool = True
    """Whether they stay in memory once they are read; else they are read again by whoever asks."""

    @classmethod
    def from_opengl(
        cls,
        camera_to_world: Tensor,
        intrinsics: Any,
        fisheye: bool,
        read_pixels: Callable[[], tuple],
        keeps_pixels: bool = True,
    ) -> "ReferenceView":
        """View from an OpenGL camera-to-world [3, 4] and anything with fx, fy, cx, cy, width, height, distortion."""
        return cls(
            world_to_camera=world_to_camera_opencv(camera_to_world.double()).numpy(),
            fx=intrinsics.fx,
            fy=intrinsics.fy,
            cx=intrinsics.cx,
            cy=intrinsics.cy,
            width=intrinsics.width,
            height=intrinsics.height,
            distortion=tuple(intrinsics.distortion),
            fisheye=fisheye,
            read_pixels=read_pixels,
            keeps_pixels=keeps_pixels,
        )

    @cached_property
    def _kept_pixels(self) -> tuple[np.ndarray, np.ndarray]:
        return self.read_pixels()

    @property
    def _pixels(self) -> tuple[np.ndarray, np.ndarray]:
        return self._kept_pixels if self.keeps_pixels else self.read_pixels()

    @property
    def rgb(self) -> UInt8[np.ndarray, "h w 3"]:
        """The photograph."""
        return self._pixels[0]

    @property
    def usable(self) -> Bool[np.ndarray, "h w"]:
        """Pixels that neither the mask nor transparency excludes."""
        return self._pixels[1]

    @property
    def centre(self) -> Float[np.ndarray, "3"]:
        """Camera centre in the world."""
        return -self.world_to_camera[:3, :3].T @ self.world_to_camera[:3, 3]

    @property
    def forward(self) -> Float[np.ndarray, "3"]:
        """Unit viewing direction in the world."""
        return self.world_to_camera[2, :3]

    @property
    def focal_px(self) -> float:
        """Geometric mean of the focal lengths."""
        return float(np.sqrt(self.fx * self.fy))

    @property
    def has_distortion(self) -> bool:
        """Whether the photograph is anything but a pinhole camera's."""
        return any(self.distortion) or self.fisheye

    @property
    def opencv_distortion(self) -> Float[np.ndarray, " d"]:
        """The coefficients in OpenCV's order: k1, k2, p1, p2, k3 (fisheye: k1 to k4)."""
        k1, k2, k3, k4, p1, p2 = (*self.distortion, *([0.0] * 6))[:6]
        return np.array([k1, k2, k3, k4] if self.fisheye else [k1, k2, p1, p2, k3])

    def normalised(self, pixel: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "m 2"]:
        """X / z and y / z of the rays through pixels, lens distortion removed."""
        import cv2

        straight = (pixel - [self.cx, self.cy]) / [self.fx, self.fy]
        if not self.has_distortion or len(pixel) == 0:  # OpenCV takes no empty list
            return straight
        points = np.ascontiguousarray(straight, dtype=np.float64).reshape(-1, 1, 2)
        if self.fisheye:
            return cv2.fisheye.undistortPoints(points, np.eye(3), self.opencv_distortion).reshape(-1, 2)
        return cv2.undistortPoints(points, np.eye(3), self.opencv_distortion).reshape(-1, 2)

    def colours_at(self, pixel: Float[np.ndarray, "m 2"]) -> UInt8[np.ndarray, "m 3"]:
        """Colours of the photograph at pixel positions, nearest pixel."""
        column = np.clip(pixel[:, 0].astype(int), 0, self.width - 1)
        row = np.clip(pixel[:, 1].astype(int), 0, self.height - 1)
        return self.rgb[row, column]

    def sees(self, points: Float[np.ndarray, "m 3"]) -> Bool[np.ndarray, " m"]:
        """Whether points lie in front of the camera and within the picture (its corners' straight-lined frame)."""
        x, y, z = self.world_to_camera[:3, :3] @ points.T + self.world_to_camera[:3, 3:]
        corners = np.array([[0, 0], [self.width, 0], [0, self.height], [self.width, self.height]], dtype=np.float64)
        low, high = self.normalised(corners).min(axis=0), self.normalised(corners).max(axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = (x / z >= low[0]) & (x / z <= high[0]) & (y / z >= low[1]) & (y / z <= high[1])
        return inside & (z > 0)

    def to_world(
        self, normalised: Float[np.ndarray, "m 2"], depth: Float[np.ndarray, " m"]
    ) -> Float[np.ndarray, "m 3"]:
        """World points on rays (x / z, y / z) at a depth along the optical axis."""
        in_camera = np.concatenate([normalised * depth[:, None], depth[:, None]], axis=1)
        return (in_camera - self.world_to_camera[:3, 3]) @ self.world_to_camera[:3, :3]


def seed_points(
    views: Sequence[ReferenceView],
    source: SeedSource,
    config: SeedPointsConfig,
    generator: torch.Generator,
    tracks: Tracks | None = None,
) -> SeedPoints:
    """Seed points from the reference views alone; says in one line what they are.

    Args:
        views: reference views, at least one; `random` does not read their photographs.
        source: `auto` takes SfM tracks or matched features, whichever gives more points, and stereo depth besides.
        config: numbers of points and thresholds.
        generator: for random points; the result is a function of it and of the views.
        tracks: SfM observations by these views, if the capture has a COLMAP model.

    Raises:
        ValueError: `sfm` without tracks.
    """
    start = perf_counter()
    if source == "sfm" and tracks is None:
        raise ValueError(
            "`--seed-points sfm` needs a COLMAP model (sparse/0 or colmap/sparse/0) whose images are named like the "
            "photographs; there is none. Pass `--seed-points triangulated` or `auto`."
        )
    if source == "random":
        points = random_points_in_region(views, config.min_points, generator)
        CONSOLE.log(f"Seed points: {config.min_points:,} random ones in the joint region of the reference views.")
        return points
    found, name = [], ""
    if tracks is not None and source in ("auto", "sfm"):
        found, name = [triangulate(views, tracks, config.triangulation)], "from SfM observations"
    if source in ("auto", "stereo", "triangulated"):
        matched = triangulate(views, match_features(views, config.triangulation), config.triangulation)
        if not found or matched.num_seen > found[0].num_seen:
            found, name = [matched], "triangulated"
    seen = found[0]
    if seen.num_seen < config.min_triangulated:
        CONSOLE.log(
            f"[yellow]Seed points: only {seen.num_seen} could be placed from {len(views)} reference views, at least "
            f"{config.min_triangulated} are needed; taking {config.min_points:,} random ones instead."
        )
        return random_points_in_region(views, config.min_points, generator)
    depths: tuple = ()
    if source == "stereo" or (source == "auto" and len(views) <= config.max_stereo_views):
        seen, depths = _with_stereo(views, seen, config)
        name += f" and by stereo (consistent depth on {share_with_depth(depths):.0%} of the pixels)"
    num_random = max(config.num_random_points, config.min_points - seen.num_seen)
    random = random_points_in_frusta(views, seen.xyz.double().numpy(), num_random, config, generator, depths)
    CONSOLE.log(
        f"Seed points: {seen.num_seen:,} {name} + {num_random:,} random in the frusta of {len(views)} reference views "
        f"({perf_counter() - start:.1f} s)."
    )
    return SeedPoints(torch.cat([seen.xyz, random.xyz]), torch.cat([seen.rgb, random.rgb]), seen.num_seen, depths)


def _with_stereo(
    views: Sequence[ReferenceView], seen: SeedPoints, config: SeedPointsConfig
) -> tuple[SeedPoints, tuple["StereoDepth", ...]]:
    """Points where stereo depth is consistent, before the given ones, and the depth itself: a function of the views."""
    from nerfstudio_enhancer.stereo.depth import estimate_depth
    from nerfstudio_enhancer.stereo.predict import predict_depth
    from nerfstudio_enhancer.stereo.seeds import consistent_points, stereo_views

    ranges = [
        (near * config.stereo.nearer, far * config.stereo.farther)
        for near, far in _depth_ranges(views, seen.xyz.double().numpy(), config)
    ]
    generator = torch.Generator().manual_seed(STEREO_SEED)
    pictures = stereo_views(views, config.stereo)
    depths = estimate_depth(pictures, ranges, config.stereo, generator)
    if config.stereo.depth_network:
        likely = predict_depth(pictures, ranges, config.stereo.max_sources)
        depths = [replace(depth, likely=distribution) for depth, distribution in zip(depths, likely)]
    points = consistent_points(depths, config.max_stereo_points, generator)
    both = SeedPoints(
        torch.cat([points.xyz, seen.xyz]), torch.cat([points.rgb, seen.rgb]), points.num_seen + seen.num_seen
    )
    return both, tuple(depths)


def share_with_depth(depths: Sequence["StereoDepth"]) -> float:
    """Share of the references' pixels on which stereo is trusted, in [0, 1]."""
    return float(np.mean([float(depth.consistent.float().mean()) for depth in depths]))


# ------------------------------------------------------------------------------------------------- features


@dataclass(frozen=True)
class _Features:
    pixel: Float[np.ndarray, "m 2"]
    normalised: Float[np.ndarray, "m 2"]
    descriptor: Float[Tensor, "m d"]
    """Of unit length."""
    focal_px: float
    """At the resolution at which features were searched."""


def match_features(views: Sequence[ReferenceView], config: TriangulationConfig) -> Tracks:
    """Match SIFT features of the photographs along the epipolar lines of the known poses, and join pairs to tracks."""
    features = map_on_threads(lambda view: _extract(view, config), views)
    pairs = _pairs_to_match(views, config)

    def matched(pair: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        i, j = pair
        return _match(features[i], features[j], _essential(views[i], views[j]), config)

    matches = map_on_threads(matched, pairs)
    return _join_tracks(features, pairs, matches)


def _extract(view: ReferenceView, config: TriangulationConfig) -> _Features:
    import cv2
    import pycolmap

    options = pycolmap.FeatureExtractionOptions()
    options.use_gpu = False
    options.num_threads = 1
    options.sift.max_num_features = config.max_features
    options.sift.peak_threshold = config.peak_threshold
    grey = cv2.cvtColor(view.rgb, cv2.COLOR_RGB2GRAY)
    scale = min(1.0, config.max_image_size / max(grey.shape))
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    pycolmap.logging.minloglevel = pycolmap.logging.WARNING.value
    extractor = pycolmap.FeatureExtractor.create(options, pycolmap.Device.cpu)
    keypoints, descriptors = extractor.extract(pycolmap.Bitmap.from_array(np.ascontiguousarray(grey)))
    descriptors = np.asarray(descriptors.data).astype(np.float32)
    in_grey = np.array([(keypoint.x, keypoint.y) for keypoint in keypoints], dtype=np.float64).reshape(-1, 2)
    # From the scaled picture's true size, which is rounded, to pixels of the photograph.
    pixel = in_grey * [view.width / grey.shape[1], view.height / grey.shape[0]]
    column = np.clip(pixel[:, 0].astype(int), 0, view.width - 1)
    row = np.clip(pixel[:, 1].astype(int), 0, view.height - 1)
    kept = view.usable[row, column]
    pixel, descriptors = pixel[kept], descriptors[kept]
    length = np.linalg.norm(descriptors, axis=1, keepdims=True)
    return _Features(
        pixel=pixel,
        normalised=view.normalised(pixel),
        descriptor=torch.from_numpy(descriptors / np.maximum(length, 1e-6)),
        focal_px=view.focal_px * scale,
    )


def _pairs_to_match(views: Sequence[ReferenceView], config: TriangulationConfig) -> list[tuple[int, int]]:
    """All pairs of few views; of many, each with its nearest by viewing direction and position."""
    k = len(views)
    everything = [(i, j) for i in range(k) for j in range(i + 1, k)]
    if k <= config.exhaustive_up_to:
        return everything
    centres = np.stack([view.centre for view in views])
    forward = np.stack([view.forward for view in views])
    spread = np.linalg.norm(centres - centres.mean(axis=0), axis=1).mean()
    distance = np.linalg.norm(centres[:, None] - centres[None], axis=-1) / spread + (1 - forward @ forward.T)
    np.fill_diagonal(distance, np.inf)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, : config.neighbours]
    return sorted({(min(i, int(j)), max(i, int(j))) for i in range(k) for j in nearest[i]})


def _essential(a: ReferenceView, b: ReferenceView) -> Float[np.ndarray, "3 3"]:
    """E with x_b^T E x_a = 0 for the rays x_a, x_b of one point (Hartley and Zisserman, eq. 9.12)."""
    relative = b.world_to_camera @ np.linalg.inv(a.world_to_camera)
    x, y, z = relative[:3, 3]
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ relative[:3, :3]


def _match(
    a: _Features, b: _Features, essential: Float[np.ndarray, "3 3"], config: TriangulationConfig
) -> tuple[Int[np.ndarray, "m 2"], Float[np.ndarray, " m"]]:
    """Mutually best pairs of features near each other's epipolar line, clearly better than the second best there.

    Returns:
        Indices into the features of a and of b, and the descriptor distance of each pair (angle in rad).
    """
    if min(len(a.pixel), len(b.pixel)) < 2 or not np.linalg.norm(essential) > 0:
        return np.empty((0, 2), dtype=np.int64), np.empty(0)
    in_a, in_b = _near_epipolar_line(a, b, essential, config.epipolar_px)
    if len(in_a) == 0:
        return np.empty((0, 2), dtype=np.int64), np.empty(0)
    similarity = torch.cat(
        [
            (a.descriptor[rows] * b.descriptor[columns]).sum(dim=1)
            for rows, columns in zip(in_a.split(CANDIDATES_AT_ONCE), in_b.split(CANDIDATES_AT_ONCE))
        ]
    )
    best_of_a, rival_of_a = _best_and_rival(similarity, in_a, len(a.pixel))
    best_of_b, rival_of_b = _best_and_rival(similarity, in_b, len(b.pixel))
    mutual = (similarity == best_of_a[in_a]) & (similarity == best_of_b[in_b])
    distance = torch.arccos(similarity.clamp(-1, 1))
    rival = torch.arccos(torch.maximum(rival_of_a[in_a], rival_of_b[in_b]).clamp(-1, 1))
    good = mutual & (distance <= config.max_distance) & (distance <= config.max_ratio * rival)
    return torch.stack([in_a[good], in_b[good]], dim=1).numpy(), distance[good].double().numpy()


def _best_and_rival(
    similarity: Float[Tensor, " e"], feature: Int[Tensor, " e"], num_features: int
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Largest and second largest similarity among the candidates of each feature; -1 where there is none."""
    nothing = similarity.new_full((num_features,), -1.0)
    best = nothing.scatter_reduce(0, feature, similarity, reduce="amax")
    first = similarity.new_full((num_features,), len(similarity), dtype=torch.long)
    position = torch.arange(len(similarity))
    is_best = similarity == best[feature]
    first = first.scatter_reduce(0, feature[is_best], position[is_best], reduce="amin")
    others = torch.where(position == first[feature], similarity.new_tensor(-1.0), similarity)
    return best, nothing.scatter_reduce(0, feature, others, reduce="amax")


def _near_epipolar_line(
    a: _Features, b: _Features, essential: np.ndarray, max_px: float
) -> tuple[Int[Tensor, " e"], Int[Tensor, " e"]]:
    """Pairs of features whose symmetric distance to the epipolar lines is at most `max_px` in both pictures."""
    ray_a = torch.from_numpy(np.concatenate([a.normalised, np.ones((len(a.normalised), 1))], axis=1))
    ray_b = torch.from_numpy(np.concatenate([b.normalised, np.ones((len(b.normalised), 1))], axis=1))
    line_in_b = ray_a @ torch.from_numpy(essential).T
    line_in_a = ray_b @ torch.from_numpy(essential)
    limit_b = (max_px / b.focal_px * line_in_b[:, :2].norm(dim=1)).float()
    limit_a = (max_px / a.focal_px * line_in_a[:, :2].norm(dim=1)).float()
    found = []
    for start in range(0, len(ray_a), ROWS_AT_ONCE):  # all at once are 450 MB a thread
        rows = slice(start, start + ROWS_AT_ONCE)
        residual = (line_in_b[rows].float() @ ray_b.float().T).abs_()
        near = (residual <= limit_b[rows, None]) & (residual <= limit_a[None, :])
        found.append(near.nonzero() + torch.tensor([start, 0]))
    of_a, of_b = torch.cat(found).T
    return of_a, of_b


def _join_tracks(
    features: list[_Features],
    pairs: list[tuple[int, int]],
    matches: list[tuple[np.ndarray, np.ndarray]],
) -> Tracks:
    """Join pairwise matches to tracks, best matches first, never two features of one view in a track."""
    offset = np.cumsum([0, *(len(f.pixel) for f in features)])
    edges = [m + np.array([offset[i], offset[j]]) for (i, j), (m, _) in zip(pairs, matches)]
    if not sum(len(edge) for edge in edges):
        return Tracks(np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, 2)), 0)
    edge = np.concatenate(edges)
    edge = edge[np.argsort(np.concatenate([d for _, d in matches]), kind="stable")]
    view_of = np.repeat(np.arange(len(features)), np.diff(offset))
    group = _join_groups(edge, view_of)
    node = np.unique(edge)
    pixel = np.concatenate([f.pixel for f in features])[node]
    return Tracks.of_observations(view_of[node], group[node], pixel)


def _join_groups(edge: Int[np.ndarray, "e 2"], view_of: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Union-find over features in which two groups join only if they share no view."""
    parent = list(range(len(view_of)))
    members = {int(node): {int(view_of[node])} for node in np.unique(edge)}

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for i, j in edge.tolist():
        a, b = root(i), root(j)
        if a != b and not members[a] & members[b]:
            parent[b] = a
            members[a] |= members.pop(b)
    return np.array([root(node) for node in range(len(parent))])


# -------------------------------------------------------------------------------------------- triangulation


def triangulate(views: Sequence[ReferenceView], tracks: Tracks, config: TriangulationConfig) -> SeedPoints:
    """Place each track where its rays meet; leave out points behind a camera, off their features or at too flat angles.

    Linear triangulation (Hartley and Zisserman, section 12.2), refined by Gauss-Newton steps on the reprojection error;
    the worst observation of a point that does not fit is dropped as long as two remain.
    """
    if tracks.num_points == 0:
        return _no_points()
    normalised = np.empty_like(tracks.pixel)
    for index, view in enumerate(views):
        normalised[tracks.view == index] = view.normalised(tracks.pixel[tracks.view == index])
    scale = np.array([min(1.0, config.max_image_size / max(view.width, view.height)) for view in views])
    focal_px = np.array([view.focal_px for view in views]) * scale
    projection = np.stack([view.world_to_camera[:3] for view in views])
    kept = np.isfinite(normalised).all(axis=1)
    while True:
        xyz = _linear_points(tracks, normalised, projection, kept)
        for _ in range(3):
            xyz = _gauss_newton_step(xyz, tracks, normalised, projection, kept)
        error = _reprojection_px(xyz, tracks, normalised, projection, focal_px)
        dropped = _worst_observations(error, tracks, kept, config.max_reprojection_px)
        if not dropped.any():
            break
        kept &= ~dropped
    good = _well_placed(xyz, error, tracks, views, kept, config)
    count = np.bincount(tracks.point, weights=kept, minlength=tracks.num_points)
    good &= (count > 2) | _agrees_with_neighbours(xyz, tracks, kept & good[tracks.point], views, config)
    rgb = _mean_colours(views, tracks, kept)
    return SeedPoints(
        xyz=torch.from_numpy(xyz[good].astype(np.float32)),
        rgb=torch.from_numpy(rgb[good]),
        num_seen=int(good.sum()),
    )


def _no_points() -> SeedPoints:
    return SeedPoints(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.uint8), 0)


def _sum_by_point(values: np.ndarray, tracks: Tracks) -> np.ndarray:
    """Sum of each observation's values over the observations of a point."""
    flat = values.reshape(len(values), -1)
    sums = [np.bincount(tracks.point, weights=flat[:, i], minlength=tracks.num_points) for i in range(flat.shape[1])]
    return np.stack(sums, axis=1).reshape(tracks.num_points, *values.shape[1:])


def _linear_points(
    tracks: Tracks, normalised: np.ndarray, projection: np.ndarray, kept: np.ndarray
) -> Float[np.ndarray, "n 3"]:
    """Least squares over u (P_3 X) = P_1 X and v (P_3 X) = P_2 X with X = (x, y, z, 1)."""
    rows = projection[tracks.view]
    equations = normalised[:, :, None] * rows[:, 2:3] - rows[:, :2]
    equations *= kept[:, None, None]
    left = _sum_by_point(np.einsum("mij,mik->mjk", equations[..., :3], equations[..., :3]), tracks)
    right = _sum_by_point(-np.einsum("mij,mi->mj", equations[..., :3], equations[..., 3]), tracks)
    return _solve(left, right)


def _gauss_newton_step(
    xyz: np.ndarray, tracks: Tracks, normalised: np.ndarray, projection: np.ndarray, kept: np.ndarray
) -> Float[np.ndarray, "n 3"]:
    in_camera = _in_cameras(xyz, tracks, projection)
    z = np.where(np.abs(in_camera[:, 2]) < 1e-9, 1e-9, in_camera[:, 2])
    projected = in_camera[:, :2] / z[:, None]
    rotation = projection[tracks.view][..., :3]
    jacobian = (rotation[:, :2] - projected[..., None] * rotation[:, 2:3]) / z[:, None, None]
    jacobian *= kept[:, None, None]
    residual = np.where(kept[:, None], normalised - projected, 0.0)
    left = _sum_by_point(np.einsum("mij,mik->mjk", jacobian, jacobian), tracks)
    right = _sum_by_point(np.einsum("mij,mi->mj", jacobian, residual), tracks)
    return xyz + _solve(left, right)


def _solve(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve 3x3 systems; slightly damped, so that parallel rays give a finite (and later refused) point."""
    trace = np.trace(left, axis1=1, axis2=2)
    damped = left + (1e-12 * trace + 1e-30)[:, None, None] * np.eye(3)
    return np.linalg.solve(damped, right[..., None])[..., 0]


def _in_cameras(xyz: np.ndarray, tracks: Tracks, projection: np.ndarray) -> Float[np.ndarray, "m 3"]:
    rows = projection[tracks.view]
    return np.einsum("mij,mj->mi", rows[..., :3], xyz[tracks.point]) + rows[..., 3]


def _reprojection_px(
    xyz: np.ndarray, tracks: Tracks, normalised: np.ndarray, projection: np.ndarray, focal_px: np.ndarray
) -> Float[np.ndarray, " m"]:
    """Distance between a point's image and its observation; infinite behind the camera."""
    in_camera = _in_cameras(xyz, tracks, projection)
    with np.errstate(divide="ignore", invalid="ignore"):
        error = np.linalg.norm(in_camera[:, :2] / in_camera[:, 2:] - normalised, axis=1) * focal_px[tracks.view]
    return np.where(in_camera[:, 2] > 0, error, np.inf)


def _worst_observations(error: np.ndarray, tracks: Tracks, kept: np.ndarray, max_px: float) -> Bool[np.ndarray, " m"]:
    """The worst kept observation of every point that has one too far off, where more than two are kept."""
    worst = np.zeros(tracks.num_points)
    np.maximum.at(worst, tracks.point, np.where(kept, error, 0.0))
    count = np.bincount(tracks.point, weights=kept, minlength=tracks.num_points)
    return kept & (error >= worst[tracks.point]) & (error > max_px) & (count[tracks.point] > 2)


def _well_placed(
    xyz: np.ndarray,
    error: np.ndarray,
    tracks: Tracks,
    views: Sequence[ReferenceView],
    kept: np.ndarray,
    config: TriangulationConfig,
) -> Bool[np.ndarray, " n"]:
    """Points that two views see, that lie on all their kept rays, and of which two rays differ enough in direction."""
    count = np.bincount(tracks.point, weights=kept, minlength=tracks.num_points)
    off = np.bincount(tracks.point, weights=kept & ~(error <= config.max_reprojection_px), minlength=tracks.num_points)
    centres = np.stack([view.centre for view in views])
    rays = xyz[tracks.point] - centres[tracks.view]
    with np.errstate(divide="ignore", invalid="ignore"):
        rays = np.where(kept[:, None], rays / np.linalg.norm(rays, axis=1, keepdims=True), 0.0)
    angle = _widest_angle_deg(rays, tracks, kept)
    return (count >= 2) & (off == 0) & (angle >= config.min_angle_deg) & np.isfinite(xyz).all(axis=1)


def _agrees_with_neighbours(
    xyz: Float[np.ndarray, "n 3"],
    tracks: Tracks,
    kept: Bool[np.ndarray, " m"],
    views: Sequence[ReferenceView],
    config: TriangulationConfig,
) -> Bool[np.ndarray, " n"]:
    """Points that, in half of their observations or more, have enough neighbours in the picture at about their depth."""
    from scipy.spatial import KDTree

    if config.agreeing_neighbours == 0:
        return np.ones(len(xyz), dtype=bool)
    observed = np.bincount(tracks.point[kept], minlength=len(xyz))
    agreed = np.zeros(len(xyz))
    for number, view in enumerate(views):
        index = tracks.point[kept & (tracks.view == number)]
        if len(index) <= NUM_NEIGHBOURS:
            continue
        in_camera = xyz[index] @ view.world_to_camera[:3, :3].T + view.world_to_camera[:3, 3]
        in_picture, log_depth = in_camera[:, :2] / in_camera[:, 2:], np.log(in_camera[:, 2])
        _, neighbour = KDTree(in_picture).query(in_picture, NUM_NEIGHBOURS + 1)
        near = np.abs(log_depth[np.asarray(neighbour)[:, 1:]] - log_depth[:, None]) <= config.neighbour_depth
        agreed[index] += near.sum(axis=1) >= config.agreeing_neighbours
    return agreed >= 0.5 * observed


def _widest_angle_deg(rays: np.ndarray, tracks: Tracks, kept: np.ndarray) -> Float[np.ndarray, " n"]:
    """Largest angle between a point's first kept ray and its other ones."""
    order = np.flatnonzero(kept)
    first = np.zeros(tracks.num_points, dtype=np.int64)
    first[tracks.point[order[::-1]]] = order[::-1]
    cosine = np.einsum("mi,mi->m", rays, rays[first[tracks.point]])
    smallest = np.ones(tracks.num_points)
    np.minimum.at(smallest, tracks.point, np.where(kept, np.nan_to_num(cosine, nan=1.0), 1.0))
    return np.rad2deg(np.arccos(np.clip(smallest, -1, 1)))


def _mean_colours(views: Sequence[ReferenceView], tracks: Tracks, kept: np.ndarray) -> UInt8[np.ndarray, "n 3"]:
    colours = np.zeros((len(tracks.view), 3))
    for index, view in enumerate(views):
        rows = tracks.view == index
        if rows.any():
            colours[rows] = view.colours_at(tracks.pixel[rows])
    count = np.maximum(np.bincount(tracks.point, weights=kept, minlength=tracks.num_points), 1)
    return np.rint(_sum_by_point(colours * kept[:, None], tracks) / count[:, None]).astype(np.uint8)


# -------------------------------------------------------------------------------------------- random points


def random_points_in_frusta(
    views: Sequence[ReferenceView],
    seen: Float[np.ndarray, "n 3"],
    num_points: int,
    config: SeedPointsConfig,
    generator: torch.Generator,
    depths: Sequence["StereoDepth"] = (),
) -> SeedPoints:
    """Random pixels of random references, put at a random depth within the depths of the points seen there.

    The depth is distributed as the depth network says where it is given, else uniformly in its logarithm; the colour is
    that of the pixel. A reference that sees fewer than `min_triangulated` points takes the depth range of all of them.
    Pixels with stereo depth get no random point.
    """
    if num_points <= 0:
        return _no_points()
    ranges = _depth_ranges(views, seen, config)
    view_index = torch.randint(len(views), (num_points,), generator=generator).numpy()
    where = torch.rand(num_points, 2, generator=generator, dtype=torch.float64).numpy()
    between = torch.rand(num_points, generator=generator, dtype=torch.float64).numpy()
    xyz, rgb = np.empty((num_points, 3)), np.empty((num_points, 3), dtype=np.uint8)
    for index, view in enumerate(views):
        chosen = view_index == index
        near, far = ranges[index][0], ranges[index][1] * config.far_margin
        usable = view.usable
        if depths:
            from nerfstudio_enhancer.stereo.seeds import unexplained_pixels

            unexplained = usable & unexplained_pixels(depths[index], view)
            usable = unexplained if unexplained.any() else usable
        pixel = _pixels_among(usable, where[chosen])
        straight = _finite_rays(view.normalised(pixel))
        likely = depths[index].likely if depths else None
        if likely is not None:
            from nerfstudio_enhancer.stereo.seeds import drawn_depth

            depth = drawn_depth(likely, straight, between[chosen])
        else:
            depth = near * (far / near) ** between[chosen]
        xyz[chosen] = view.to_world(straight, depth)
        rgb[chosen] = view.colours_at(pixel)
    return SeedPoints(torch.from_numpy(xyz.astype(np.float32)), torch.from_numpy(rgb), 0)


def _depths(view: ReferenceView, points: np.ndarray) -> Float[np.ndarray, " m"]:
    visible = points[view.sees(points)]
    return visible @ view.world_to_camera[2, :3] + view.world_to_camera[2, 3]


def _depth_ranges(
    views: Sequence[ReferenceView], seen: Float[np.ndarray, "n 3"], config: SeedPointsConfig
) -> list[tuple[float, float]]:
    """Near and far depth of the points that each view sees; of those in all views where it sees too few."""
    depths = [_depths(view, seen) for view in views]
    everywhere = np.concatenate(depths)
    quantiles = [config.depth_quantile, 1 - config.depth_quantile]
    ranges = [np.quantile(own if len(own) >= config.min_triangulated else everywhere, quantiles) for own in depths]
    return [(float(near), float(far)) for near, far in ranges]


def _pixels_among(usable: Bool[np.ndarray, "h w"], where: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "m 2"]:
    """Turn numbers in [0, 1) into pixel positions among the pixels that may be used."""
    height, width = usable.shape
    if usable.all():
        return where * [width, height]
    chosen = np.flatnonzero(usable)[(where[:, 0] * usable.sum()).astype(int)]
    return np.stack([chosen % width, chosen // width], axis=1) + 0.5


def _finite_rays(normalised: Float[np.ndarray, "m 2"]) -> Float[np.ndarray, "m 2"]:
    """Rays of a fisheye beyond 85 degrees have no finite x / z; they are bent back to it."""
    steepest = np.tan(np.deg2rad(85.0))
    return np.clip(np.nan_to_num(normalised), -steepest, steepest)


def random_points_in_region(views: Sequence[ReferenceView], num_points: int, generator: torch.Generator) -> SeedPoints:
    """Uniformly random points, with random colours, where the references' frusta lie: the paper's initialisation.

    No photograph is read: the region is the part of a cube that at least one reference sees. The cube stands around
    the point where the optical axes meet, its half side is twice the mean distance of the cameras from there. Where
    the axes do not meet in front of the cameras (a hand-held pan, views outwards) it stands around the mean camera and
    its half side is three times the largest distance of a camera from there.
    """
    centre, half_side = _region(views)
    points = np.empty((0, 3))
    while len(points) < num_points:
        drawn = torch.rand(4 * num_points, 3, generator=generator, dtype=torch.float64).numpy()
        drawn = centre + (2 * drawn - 1) * half_side
        seen = np.any([view.sees(drawn) for view in views], axis=0)
        points = np.concatenate([points, drawn[seen]])
    rgb = torch.randint(256, (num_points, 3), generator=generator, dtype=torch.uint8)
    return SeedPoints(torch.from_numpy(points[:num_points].astype(np.float32)), rgb, 0)


def _region(views: Sequence[ReferenceView]) -> tuple[np.ndarray, float]:
    centres = np.stack([view.centre for view in views])
    forward = np.stack([view.forward for view in views])
    focus = focus_of_axes(torch.from_numpy(centres), torch.from_numpy(forward))
    if focus is not None:
        return focus.numpy(), 2.0 * float(np.linalg.norm(centres - focus.numpy(), axis=1).mean())
    mean = centres.mean(axis=0)
    spread = float(np.linalg.norm(centres - mean, axis=1).max())
    return mean, 3.0 * max(spread, 1e-6)
