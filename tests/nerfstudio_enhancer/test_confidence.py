import pytest
import torch
from torch.testing import assert_close

from nerfstudio_enhancer.confidence import (
    CONTRADICTION,
    image_confidence,
    pixel_confidence,
    pixel_scale,
    reference_agreement,
)


def test_image_confidence_grows_with_the_distance_to_the_nearest_reference() -> None:
    references = torch.tensor([[0.0, 0, 0], [10.0, 0, 0]])
    centres = torch.tensor([[1.0, 0, 0], [5.0, 0, 0], [9.0, 0, 0]])
    # distances to the nearest reference 1, 5, 1 -> over their maximum .2, 1, .2 -> over the mean 7/15: 3/7, 15/7, 3/7
    assert_close(image_confidence(centres, references), torch.tensor([3 / 7, 15 / 7, 3 / 7]))


def test_the_floor_lifts_the_view_on_a_reference() -> None:
    references = torch.zeros(1, 3)
    centres = torch.tensor([[0.0, 0, 0], [2.0, 0, 0]])
    # 0, 1 -> with floor .5: .5, 1 -> over the mean .75
    assert_close(image_confidence(centres, references, floor=0.5), torch.tensor([0.5 / 0.75, 1 / 0.75]))


def test_views_that_all_stand_on_references_weigh_one() -> None:
    assert_close(image_confidence(torch.zeros(3, 3), torch.zeros(1, 3)), torch.ones(3))


def test_pixel_scale_is_the_cube_root_of_the_product() -> None:
    assert_close(pixel_scale(torch.tensor([1.0, 2.0, 4.0])), torch.tensor([2.0]))


def test_pixel_confidence_grows_with_the_scales_and_has_mean_one() -> None:
    # geometric means 1, 2, 3, 4; the 95 % quantile of four values is the 4th: 1/4, 2/4, 3/4, 1 -> over the mean 5/8
    scale_map = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 2, 2, 1).expand(1, 2, 2, 3)
    expected = torch.tensor([0.4, 0.8, 1.2, 1.6]).reshape(1, 2, 2, 1)
    assert_close(pixel_confidence(scale_map), expected)


def test_a_hole_counts_as_fully_unknown() -> None:
    scale_map = torch.tensor([0.0, 4.0]).reshape(1, 1, 2, 1).expand(1, 1, 2, 3)
    alpha = torch.tensor([0.1, 1.0]).reshape(1, 1, 2, 1)
    assert_close(pixel_confidence(scale_map, alpha), torch.ones(1, 1, 2, 1))


@pytest.mark.parametrize("floor", [-0.1, 1.0])
def test_a_floor_outside_its_range_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        image_confidence(torch.ones(2, 3), torch.zeros(1, 3), floor)


def seen_as(*greys: float, height: int = 9, width: int = 9) -> torch.Tensor:
    """References of even colour warped into one frame: `ConditionClip.warped`. [1 warps h w]"""
    slots = [torch.tensor([grey, grey, grey, 1.0]) for grey in greys]
    return torch.cat(slots).reshape(1, -1, 1, 1).expand(1, -1, height, width)


def even(grey: float) -> torch.Tensor:
    return torch.full((1, 9, 9, 3), grey)


def test_a_pixel_that_leaves_what_a_reference_shows_loses_weight() -> None:
    # The render lies 0.1 from the reference, the frame 0.1 + CONTRADICTION: x = CONTRADICTION, 1 / (1 + 1)
    agreement = reference_agreement(even(0.6 + CONTRADICTION), even(0.6), seen_as(0.5))
    assert_close(agreement, torch.full((1, 9, 9, 1), 0.5))


def test_a_pixel_that_comes_nearer_to_a_reference_keeps_its_weight_however_far_it_goes() -> None:
    assert_close(reference_agreement(even(0.5), even(0.9), seen_as(0.4)), torch.ones(1, 9, 9, 1))


def test_it_is_enough_to_agree_with_one_reference() -> None:
    assert_close(reference_agreement(even(0.9), even(0.5), seen_as(0.5, 0.9)), torch.ones(1, 9, 9, 1))
    assert (reference_agreement(even(0.9), even(0.5), seen_as(0.5, 0.4)) < 0.02).all()


def test_what_no_reference_sees_is_believed_as_what_one_sees_in_the_mean() -> None:
    warped = seen_as(0.5).repeat(2, 1, 1, 1)
    warped[0, 3, :, :4] = 0
    warped[1, 3] = 0
    render = even(0.5).repeat(2, 1, 1, 1)
    frames = render.clone()
    frames[0, :, 4:6] = 0.9  # contradicted in two of the five columns that are seen
    agreement = reference_agreement(frames, render, warped)
    believed = agreement[0, :, 4:].mean()
    assert 0.2 < believed < 0.6
    assert_close(agreement[0, :, :4], believed.expand(9, 4, 1))
    assert_close(agreement[1], believed.expand(9, 9, 1))  # a clip is made in one go


def test_where_no_reference_sees_anything_nothing_is_contradicted() -> None:
    warped = seen_as(0.5).clone()
    warped[:, 3] = 0
    assert_close(reference_agreement(even(0.9), even(0.5), warped), torch.ones(1, 9, 9, 1))


def test_single_pixels_are_judged_with_their_surroundings() -> None:
    frame = even(0.5).clone()
    frame[0, 4, 4] = 0.9  # excess 0.4 in one of the window's 25 pixels: 0.016
    expected = 1 / (1 + (0.4 / 25 / CONTRADICTION) ** 2)
    agreement = reference_agreement(frame, even(0.5), seen_as(0.5))
    assert_close(agreement[0, 2:7, 2:7], torch.full((5, 5, 1), expected))
    assert_close(agreement[0, :2], torch.ones(2, 9, 1))
