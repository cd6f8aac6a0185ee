import math

import pytest
import torch
from torch import Tensor

from nerfstudio_enhancer.focus import focus_of_axes
from nerfstudio_enhancer.trajectory import (
    TrajectoryConfig,
    interpolate_views,
    num_frames_between,
    order_reference_views,
    perturb_view,
    plan_trajectories,
    scene_size,
)


def look_at(centre: tuple[float, float, float], target: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> Tensor:
    """OpenGL camera-to-world [3, 4] at `centre` looking at `target`, z up."""
    position = torch.tensor(centre)
    backward = position - torch.tensor(target)
    backward = backward / backward.norm()
    right = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]), backward)
    right = right / right.norm()
    return torch.stack([right, torch.linalg.cross(backward, right), backward, position], dim=1)


def on_circle(angle_deg: float, radius: float = 2.0, height: float = 0.5) -> Tensor:
    angle = math.radians(angle_deg)
    return look_at((radius * math.cos(angle), radius * math.sin(angle), height))


def circle(*angles_deg: float) -> Tensor:
    return torch.stack([on_circle(angle) for angle in angles_deg])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def offset_of_focus(path: Tensor, focus: Tensor) -> Tensor:
    """The focus in camera axes, [t, 3]."""
    return torch.einsum("tji,tj->ti", path[:, :, :3], focus - path[:, :, 3])


# ---------------------------------------------------------------------------------------------- the focus


def test_axes_of_cameras_around_a_point_meet_there() -> None:
    views = circle(0, 50, 140).double()
    focus = focus_of_axes(views[:, :, 3], -views[:, :, 2])
    assert focus is not None
    torch.testing.assert_close(focus, torch.zeros(3, dtype=torch.float64), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "forward",
    [
        [[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]],  # parallel
        [[-0.6, 0.8, 0.0], [0.6, 0.8, 0.0]],  # meeting behind the cameras
        [[0.6, 0.8, 0.0], [-0.6, 0.0, 0.8]],  # passing each other at a distance
    ],
)
def test_axes_that_do_not_meet_have_no_focus(forward: list[list[float]]) -> None:
    centres = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    assert focus_of_axes(centres, torch.tensor(forward), max_gap=0.25) is None


# ------------------------------------------------------------------------------------ between two views


@pytest.mark.parametrize("num_between", [0, 1, 7])
def test_a_path_begins_and_ends_at_its_views_bit_for_bit(num_between: int) -> None:
    first, last = on_circle(0), on_circle(40, radius=2.5)
    path = interpolate_views(first, last, num_between)
    assert path.shape == (num_between + 2, 3, 4)
    assert path.dtype == first.dtype
    assert torch.equal(path[0], first)
    assert torch.equal(path[-1], last)


