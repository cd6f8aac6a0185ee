from dataclasses import replace

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from PIL import Image
from scenes import TinyScene, reference_view, tiny_scene

from nerfstudio_enhancer.contact_sheet import write_depth_sheet
from nerfstudio_enhancer.initial_splats import ReferenceView, SeedPointsConfig, seed_points
from nerfstudio_enhancer.losses import depth_loss
from nerfstudio_enhancer.rasterize import native_library
from nerfstudio_enhancer.stereo.config import RefineConfig, StereoConfig, SweepConfig
from nerfstudio_enhancer.stereo.depth import StereoDepth, _that_may_agree, estimate_depth
from nerfstudio_enhancer.stereo.patches import Patches
from nerfstudio_enhancer.stereo.predict import DepthDistribution
from nerfstudio_enhancer.stereo.refine import refine
from nerfstudio_enhancer.stereo.seeds import consistent_points, known_depth, unexplained_pixels, world_points
from nerfstudio_enhancer.stereo.sweep import (
    UNSEEN,
    BetterHalf,
    Relative,
    _window_sum,
    aggregate,
    inverse_depth_planes,
    pixel_grid,
    winner,
)
from nerfstudio_enhancer.stereo.views import StereoView, choose_sources, stereo_view

SMALL = StereoConfig(sweep_px=100, refine_px=100, sweep=SweepConfig(max_planes=64), refine=RefineConfig(iterations=2))


def camera(x: float = 0.0, turn_deg: float = 0.0, size: tuple[int, int] = (80, 100)) -> StereoView:
    """A blank view with focal length 100 and centred principal point at (x, 0, 0), turned about y."""
    turn = np.deg2rad(turn_deg)
    rotation = np.array([[np.cos(turn), 0, -np.sin(turn)], [0, 1, 0], [np.sin(turn), 0, np.cos(turn)]])
    world_to_camera = np.eye(4)
    world_to_camera[:3, :3] = rotation
    world_to_camera[:3, 3] = -rotation @ [x, 0, 0]
    height, width = size
    return StereoView(
        rgb=torch.zeros(height, width, 3),
        grey=torch.zeros(height, width),
        usable=torch.ones(height, width, dtype=torch.bool),
        intrinsics=torch.tensor([[100.0, 0, width / 2], [0, 100, height / 2], [0, 0, 1]], dtype=torch.float64),
        world_to_camera=torch.from_numpy(world_to_camera),
    )


@pytest.fixture(scope="module")
def scene() -> TinyScene:
    return tiny_scene(num_images=5, width=160, height=120, arc_deg=40.0)


