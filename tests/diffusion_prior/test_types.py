import dataclasses
import subprocess
import sys

import jaxtyping
import pytest
import torch
from tiny_prior import random_clip

from diffusion_prior.types import WARP_CHANNELS, ConditionClip


def test_a_single_frame_is_no_clip():
    with pytest.raises(ValueError, match=r"at least 2 frames .* got 1"):
        random_clip(frames=1)


def test_frames_of_another_size_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users run without the checker of the tests
    clip = random_clip()
    with pytest.raises(ValueError, match=r"`alpha` must be \(3, 1, 16, 24\) as `rgb` is, got \(3, 1, 8, 24\)"):
        ConditionClip(rgb=clip.rgb, alpha=clip.alpha[:, :, :8], disparity=clip.disparity)


@pytest.mark.parametrize("shape", [(3, 5, 16, 24), (2, 4, 16, 24), (3, 0, 16, 24), (3, 4, 8, 24)])
def test_warped_references_of_another_shape_are_refused(shape, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(ValueError, match=r"`warped` must hold 4 channels \(r, g, b, seen\) for each .* got"):
        dataclasses.replace(random_clip(), warped=torch.zeros(shape))


@pytest.mark.parametrize("name", ["rgb", "alpha", "disparity", "warped"])
def test_nan_is_refused_and_named(name):
    clip = dataclasses.replace(random_clip(), warped=torch.zeros(3, 4, 16, 24))
    broken = getattr(clip, name).clone()
    broken[1, 0, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=f"`{name}` holds NaN"):
        dataclasses.replace(clip, **{name: broken})


def test_what_the_plugin_imports_loads_neither_diffusers_nor_transformers():
    code = (
        "import sys, diffusion_prior.types, diffusion_prior.conditioning;"
        "print(sorted({'diffusers', 'transformers'} & set(sys.modules)))"
    )
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_as_many_warped_references_as_are_asked_for_come_and_those_that_lack_are_seen_nowhere(count):
    clip = random_clip()
    warped = torch.rand(3, 2 * WARP_CHANNELS, 16, 24, generator=torch.Generator().manual_seed(0))
    taken = dataclasses.replace(clip, warped=warped).warps(count)
    known = min(count, 2) * WARP_CHANNELS
    assert taken.shape == (3, count * WARP_CHANNELS, 16, 24)
    assert torch.equal(taken[:, :known], warped[:, :known])
    assert not taken[:, known:].any()
    assert not clip.warps(count).any()


def test_some_frames_between_the_references_make_a_clip_of_their_own():
    clip = random_clip(6)
    part = clip.between(range(2, 4))
    for name in ("rgb", "alpha", "disparity"):
        assert torch.equal(getattr(part, name), getattr(clip, name)[[0, 2, 3, 5]])
    assert part.warped is None
    assert part.camera_to_world is None
    warped, poses = torch.rand(6, 4, 16, 24), torch.eye(3, 4).repeat(6, 1, 1) * torch.arange(6)[:, None, None]
    part = dataclasses.replace(clip, warped=warped, camera_to_world=poses, fov_x_rad=1.0).between(range(1, 2))
    assert torch.equal(part.warped, warped[[0, 1, 5]])
    assert torch.equal(part.camera_to_world, poses[[0, 1, 5]])
    assert part.fov_x_rad == 1.0
