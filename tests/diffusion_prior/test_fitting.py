import dataclasses
import math

import pytest
import torch
from tiny_prior import random_clip

from diffusion_prior.fitting import fit_clip
from diffusion_prior.types import ConditionClip


def ramp_clip(height: int, width: int) -> ConditionClip:
    """Red grows to the right, green downwards: scaling and shifting can be read off."""
    rows = (torch.arange(height) + 0.5) / height
    columns = (torch.arange(width) + 0.5) / width
    rgb = torch.stack([columns.expand(height, -1), rows[:, None].expand(-1, width), torch.zeros(height, width)])
    plane = torch.full((2, 1, height, width), 0.5)
    return ConditionClip(rgb=rgb.repeat(2, 1, 1, 1), alpha=plane, disparity=plane)


def test_as_it_is_nothing_changes():
    clip = random_clip(3, 13, 17)
    fitted = fit_clip(clip, "as-is", None)
    assert fitted.clip is clip
    assert torch.equal(fitted.restore(clip.rgb), clip.rgb)


@pytest.mark.parametrize(
    ("camera", "scaled", "top", "left"),
    [
        ((60, 120), (32, 64), 16, 0),  # wide: the width decides, 64 / 120
        ((120, 60), (64, 32), 0, 16),
        ((20, 30), (20, 30), 22, 17),  # smaller than the frame: not enlarged
        ((64, 64), (64, 64), 0, 0),
    ],
)
def test_padding_scales_both_sides_alike_and_centres(camera, scaled, top, left):
    fitted = fit_clip(ramp_clip(*camera), "pad", (64, 64))
    assert fitted.clip.rgb.shape[-2:] == (64, 64)
    assert fitted.clip.alpha.shape[-2:] == fitted.clip.disparity.shape[-2:] == (64, 64)
    assert (fitted.scaled_height, fitted.scaled_width, fitted.top, fitted.left) == (*scaled, top, left)


@pytest.mark.parametrize("fit", ["pad", "tile"])
@pytest.mark.parametrize("camera", [(60, 120), (120, 60), (200, 210), (20, 30)])
def test_there_and_back_the_picture_is_the_same_at_the_cameras_size(fit, camera):
    clip = ramp_clip(*camera)
    fitted = fit_clip(clip, fit, (64, 64))
    restored = fitted.restore(fitted.clip.rgb)
    assert restored.shape == clip.rgb.shape
    # a ramp survives scaling; at most a pixel of the smaller picture is lost at the edges
    assert (restored - clip.rgb).abs().max() < 1.01 / min(fitted.scaled_height, fitted.scaled_width)


def test_padding_repeats_the_border():
    fitted = fit_clip(ramp_clip(32, 64), "pad", (64, 64))
    assert torch.equal(fitted.clip.rgb[..., 0, :], fitted.clip.rgb[..., 16, :])
    assert torch.equal(fitted.clip.rgb[..., -1, :], fitted.clip.rgb[..., 47, :])


def test_tiling_scales_until_the_shorter_side_fits():
    fitted = fit_clip(ramp_clip(100, 200), "tile", (50, 50))
    assert fitted.clip.rgb.shape[-2:] == (50, 100)
    assert fit_clip(ramp_clip(30, 40), "tile", (50, 50)).clip.rgb.shape[-2:] == (30, 40)


def test_a_picture_of_nearly_the_priors_shape_is_sampled_as_one_tile():
    # 540 rows for 512: two tiles would show almost the same; 512 / 540 = 0.948 of the size is enough
    assert fit_clip(ramp_clip(540, 960), "tile", (512, 960)).clip.rgb.shape[-2:] == (512, 910)
    assert fit_clip(ramp_clip(640, 960), "tile", (512, 960)).clip.rgb.shape[-2:] == (640, 960)  # 0.8 is too little


def test_the_field_of_view_grows_with_padding_at_the_sides_and_not_with_scaling():
    clip = dataclasses.replace(ramp_clip(120, 60), fov_x_rad=2 * math.atan(0.25))
    # 60 columns become 32 of 64: twice the tangent
    assert fit_clip(clip, "pad", (64, 64)).clip.fov_x_rad == pytest.approx(2 * math.atan(0.5))
    assert fit_clip(clip, "tile", (64, 64)).clip.fov_x_rad == clip.fov_x_rad
    assert fit_clip(clip, "pad", (240, 60)).clip.fov_x_rad == clip.fov_x_rad


def test_a_prior_without_a_size_of_its_own_asks_for_one():
    with pytest.raises(ValueError, match="fit='pad' needs a `frame_size`"):
        fit_clip(random_clip(), "pad", None)