@pytest.mark.parametrize("meet", [True, False])
def test_swapping_the_views_reverses_the_path(meet: bool) -> None:
    first = on_circle(0)
    last = on_circle(60, radius=3.0) if meet else look_at((4.0, 1.0, 0.0), (9.0, 2.0, 1.0))
    forth, back = interpolate_views(first, last, 6), interpolate_views(last, first, 6)
    torch.testing.assert_close(forth, back.flip(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize("last", [on_circle(75, radius=3.0), look_at((4.0, 1.0, 0.0), (9.0, 2.0, 1.0))])
def test_all_views_of_a_path_are_rigid(last: Tensor) -> None:
    rotation = interpolate_views(on_circle(0), last, 9)[:, :, :3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).expand(11, 3, 3), atol=1e-5, rtol=0)
    assert bool((torch.linalg.det(rotation) > 0).all())


def test_a_path_around_a_focus_keeps_it_in_the_middle_and_its_distance_geometric() -> None:
    path = interpolate_views(on_circle(-30, radius=2.0, height=0.0), on_circle(30, radius=4.0, height=0.0), 3)
    ahead = offset_of_focus(path, torch.zeros(3))
    torch.testing.assert_close(ahead[:, :2], torch.zeros(5, 2), atol=1e-5, rtol=0)
    # From 2 to 4 in four equal factors of 2^(1/4).
    torch.testing.assert_close(-ahead[:, 2], 2.0 * 2.0 ** (torch.arange(5) / 4), atol=1e-4, rtol=0)


def test_a_path_around_a_focus_turns_evenly() -> None:
    path = interpolate_views(on_circle(0, height=0.0), on_circle(80, height=0.0), 3)
    angle = torch.rad2deg(torch.atan2(path[:, 1, 3], path[:, 0, 3]))
    torch.testing.assert_close(angle, torch.tensor([0.0, 20.0, 40.0, 60.0, 80.0]), atol=1e-3, rtol=0)


def test_opposite_views_go_around_the_focus_and_not_through_it() -> None:
    path = interpolate_views(on_circle(0), on_circle(178), 9)
    assert float(path[:, :, 3].norm(dim=1).min()) > 1.9


def test_between_parallel_views_the_centre_moves_on_a_line() -> None:
    first, last = look_at((0.0, 0.0, 0.0), (0.0, 1.0, 0.0)), look_at((4.0, 0.0, 2.0), (4.0, 1.0, 2.0))
    path = interpolate_views(first, last, 3)
    expected = torch.arange(5)[:, None] / 4 * torch.tensor([4.0, 0.0, 2.0])
    torch.testing.assert_close(path[:, :, 3], expected)
    torch.testing.assert_close(path[:, :, :3], first[:, :3].expand(5, 3, 3))


@pytest.mark.parametrize("last", [on_circle(90, radius=3.0), look_at((4.0, 1.0, 0.0), (9.0, 2.0, 1.0))])
def test_paths_are_continuous(last: Tensor) -> None:
    """Ten times as many views make steps about a tenth as long."""
    coarse, fine = interpolate_views(on_circle(0), last, 9), interpolate_views(on_circle(0), last, 99)
    longest = [float((path[1:] - path[:-1]).flatten(1).norm(dim=1).max()) for path in (coarse, fine)]
    assert longest[1] < 0.12 * longest[0]
    torch.testing.assert_close(fine[::10], coarse, atol=1e-5, rtol=0)


def test_equal_views_give_a_path_that_stays() -> None:
    path = interpolate_views(on_circle(0), on_circle(0), 4)
    torch.testing.assert_close(path, on_circle(0).expand(6, 3, 4), atol=1e-6, rtol=0)


def test_a_negative_number_of_views_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot have -1 views"):
        interpolate_views(on_circle(0), on_circle(10), -1)


# --------------------------------------------------------------------------------------- numbers of frames


def test_the_number_of_frames_follows_the_baseline() -> None:
    views = circle(0, 20, 120)
    # The axes meet at the origin, so that the size is the distance from it: sqrt(2^2 + 0.5^2) = 2.0616.
    assert scene_size(views) == pytest.approx(2.0616, abs=1e-4)
    # 20 degrees: the centres are 4 sin(10 deg) = 0.6946 apart, 0.3369 sizes; the turn is a bit less, 0.338 rad at
    # most. Steps of 0.08 make 4.2 of them: 4 steps, 3 frames between.
    assert num_frames_between(views[0], views[1], views, step=0.08, min_frames=1, max_frames=20) == 3
    assert num_frames_between(views[0], views[1], views, step=0.04, min_frames=1, max_frames=20) == 7
    assert num_frames_between(views[0], views[2], views, step=0.08, min_frames=1, max_frames=12) == 12
    assert num_frames_between(views[0], views[0], views, step=0.08, min_frames=2, max_frames=12) == 2


def test_the_number_of_frames_does_not_depend_on_the_unit_of_length() -> None:
    views = circle(0, 25, 70)
    larger = views.clone()
    larger[:, :, 3] *= 37
    assert num_frames_between(views[0], views[1], views) == num_frames_between(larger[0], larger[1], larger)


def test_a_turn_on_the_spot_gets_frames_too() -> None:
    first, last = look_at((1.0, 0.0, 0.0), (1.0, 1.0, 0.0)), look_at((1.0, 0.0, 0.0), (2.0, 0.0, 0.0))
    # 90 degrees are 1.571 rad: 1.571 / 0.2 = 7.85, 8 steps, 7 frames between.
    assert num_frames_between(first, last, torch.stack([first, last]), step=0.2, max_frames=20) == 7


# ------------------------------------------------------------------------------------------------ the tour


def test_the_tour_follows_an_arc_whatever_the_order_of_the_views() -> None:
    angles = [0.0, 25.0, 50.0, 75.0, 100.0, 125.0, 150.0]
    for seed in range(3):
        shuffled = torch.randperm(len(angles), generator=generator(seed)).tolist()
        order = order_reference_views(circle(*[angles[i] for i in shuffled]))
        along = [shuffled[i] for i in order]
        assert along in (list(range(7)), list(range(7))[::-1])


def test_the_tour_is_the_shortest_of_all_for_few_views() -> None:
    from itertools import permutations

    views = torch.stack(
        [look_at(tuple(centre), (0.0, 0.0, 9.0)) for centre in torch.rand(6, 3, generator=generator()).tolist()]
    )
    centres = views[:, :, 3]

    def length(order: tuple[int, ...] | list[int]) -> float:
        return float((centres[list(order[1:])] - centres[list(order[:-1])]).norm(dim=1).sum())

    shortest = min(length(order) for order in permutations(range(6)))
    assert length(order_reference_views(views, turn_weight=0.0)) == pytest.approx(shortest, rel=1e-6)


def test_the_viewing_direction_counts_in_the_tour() -> None:
    """Two pairs stand together but look apart; the tour goes with those that look the same way."""
    outward, inward = (0.0, 9.0, 0.0), (0.0, -9.0, 0.0)
    views = torch.stack(
        [
            look_at((0.0, 0.0, 0.0), outward),
            look_at((0.1, 0.0, 0.0), inward),
            look_at((1.0, 0.0, 0.0), outward),
            look_at((1.1, 0.0, 0.0), inward),
        ]
    )
    assert order_reference_views(views, turn_weight=2.0) in ([0, 2, 3, 1], [1, 3, 2, 0])
    assert order_reference_views(views, turn_weight=0.0) == [0, 1, 2, 3]


def test_one_or_two_views_keep_their_order() -> None:
    assert order_reference_views(circle(10)) == [0]
    assert order_reference_views(circle(90, 0)) == [0, 1]


def test_a_long_tour_is_found_quickly_and_without_detours() -> None:
    count = 60
    shuffled = torch.randperm(count, generator=generator())
    order = order_reference_views(circle(*(shuffled * 360 / count).tolist()))
    along = shuffled[torch.tensor(order)]
    steps = (along[1:] - along[:-1]) % count
    assert bool(((steps == 1) | (steps == count - 1)).all())


# -------------------------------------------------------------------------------------------------- loops


@pytest.mark.parametrize("focus_distance", [None, 2.0])
def test_a_loop_begins_and_ends_at_its_view_and_stays_within_its_radius(focus_distance: float | None) -> None:
    view = on_circle(30)
    loop = perturb_view(view, 12, 0.3, generator(), focus_distance)
    assert torch.equal(loop[0], view)
    assert torch.equal(loop[-1], view)
    away = (loop[:, :, 3] - view[:, 3]).norm(dim=1)
    assert float(away.max()) <= 0.3 + 1e-6
    assert float(away.max()) > 0.2
    rotation = loop[:, :, :3]
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(3).expand(14, 3, 3), atol=1e-5, rtol=0)


