from collections.abc import Callable, Sequence
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from scenes import TinyScene, reference_view, surface_points, tiny_scene, visible_points

from nerfstudio_enhancer.initial_splats import (
    ReferenceView,
    SeedPointsConfig,
    Tracks,
    TriangulationConfig,
    _essential,
    _join_groups,
    match_features,
    random_points_in_frusta,
    random_points_in_region,
    seed_points,
    triangulate,
)

ALL_PASS = TriangulationConfig(agreeing_neighbours=0)


def no_pixels() -> tuple[np.ndarray, np.ndarray]:
    raise AssertionError("the photograph must not be read")


def pinhole(
    x: float = 0.0,
    turn_deg: float = 0.0,
    read_pixels: Callable[[], tuple[np.ndarray, np.ndarray]] = no_pixels,
) -> ReferenceView:
    """100 x 80 pixels, focal length 100, at (x, 0, 0), looking along z (OpenCV axes), turned about y."""
    turn = np.deg2rad(turn_deg)
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = [[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]]
    world_to_camera[:3, 3] = -world_to_camera[:3, :3] @ [x, 0, 0]
    return ReferenceView(
        world_to_camera, 100.0, 100.0, 50.0, 40.0, 100, 80, (0.0,) * 6, fisheye=False, read_pixels=read_pixels
    )


def grey_pixels() -> tuple[np.ndarray, np.ndarray]:
    return np.full((80, 100, 3), 90, dtype=np.uint8), np.ones((80, 100), dtype=bool)


def views_of(scene: TinyScene, indices: Sequence[int]) -> list[ReferenceView]:
    return [reference_view(scene, index) for index in indices]


def observe(views: Sequence[ReferenceView], points: np.ndarray) -> Tracks:
    """True observations of points by every view."""
    rows = []
    for number, view in enumerate(views):
        x, y, z = view.world_to_camera[:3, :3] @ points.T + view.world_to_camera[:3, 3:]
        rows += [
            (number, i, view.fx * x[i] / z[i] + view.cx, view.fy * y[i] / z[i] + view.cy) for i in range(len(points))
        ]
    table = np.array(rows)
    return Tracks.of_observations(table[:, 0].astype(int), table[:, 1].astype(int), table[:, 2:])


# ------------------------------------------------------------------------------------------------ tracks


def test_tracks_keep_points_of_two_views_and_one_observation_a_view() -> None:
    # Point 7 is seen by views 0 and 2 (twice), point 9 by view 1 alone.
    tracks = Tracks.of_observations(
        view=np.array([0, 2, 2, 1]), point=np.array([7, 7, 7, 9]), pixel=np.arange(8.0).reshape(4, 2)
    )
    assert tracks.num_points == 1
    assert tracks.view.tolist() == [0, 2]
    assert tracks.point.tolist() == [0, 0]
    assert tracks.pixel.tolist() == [[0, 1], [2, 3]]


def test_two_features_of_one_view_never_share_a_track() -> None:
    # Features 0, 1 in view 0, feature 2 in view 1, feature 3 in view 2. Matches, best first: 0-2, 2-3, 1-3.
    # The last would bring features 0 and 1 of view 0 together.
    group = _join_groups(np.array([[0, 2], [2, 3], [1, 3]]), view_of=np.array([0, 0, 1, 2]))
    assert group[0] == group[2] == group[3]
    assert group[1] != group[0]


# ----------------------------------------------------------------------------------------- triangulation


def test_a_point_is_placed_where_two_rays_meet() -> None:
    # Cameras at x = 0 and x = 1. The point (0.5, 0.2, 5) lies at 50 + 100 * 0.5 / 5 = 60 and at 40 px in x,
    # at 40 + 100 * 0.2 / 5 = 44 px in y.
    views = [pinhole(0.0, read_pixels=grey_pixels), pinhole(1.0, read_pixels=grey_pixels)]
    tracks = Tracks(np.array([0, 1]), np.array([0, 0]), np.array([[60.0, 44.0], [40.0, 44.0]]), 1)
    points = triangulate(views, tracks, ALL_PASS)
    torch.testing.assert_close(points.xyz, torch.tensor([[0.5, 0.2, 5.0]]))
    assert points.rgb.tolist() == [[90, 90, 90]]
    assert points.num_seen == 1


def test_true_observations_give_true_points() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform([-1, -1, 4], [1, 1, 7], size=(40, 3))
    views = [pinhole(x, turn, grey_pixels) for x, turn in ((-1.0, 10.0), (0.0, 0.0), (1.5, -15.0))]
    points = triangulate(views, observe(views, truth), ALL_PASS)
    np.testing.assert_allclose(points.xyz.numpy(), truth, atol=1e-5)


