"""References seen through rendered depth, on a plane and worked by hand."""

import pytest
import torch
from walls import DISTANCE, SIZE, cameras, wall

from nerfstudio_enhancer.warping import (
    WARPED_REFERENCES,
    WarpSources,
    frame_difference,
    nearest_references,
    seen_share,
    warp_references,
)


def warped(x: float, sources: WarpSources, alpha: float = 1.0) -> torch.Tensor:
    depth = torch.full((1, SIZE, SIZE, 1), DISTANCE)
    return warp_references(depth, torch.full_like(depth, alpha), cameras(x), sources)[0].unflatten(0, (-1, 4))


def test_a_reference_seen_from_its_own_place_is_its_photograph():
    sources = wall(0.0)
    first, second = warped(0.0, sources)
    torch.testing.assert_close(first[:3], sources.photographs[0].permute(2, 0, 1))
    torch.testing.assert_close(first[3], torch.ones(SIZE, SIZE))
    assert not second.any()


def test_a_camera_two_pixels_to_the_right_sees_the_photograph_two_pixels_to_the_left():
    sources = wall(0.0)
    first, _ = warped(0.5, sources)  # 0.5 / 0.25 = 2 pixels
    photograph = sources.photographs[0].permute(2, 0, 1)
    torch.testing.assert_close(first[:3, :, :-2], photograph[:, :, 2:])
    assert not first[:, :, -2:].any()  # beyond the photograph's right side


def test_the_nearest_reference_comes_first_and_the_next_fills_in():
    sources = wall(0.0, 0.75)
    first, second = warped(0.5, sources)  # 1 pixel from the second reference, 2 from the first
    torch.testing.assert_close(first[:3, :, 1:], sources.photographs[1].permute(2, 0, 1)[:, :, :-1])
    torch.testing.assert_close(first[:3, :, 0], sources.photographs[0].permute(2, 0, 1)[:, :, 2])
    torch.testing.assert_close(second[:3, :, 1:-2], sources.photographs[0].permute(2, 0, 1)[:, :, 3:])
    assert nearest_references(cameras(0.5), sources.cameras) == [1, 0]


def test_what_the_reference_sees_something_else_in_front_of_is_not_seen():
    assert not warped(0.0, wall(0.0, depth=DISTANCE / 2)).any()


def test_a_difference_of_depth_within_tolerance_counts_in_part():
    first, _ = warped(0.0, wall(0.0, depth=DISTANCE * 1.025))
    # 2.5 % of 5 % is half the tolerance: 1 / (1 + 0.5^2)
    torch.testing.assert_close(first[3], torch.full((SIZE, SIZE), 0.8), atol=1e-4, rtol=0)


def test_holes_of_the_splats_are_seen_by_no_reference():
    assert not warped(0.0, wall(0.0), alpha=0.2).any()


def test_only_the_nearest_candidates_are_tried():
    sources = wall(*(0.25 * i for i in range(8)))
    assert nearest_references(cameras(0.0), sources.cameras) == [0, 1, 2, 3]
    assert warped(0.0, sources).shape == (WARPED_REFERENCES, 4, SIZE, SIZE)


def test_the_share_seen_leaves_out_what_lies_beyond_every_photograph():
    depth = torch.full((1, SIZE, SIZE, 1), DISTANCE)
    share = seen_share(depth, torch.ones_like(depth), cameras(0.5), wall(0.0))
    assert share == (SIZE - 2) / SIZE  # two columns beyond the photograph's right side


def test_frames_that_move_with_their_surface_do_not_flicker_and_a_change_of_brightness_does():
    photograph = wall(0.0).photographs[0]
    moved = torch.zeros_like(photograph)
    moved[:, :-2] = photograph[:, 2:]  # what a camera two pixels to the right sees
    depth = torch.full((2, SIZE, SIZE, 1), DISTANCE)
    both = cameras(0.0, 0.5)
    assert frame_difference(torch.stack([photograph, moved]), depth, torch.ones_like(depth), both) == pytest.approx(
        0, abs=1e-6
    )
    brighter = torch.stack([photograph, moved + 0.25])
    assert frame_difference(brighter, depth, torch.ones_like(depth), both) == pytest.approx(0.25, abs=1e-6)
    assert frame_difference(brighter[:1], depth[:1], torch.ones_like(depth[:1]), both[:1]) is None