@pytest.fixture(scope="module")
def depths(scene: TinyScene) -> list[StereoDepth]:
    views = [stereo_view(reference_view(scene, index), 100) for index in range(5)]
    ranges = [
        (float(depth[depth > 0].min()) * 0.8, float(depth[np.isfinite(depth)].max()) * 1.2) for depth in scene.depth
    ]
    return estimate_depth(views, ranges, SMALL, torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ geometry


def test_a_point_moves_by_focal_length_times_baseline_over_depth() -> None:
    # The point on the axis of a camera at 0, at depth 5, is seen 100 * 1 / 5 = 20 px further left by a camera at x = 1:
    # at 30 of 100 px, which is -0.4 on the scale from -1 to 1.
    relative = Relative.between(camera(0.0), camera(1.0))
    place = relative.infinite @ torch.tensor([50.0, 40.0, 1.0]) + relative.epipole / 5
    torch.testing.assert_close(place / place[2], torch.tensor([-0.4, 0.0, 1.0]), atol=1e-5, rtol=0)


def test_planes_lie_half_a_pixel_apart_in_the_source() -> None:
    # From depth 10 to depth 5 a pixel moves 10 px: 20 planes; at most 16, at least 4 are allowed.
    planes = inverse_depth_planes(camera(0.0), [camera(1.0)], (5.0, 10.0), SweepConfig(max_planes=64, min_planes=4))
    assert len(planes) == 20
    torch.testing.assert_close(planes[[0, -1]], torch.tensor([0.1, 0.2]))
    few = inverse_depth_planes(camera(0.0), [camera(1.0)], (5.0, 10.0), SweepConfig(max_planes=16, min_planes=4))
    assert len(few) == 16
    none = inverse_depth_planes(camera(0.0), [camera(0.0)], (5.0, 10.0), SweepConfig(max_planes=64, min_planes=4))
    assert len(none) == 4


def test_a_view_is_matched_with_those_that_see_the_same_from_a_useful_angle() -> None:
    # At depth 5 a camera 1 aside sees the same under 11 degrees; one at the same place tells nothing; one that looks
    # the other way sees nothing of it.
    views = [camera(0.0), camera(1.0), camera(0.0), camera(0.0, turn_deg=180.0)]
    assert choose_sources(views, [(4.0, 6.0)] * 4, most=3)[0] == [1]
    assert choose_sources(views, [(4.0, 6.0)] * 4, most=3)[3] == []


def test_the_nearer_of_two_useful_sources_comes_first_and_others_are_left_out() -> None:
    views = [camera(0.0), camera(3.0), camera(1.0), camera(-2.0)]
    assert choose_sources(views, [(4.0, 6.0)] * 4, most=2)[0] == [2, 3]


def test_refinement_finds_the_slant_of_a_textured_plane() -> None:
    # The plane z = 4 + x with a texture of smooth noise, seen from (0, 0, 0) and 0.4 to either side: the inverse depth at
    # the middle is 1 / 4, and by z (1 - u) = 4 it falls by 1 / 4 per unit of u = x / z, 1 / 400 per pixel.
    texture = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0))

    def photograph(view: StereoView) -> StereoView:
        grid = pixel_grid(view).double()
        rays = torch.einsum("ij,jhw->ihw", torch.linalg.inv(view.intrinsics), grid)
        z = (4 + view.centre[0]) / (1 - rays[0])
        place = torch.stack([rays[0] * z + view.centre[0], rays[1] * z], dim=-1).float() / 4
        grey = torch.nn.functional.grid_sample(texture, place[None], mode="bicubic", align_corners=False)[0, 0]
        return replace(view, grey=grey, rgb=grey[..., None].expand(-1, -1, 3))

    views = [photograph(camera(x)) for x in (0.0, -0.4, 0.4)]
    flat = torch.full(views[0].size, 0.26)
    planes = refine(
        views[0], views[1:], flat, 0.02, (0.1, 0.5), RefineConfig(iterations=6), torch.Generator().manual_seed(0)
    )
    inner = (slice(20, 60), slice(30, 70))
    truth = 0.25 - (pixel_grid(views[0])[0] - 50) / 400
    assert (planes.state[0] - truth)[inner].abs().median() < 0.004  # 0.16 px in the sources; 0.025 at the start
    assert float(planes.state[1][inner].median()) == pytest.approx(-1 / 400, abs=5e-4)
    assert float(planes.state[2][inner].median()) == pytest.approx(0, abs=5e-4)
    assert float(planes.cost[inner].median()) < 0.08


@pytest.mark.parametrize("isa", native_library.available_instruction_sets())
def test_the_kernels_know_what_patches_cost(scene: TinyScene, isa: str) -> None:
    views = [stereo_view(reference_view(scene, index), 90) for index in range(5)]
    generator = torch.Generator().manual_seed(0)
    planes = torch.randn(3, *views[0].size, generator=generator)
    planes = planes * torch.tensor([0.2, 0.01, 0.01])[:, None, None] + torch.tensor([0.3, 0, 0])[:, None, None]
    for others in ([1], [1, 2], [4, 3, 2, 1]):
        patches = Patches(views[0], [views[i] for i in others], RefineConfig())
        with native_library.instruction_set(isa):
            cost = patches.cost(planes)
        patches.native = None
        expected = patches.cost(planes)
        assert (expected == 0.5).any()  # planes that nobody sees
        assert (expected < 0.3).any()
        # A whole patch is seen or not: where a place lies on the very side of a source, rounding decides.
        assert ((cost - expected).abs() < 1e-3).float().mean() > 0.9995


# ------------------------------------------------------------------------------------------------- matching


@pytest.mark.parametrize("window", [1, 2, 3, 5, 7, 11])
def test_window_sums_are_sums_over_windows(window: int) -> None:
    values = torch.rand(2, 20, 13, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_window_sum(values, window, 1), values.unfold(1, window, 1).sum(-1))