def test_a_gross_error_in_one_of_three_views_is_dropped() -> None:
    truth = np.array([[0.2, -0.1, 5.0]])
    views = [pinhole(x, 0.0, grey_pixels) for x in (-1.0, 0.0, 1.0)]
    tracks = observe(views, truth)
    tracks.pixel[1] += [0.0, 30.0]
    points = triangulate(views, tracks, ALL_PASS)
    np.testing.assert_allclose(points.xyz.numpy(), truth, atol=1e-5)


def test_points_with_crossing_or_nearly_parallel_rays_are_left_out() -> None:
    views = [pinhole(0.0, read_pixels=grey_pixels), pinhole(1.0, read_pixels=grey_pixels)]
    # Diverging rays meet behind the cameras; 10 px apart in y the rays miss each other; 2 px of parallax at
    # focal length 100 mean an angle of 1.15 degrees, under the 1.5 that are needed.
    pixels = np.array([[40.0, 40.0], [60.0, 40.0], [60.0, 30.0], [40.0, 40.0], [51.0, 40.0], [49.0, 40.0]])
    tracks = Tracks(np.array([0, 1] * 3), np.array([0, 0, 1, 1, 2, 2]), pixels, 3)
    assert triangulate(views, tracks, ALL_PASS).num_seen == 0


def test_a_two_view_point_far_off_its_neighbours_depth_is_left_out() -> None:
    rng = np.random.default_rng(0)
    plane = np.column_stack([rng.uniform(-0.5, 0.5, (30, 2)), np.full(30, 5.0)])
    outlier = np.array([[0.0, 0.0, 3.0]])
    views = [pinhole(-0.3, read_pixels=grey_pixels), pinhole(0.3, read_pixels=grey_pixels)]
    tracks = observe(views, np.concatenate([plane, outlier]))
    assert triangulate(views, tracks, ALL_PASS).num_seen == 31
    points = triangulate(views, tracks, TriangulationConfig())
    np.testing.assert_allclose(points.xyz.numpy(), plane, atol=1e-5)


def test_true_rays_satisfy_the_epipolar_constraint() -> None:
    a, b = pinhole(-1.0, 12.0), pinhole(1.0, -20.0)
    truth = np.random.default_rng(0).uniform([-1, -1, 4], [1, 1, 7], size=(20, 3))
    rays = []
    for view in (a, b):
        in_camera = truth @ view.world_to_camera[:3, :3].T + view.world_to_camera[:3, 3]
        rays.append(in_camera / in_camera[:, 2:])
    residual = np.einsum("ni,ij,nj->n", rays[1], _essential(a, b), rays[0])
    np.testing.assert_allclose(residual, 0.0, atol=1e-12)
    assert np.abs(np.einsum("ni,ij,nj->n", rays[0], _essential(a, b), rays[1])).max() > 0.01


@pytest.mark.parametrize("fisheye", [False, True])
def test_lens_distortion_is_undone(fisheye: bool) -> None:
    k1, k2, k3, k4, p1, p2 = distortion = (0.05, -0.01, 0.002, 0.001 if fisheye else 0.0, 0.003, -0.002)
    if fisheye:
        distortion = (k1, k2, k3, k4, 0.0, 0.0)
    view = replace(pinhole(), distortion=distortion, fisheye=fisheye)
    rays = np.random.default_rng(0).uniform(-0.4, 0.4, size=(50, 2))
    intrinsics = np.array([[view.fx, 0, view.cx], [0, view.fy, view.cy], [0, 0, 1]])
    if fisheye:
        pixel = cv2.fisheye.distortPoints(rays[None], intrinsics, np.array([k1, k2, k3, k4]))[0]
    else:
        points = np.column_stack([rays, np.ones(len(rays))])
        pixel = cv2.projectPoints(points, np.zeros(3), np.zeros(3), intrinsics, np.array([k1, k2, p1, p2, k3]))[0][:, 0]
    np.testing.assert_allclose(view.normalised(pixel), rays, atol=1e-5)
    assert view.normalised(np.empty((0, 2))).shape == (0, 2)  # of a view that shares nothing with the others


def test_photographs_of_many_views_are_read_again_instead_of_kept() -> None:
    read = []

    def pixels():
        read.append(1)
        return np.zeros((2, 2, 3), np.uint8), np.ones((2, 2), bool)

    for keeps, times in ((True, 1), (False, 3)):
        read.clear()
        view = replace(pinhole(), read_pixels=pixels, keeps_pixels=keeps)
        assert view.rgb.shape == (2, 2, 3)
        assert view.usable.all()
        assert view.rgb.sum() == 0
        assert len(read) == times


