import pytest
import torch
from torch.testing import assert_close

from nerfstudio_enhancer.confidence import image_confidence, pixel_confidence, pixel_scale


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