def test_the_mean_is_over_the_better_half_of_the_sources() -> None:
    costs = torch.tensor([[0.6, 0.2, UNSEEN], [0.1, 0.4, UNSEEN], [0.3, UNSEEN, UNSEEN], [0.9, UNSEEN, UNSEEN]])
    best = BetterHalf((3,), costs)
    for cost in costs:
        best.add(cost)
    # Four sources: the mean of 0.1 and 0.3; two: the better one; none: nothing is known.
    torch.testing.assert_close(best.mean(), torch.tensor([0.2, 0.2, 0.5]))


def test_the_winner_lies_between_planes_where_the_parabola_is_lowest() -> None:
    # Costs 3, 1, 2 at planes 1, 2, 3: the parabola through them is lowest at 2 + (3 - 2) / (2 * (3 - 2 + 2)) = 2 1/6.
    cost = torch.tensor([[[9.0, 3.0, 1.0, 2.0, 9.0]]])
    assert float(winner(cost, torch.arange(5.0))) == pytest.approx(2 + 1 / 6)


def test_aggregation_lets_neighbours_decide_where_matching_tells_nothing() -> None:
    cost = torch.full((9, 9, 6), 0.5)
    cost[..., 2] = 0.1
    cost[4, 4] = 0.5
    cost[4, 4, 5] = 0.45  # the wrong plane is a little better here
    assert int(cost[4, 4].argmin()) == 5
    smooth = aggregate(cost, torch.zeros(9, 9), SweepConfig())
    assert (smooth.argmin(-1) == 2).all()


def test_aggregation_knows_no_side_of_the_picture() -> None:
    cost = torch.rand(8, 8, 5, generator=torch.Generator().manual_seed(0))
    grey = torch.rand(8, 8, generator=torch.Generator().manual_seed(1))
    whole = aggregate(cost, grey, SweepConfig())
    mirrored = aggregate(cost.flip(1), grey.flip(1), SweepConfig()).flip(1)
    upside_down = aggregate(cost.flip(0), grey.flip(0), SweepConfig()).flip(0)
    torch.testing.assert_close(mirrored, whole)
    torch.testing.assert_close(upside_down, whole)


# ------------------------------------------------------------------------------------------------ whole views


def test_consistent_depth_is_right(scene: TinyScene, depths: list[StereoDepth]) -> None:
    for index, depth in enumerate(depths):
        assert float(depth.consistent.float().mean()) > 0.4
        points = world_points(depth)[depth.consistent].numpy()
        distance = scene.distance_to_surface(points)
        assert np.median(distance) < 0.02, index  # the scene is about 4 wide and 3 to 5 away
        assert np.quantile(distance, 0.9) < 0.1, index


def test_references_of_two_sizes_confirm_each_other(scene: TinyScene) -> None:
    views = [stereo_view(reference_view(scene, index), size) for index, size in ((1, 100), (2, 80))]
    found = estimate_depth(views, [(1.0, 8.0)] * 2, replace(SMALL, min_agreeing=1), torch.Generator().manual_seed(0))
    for view, depth in zip(views, found, strict=True):
        assert depth.depth.shape == view.size
        assert float(depth.consistent.float().mean()) > 0.2
        assert np.median(scene.distance_to_surface(world_points(depth)[depth.consistent].numpy())) < 0.05


def test_the_same_generator_gives_the_same_depth(scene: TinyScene) -> None:
    views = [stereo_view(reference_view(scene, index), 60) for index in (1, 2)]
    config = replace(SMALL, sweep_px=60, refine_px=60)

    def run() -> torch.Tensor:
        return estimate_depth(views, [(1.0, 8.0)] * 2, config, torch.Generator().manual_seed(3))[0].depth

    assert torch.equal(run(), run())


def test_of_many_views_only_sources_and_those_whose_source_it_is_may_confirm_a_depth() -> None:
    few = [[1], [0], [0]]
    assert _that_may_agree(0, few) == [1, 2]
    many = [[(index + 1) % 40] for index in range(40)]
    assert _that_may_agree(7, many) == [6, 8]


def test_views_that_share_nothing_get_no_depth() -> None:
    views = [camera(0.0, 0.0), camera(0.0, 180.0)]
    results = estimate_depth(views, [(2.0, 6.0)] * 2, SMALL, torch.Generator().manual_seed(0))
    assert not any(result.consistent.any() for result in results)
    assert consistent_points(results, 100, torch.Generator()).num_seen == 0