def test_a_loop_keeps_looking_at_its_focus() -> None:
    view = on_circle(30)
    distance = float(view[:, 3].norm())
    ahead = offset_of_focus(perturb_view(view, 8, 0.5, generator(), distance), torch.zeros(3))
    torch.testing.assert_close(ahead[:, :2], torch.zeros(10, 2), atol=1e-5, rtol=0)


def test_a_loop_without_focus_keeps_its_direction() -> None:
    view = on_circle(30)
    loop = perturb_view(view, 5, 0.5, generator())
    torch.testing.assert_close(loop[:, :, :3], view[:, :3].expand(7, 3, 3))


def test_loops_are_smooth() -> None:
    coarse, fine = perturb_view(on_circle(0), 19, 0.3, generator()), perturb_view(on_circle(0), 199, 0.3, generator())
    longest = [float((path[1:] - path[:-1]).flatten(1).norm(dim=1).max()) for path in (coarse, fine)]
    assert longest[1] < 0.12 * longest[0]


def test_loops_are_a_function_of_their_generator() -> None:
    assert torch.equal(
        perturb_view(on_circle(0), 5, 0.3, generator(1)), perturb_view(on_circle(0), 5, 0.3, generator(1))
    )
    assert not torch.equal(
        perturb_view(on_circle(0), 5, 0.3, generator(1)), perturb_view(on_circle(0), 5, 0.3, generator(2))
    )