# --------------------------------------------------------------------------------- points from photographs


@pytest.fixture(scope="module")
def textured() -> TinyScene:
    return tiny_scene(num_images=3, width=200, height=150, arc_deg=25.0)


def test_features_are_held_against_each_other_in_parts_as_all_at_once(textured: TinyScene, monkeypatch) -> None:
    views = [reference_view(textured, index) for index in range(3)]
    whole = match_features(views, TriangulationConfig())
    monkeypatch.setattr("nerfstudio_enhancer.initial_splats.ROWS_AT_ONCE", 7)
    parts = match_features(views, TriangulationConfig())
    assert whole.num_points == parts.num_points > 20
    np.testing.assert_array_equal(whole.pixel, parts.pixel)


def test_points_triangulated_from_photographs_lie_on_the_surfaces(textured: TinyScene) -> None:
    views = views_of(textured, [0, 1, 2])
    points = triangulate(views, match_features(views, TriangulationConfig()), TriangulationConfig())
    distance = textured.distance_to_surface(points.xyz.double().numpy())
    assert points.num_seen >= 100
    # The cameras stand 3.3 from the box: half of the points within 0.5 % of that, nine of ten within 2 %.
    assert np.median(distance) < 0.0165
    assert np.quantile(distance, 0.9) < 0.066


def test_triangulated_points_have_the_colour_of_their_surface(textured: TinyScene) -> None:
    truth, colours = surface_points(textured, 60)
    views = views_of(textured, [0, 1, 2])
    seen = [visible_points(textured, index, truth) for index in range(3)]
    tracks = Tracks.of_observations(
        np.concatenate([np.full(len(ids), index) for index, (ids, _) in enumerate(seen)]),
        np.concatenate([ids for ids, _ in seen]),
        np.concatenate([pixel for _, pixel in seen]),
    )
    points = triangulate(views, tracks, ALL_PASS)
    nearest = torch.cdist(points.xyz.double(), torch.from_numpy(truth)).argmin(dim=1).numpy()
    difference = np.abs(points.rgb.numpy().astype(int) - colours[nearest])
    assert points.num_seen > 30
    assert np.median(difference) <= 12  # mean of up to three photographs of a rough texture


def test_masked_pixels_give_no_points(textured: TinyScene) -> None:
    left = np.zeros(textured.images.shape[1:3], dtype=bool)
    left[:, :100] = True
    views = [replace(view, read_pixels=lambda view=view: (view.rgb, left)) for view in views_of(textured, [0, 1, 2])]
    tracks = match_features(views, TriangulationConfig())
    assert tracks.num_points > 20
    assert tracks.pixel[:, 0].max() < 100