def test_masked_pixels_have_no_depth(scene: TinyScene) -> None:
    left = np.zeros(scene.images.shape[1:3], dtype=bool)
    left[:, :80] = True
    masked = [
        replace(view, read_pixels=lambda view=view: (view.rgb, left))
        for view in (reference_view(scene, 1), reference_view(scene, 2))
    ]
    views = [stereo_view(view, 100) for view in masked]
    result = estimate_depth(views, [(1.5, 8.0)] * 2, SMALL, torch.Generator().manual_seed(0))[0]
    assert result.consistent[:, :50].any()
    assert not result.consistent[:, 50:].any()


def test_a_distorted_photograph_is_straightened() -> None:
    # k1 = 0.1: the pixel 40 px right of the middle (x / z = 0.4) lies at 0.4 (1 + 0.1 * 0.16) = 0.4064 in the photograph.
    ramp = np.repeat(np.arange(100, dtype=np.uint8)[None], 80, axis=0)
    view = ReferenceView(
        np.eye(4), 100.0, 100.0, 50.0, 40.0, 100, 80, (0.1, 0.0, 0.0, 0.0, 0.0, 0.0), fisheye=False,
        read_pixels=lambda: (np.repeat(ramp[..., None], 3, axis=2), np.ones((80, 100), dtype=bool)),
    )  # fmt: skip
    straight = stereo_view(view, 100)
    assert straight.size == (80, 100)
    # Pixel 89 has its centre at 89.5, x / z = 0.395; row 39 is half a pixel above the middle.
    x = 0.395 * (1 + 0.1 * (0.395**2 + 0.005**2))
    assert float(straight.grey[39, 89]) * 255 == pytest.approx(100 * x + 50 - 0.5, abs=0.1)


def test_a_smaller_view_has_the_same_field_of_view() -> None:
    small = camera(size=(80, 100)).resized(50)
    assert small.size == (40, 50)
    torch.testing.assert_close(
        small.intrinsics, torch.tensor([[50.0, 0, 25], [0, 50, 20], [0, 0, 1]], dtype=torch.float64)
    )


# ------------------------------------------------------------------------------------------------ seed points


def test_stereo_points_lie_on_the_surfaces_and_random_ones_where_there_is_no_depth(scene: TinyScene) -> None:
    config = SeedPointsConfig(num_random_points=200, min_points=0, max_stereo_points=1500, stereo=SMALL)
    views = [reference_view(scene, index) for index in (1, 2, 3)]
    points = seed_points(views, "stereo", config, torch.Generator().manual_seed(0))
    assert points.num_seen >= 1500
    assert len(points.xyz) == points.num_seen + 200
    assert len(points.depths) == 3
    assert np.median(scene.distance_to_surface(points.xyz[:1500].double().numpy())) < 0.03
    holes = [unexplained_pixels(depth, view) for depth, view in zip(points.depths, views)]
    in_holes = np.zeros(200, dtype=bool)
    random = points.xyz[points.num_seen :].double().numpy()
    for view, hole in zip(views, holes):
        in_camera = random @ view.world_to_camera[:3, :3].T + view.world_to_camera[:3, 3]
        column = np.floor(view.fx * in_camera[:, 0] / in_camera[:, 2] + view.cx).astype(int)
        row = np.floor(view.fy * in_camera[:, 1] / in_camera[:, 2] + view.cy).astype(int)
        inside = (column >= 0) & (column < view.width) & (row >= 0) & (row < view.height) & (in_camera[:, 2] > 0)
        in_holes[inside] |= hole[row[inside], column[inside]]
    assert in_holes.mean() > 0.97  # the others lost a pixel to rounding at a border


def test_too_many_views_are_not_matched_unless_asked_for(scene: TinyScene) -> None:
    config = SeedPointsConfig(num_random_points=10, min_points=0, max_stereo_views=2, stereo=SMALL)
    views = [reference_view(scene, index) for index in (1, 2, 3)]
    assert seed_points(views, "auto", config, torch.Generator().manual_seed(0)).depths == ()
    assert len(seed_points(views[:2], "auto", config, torch.Generator().manual_seed(0)).depths) == 2


# ---------------------------------------------------------------------------------------------- supervision