# ------------------------------------------------------------------------------------------------ the plan


def test_a_plan_joins_neighbours_and_begins_and_ends_at_references() -> None:
    views = circle(0, 80, 40)
    plan = plan_trajectories(views, TrajectoryConfig(), generator())
    assert [(path.first, path.last, path.kind) for path in plan] == [(0, 2, "between"), (2, 1, "between")]
    for path in plan:
        assert torch.equal(path.camera_to_world[0], views[path.first])
        assert torch.equal(path.camera_to_world[-1], views[path.last])


def test_a_closed_ring_is_closed() -> None:
    plan = plan_trajectories(circle(0, 90, 180, 270), TrajectoryConfig(), generator())
    assert sorted(tuple(sorted((path.first, path.last))) for path in plan) == [(0, 1), (0, 3), (1, 2), (2, 3)]
    plan = plan_trajectories(circle(0, 90, 180, 270), TrajectoryConfig(close_loop=False), generator())
    assert len(plan) == 3


def test_a_plan_keeps_to_its_budget() -> None:
    views = circle(*range(0, 360, 30))
    for budget in (100, 50, 20):
        config = TrajectoryConfig(step=0.05, max_total_frames=budget)
        plan = plan_trajectories(views, config, generator())
        total = sum(len(path.camera_to_world) - 2 for path in plan)
        assert 0.5 * budget <= total <= budget
        assert min(len(path.camera_to_world) - 2 for path in plan) >= config.min_frames


def test_loops_are_added_around_each_reference() -> None:
    views = circle(0, 40)
    plan = plan_trajectories(views, TrajectoryConfig(perturbations=2, perturbation_frames=3), generator())
    loops = [path for path in plan if path.kind == "around"]
    assert [(path.first, path.last) for path in loops] == [(0, 0), (0, 0), (1, 1), (1, 1)]
    assert all(len(path.camera_to_world) == 5 for path in loops)
    assert not torch.equal(loops[0].camera_to_world, loops[1].camera_to_world)


def test_paths_between_references_do_not_depend_on_the_generator() -> None:
    views = circle(0, 40, 100)
    plans = [plan_trajectories(views, TrajectoryConfig(perturbations=1), generator(seed)) for seed in (0, 1)]
    for first, second in zip(*plans):
        assert torch.equal(first.camera_to_world, second.camera_to_world) == (first.kind == "between")


def test_duplicated_poses_give_no_path_between_them() -> None:
    views = torch.stack([on_circle(0), on_circle(0), on_circle(60)])
    plan = plan_trajectories(views, TrajectoryConfig(), generator())
    assert all(torch.isfinite(path.camera_to_world).all() for path in plan)
    assert all(not torch.equal(path.camera_to_world[0], path.camera_to_world[-1]) for path in plan)
    assert sorted(sorted((path.first, path.last)) for path in plan) == [[0, 2], [1, 2]]


def test_a_single_reference_gets_loops_only() -> None:
    plan = plan_trajectories(circle(0), TrajectoryConfig(perturbations=1), generator())
    assert [path.kind for path in plan] == ["around"]


def test_no_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 reference view, got 0"):
        plan_trajectories(torch.empty(0, 3, 4), TrajectoryConfig(), generator())