def test_seed_points_are_a_function_of_views_and_generator(textured: TinyScene) -> None:
    config = SeedPointsConfig(num_random_points=50, min_points=0)

    def run(seed: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        points = seed_points(views_of(textured, [0, 2]), "auto", config, torch.Generator().manual_seed(seed))
        return points.xyz, points.rgb, points.num_seen

    xyz, rgb, num_seen = run(0)
    again_xyz, again_rgb, _ = run(0)
    assert torch.equal(xyz, again_xyz)
    assert torch.equal(rgb, again_rgb)
    other_xyz, _, _ = run(1)
    assert torch.equal(xyz[:num_seen], other_xyz[:num_seen])
    assert not torch.equal(xyz[num_seen:], other_xyz[num_seen:])
    assert len(xyz) == num_seen + 50


def test_sfm_tracks_are_taken_where_they_give_more_points(textured: TinyScene) -> None:
    truth, _ = surface_points(textured, 2000)
    seen = [visible_points(textured, index, truth) for index in range(3)]
    tracks = Tracks.of_observations(
        np.concatenate([np.full(len(ids), index) for index, (ids, _) in enumerate(seen)]),
        np.concatenate([ids for ids, _ in seen]),
        np.concatenate([pixel for _, pixel in seen]),
    )
    config = SeedPointsConfig(num_random_points=0, min_points=0, max_stereo_views=0)
    generator = torch.Generator().manual_seed(0)
    views = views_of(textured, [0, 1, 2])
    from_tracks = seed_points(views, "auto", config, generator, tracks)
    assert from_tracks.num_seen > 800
    assert textured.distance_to_surface(from_tracks.xyz.double().numpy()).max() < 1e-4
    few = Tracks.of_observations(tracks.view[:6], tracks.point[:6], tracks.pixel[:6])
    matched = seed_points(views, "auto", config, generator, few)
    assert 100 < matched.num_seen < 800


def test_photographs_without_texture_fall_back_to_random_points(capsys: pytest.CaptureFixture[str]) -> None:
    views = [pinhole(x, 0.0, grey_pixels) for x in (-1.0, 0.0, 1.0)]
    config = SeedPointsConfig(min_points=300)
    points = seed_points(views, "auto", config, torch.Generator().manual_seed(0))
    assert points.xyz.shape == (300, 3)
    assert points.num_seen == 0
    assert "only 0 could be placed from 3 reference views" in " ".join(capsys.readouterr().out.split())


def test_sfm_without_tracks_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a COLMAP model"):
        seed_points([pinhole()], "sfm", SeedPointsConfig(), torch.Generator())


# ------------------------------------------------------------------------------------------ random points


def test_random_points_in_the_region_read_no_photograph_and_are_seen() -> None:
    views = [pinhole(-1.0, 15.0), pinhole(1.0, -15.0)]
    points = random_points_in_region(views, 500, torch.Generator().manual_seed(0))
    xyz = points.xyz.double().numpy()
    assert points.xyz.shape == points.rgb.shape == (500, 3)
    assert np.any([view.sees(xyz) for view in views], axis=0).all()
    # The axes meet at (0, 0, 1 / tan 15 deg = 3.73); the cameras stand 1 / sin 15 deg = 3.86 from there.
    assert np.abs(xyz - [0, 0, 3.732]).max() <= 2 * 3.864 + 1e-3
    assert np.abs(xyz - [0, 0, 3.732]).max() > 1.8 * 3.864


def test_random_points_of_parallel_cameras_span_three_times_their_spread() -> None:
    views = [pinhole(-1.0), pinhole(1.0)]
    xyz = random_points_in_region(views, 500, torch.Generator().manual_seed(0)).xyz
    assert 2.7 < float(xyz[:, 2].max()) <= 3.0
    assert float(xyz[:, 2].min()) > 0


def test_random_points_in_the_frusta_keep_the_depths_and_colours_seen_there() -> None:
    gradient = np.zeros((80, 100, 3), dtype=np.uint8)
    gradient[..., 0] = np.arange(100)[None, :]
    gradient[..., 1] = np.arange(80)[:, None]
    view = pinhole(read_pixels=lambda: (gradient, np.ones((80, 100), dtype=bool)))
    seen = np.column_stack([np.zeros((101, 2)), np.linspace(4, 8, 101)])
    config = SeedPointsConfig(depth_quantile=0.0, far_margin=1.5, min_triangulated=50)
    points = random_points_in_frusta([view], seen, 1000, config, torch.Generator().manual_seed(0))
    x, y, z = points.xyz.double().numpy().T
    assert z.min() >= 4 - 1e-5
    assert z.max() <= 12 + 1e-5  # the farthest depth times 1.5
    # Uniform in the logarithm: half of the points before sqrt(4 * 12) = 6.93.
    assert np.median(z) == pytest.approx(6.93, rel=0.05)
    # Single precision may move a point across the border of a pixel.
    column, row = 100 * x / z + 50, 100 * y / z + 40
    assert np.abs(points.rgb[:, 0].numpy() + 0.5 - column).max() < 0.501
    assert np.abs(points.rgb[:, 1].numpy() + 0.5 - row).max() < 0.501


def test_random_points_in_the_frusta_avoid_masked_pixels() -> None:
    usable = np.zeros((80, 100), dtype=bool)
    usable[10:20, 30:40] = True
    view = pinhole(read_pixels=lambda: (np.zeros((80, 100, 3), dtype=np.uint8), usable))
    seen = np.column_stack([np.zeros((60, 2)), np.full(60, 5.0)])
    points = random_points_in_frusta([view], seen, 200, SeedPointsConfig(), torch.Generator().manual_seed(0))
    x, y, z = points.xyz.numpy().T
    column, row = 100 * x / z + 50, 100 * y / z + 40
    assert column.min() >= 30
    assert column.max() <= 40
    assert row.min() >= 10
    assert row.max() <= 20


def test_many_views_are_matched_with_their_neighbours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    matched = []
    monkeypatch.setattr(
        "nerfstudio_enhancer.initial_splats._match",
        lambda a, b, essential, config: matched.append(0) or (np.empty((0, 2), dtype=np.int64), np.empty(0)),
    )
    views = [pinhole(float(x), 0.0, grey_pixels) for x in range(14)]
    assert match_features(views, TriangulationConfig(neighbours=2, exhaustive_up_to=12)).num_points == 0
    # On a line each view's two nearest are its neighbours, at the ends the next two: 13 pairs and 2 more.
    assert len(matched) == 15