def two_pixels(depth: float) -> StereoDepth:
    """A view of 2 x 1 pixels, 90 degrees wide and high, which trusts the depth of its right pixel only."""
    view = replace(
        camera(size=(1, 2)), intrinsics=torch.tensor([[1.0, 0, 1], [0, 0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
    )
    return StereoDepth(view, torch.full((1, 2), depth), torch.tensor([[False, True]]))


def test_known_depth_is_looked_up_along_the_ray_of_each_pixel() -> None:
    # The camera has 4 x 2 pixels and focal length 1: its pixels look along x / z = -1.5, -0.5, 0.5, 1.5. Those at 0.5
    # fall on the right pixel of the view (0 to 1), those at -0.5 on the left one, the others on none.
    training = Cameras(camera_to_worlds=torch.eye(4)[None, :3], fx=1.0, fy=1.0, cx=2.0, cy=1.0, width=4, height=2)
    depth, certainty = known_depth(two_pixels(3.0), training).unbind(-1)
    assert depth.tolist() == [[0, 0, 3, 0]] * 2
    assert certainty.tolist() == [[0, 0, 1, 0]] * 2
    # The left pixel has half its probability at inverse depth 0.5, a quarter at 0.4 and at 0.6; each stands for 0.1.
    planes, shares = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.25, 0.5, 0.25])
    two = two_pixels(3.0)
    likely = DepthDistribution(two.view, planes, shares[:, None, None].expand(3, 1, 2))
    depth, certainty = known_depth(replace(two, likely=likely), training).unbind(-1)
    assert depth.flatten().tolist() == pytest.approx([0, 2, 3, 0] * 2)
    half_certain = 1 / (1 + (np.log(0.55 / 0.45) / 0.1) ** 2)
    assert certainty.flatten().tolist() == pytest.approx([0, half_certain, 1, 0] * 2, rel=1e-4)


def test_the_depth_loss_is_the_mean_log_ratio_weighted_by_opacity_and_certainty() -> None:
    # |log(2 / 1)| with opacity 1 and |log(1 / e)| with opacity 0.5; nothing is known of the third pixel.
    depth = torch.tensor([[[2.0], [1.0], [7.0]]], requires_grad=True)
    alpha = torch.tensor([[[1.0], [0.5], [1.0]]], requires_grad=True)
    known = torch.tensor([[[1.0], [np.e], [0.0]]])
    certainty = torch.tensor([[[1.0], [1.0], [0.0]]])
    loss = depth_loss(depth, alpha, known, certainty)
    assert loss.item() == pytest.approx((np.log(2) + 0.5) / 1.5, rel=1e-6)
    loss.backward()
    assert alpha.grad is None
    # d log(2) / 2 = 1 / 2, weighted by 1 / 1.5; the second pixel lies in front and is pulled back.
    assert depth.grad is not None
    torch.testing.assert_close(depth.grad.flatten(), torch.tensor([0.5 / 1.5, -0.5 / 1.5, 0.0]))
    less_certain = depth_loss(depth, alpha, known, torch.tensor([[[1.0], [0.5], [0.0]]]))
    assert less_certain.item() == pytest.approx((np.log(2) + 0.25) / 1.25, rel=1e-6)


def test_the_depth_loss_knows_no_scale_and_is_zero_without_known_depth() -> None:
    generator = torch.Generator().manual_seed(0)
    depth, alpha, known, certainty = (torch.rand(4, 5, 1, generator=generator) + 0.1 for _ in range(4))
    scaled = depth_loss(1000 * depth, alpha, 1000 * known, certainty)
    torch.testing.assert_close(scaled, depth_loss(depth, alpha, known, certainty))
    assert depth_loss(depth, alpha, torch.zeros_like(depth), torch.zeros_like(depth)).item() == 0


def test_the_depth_sheet_shows_each_reference_with_and_without_its_untrusted_depth(tmp_path) -> None:
    write_depth_sheet(tmp_path / "sheet.png", [two_pixels(3.0)])
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (1, 6, 3)  # photograph, disparity, trusted disparity of 2 x 1 pixels each
    assert sheet[0, 4].tolist() == [0, 0, 0]
    assert sheet[0, 5].tolist() == sheet[0, 3].tolist() != [0, 0, 0]


def test_the_depth_sheet_shows_what_the_network_says_beside_stereo(tmp_path) -> None:
    two = two_pixels(3.0)
    probability = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    likely = DepthDistribution(two.view, torch.tensor([0.2, 0.4]), probability)
    write_depth_sheet(tmp_path / "sheet.png", [replace(two, likely=likely)])
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (1, 8, 3)
    assert sheet[0, 6].tolist() != sheet[0, 7].tolist()  # far left, near right
