import pytest
import torch
from tiny_prior import tiny_prior

from diffusion_prior.full_size import full_size_prior
from diffusion_prior.memory import estimate_memory
from diffusion_prior.timing import ClipTiming, noise_clip, time_clip


def test_a_clip_is_enhanced_once_more_than_it_is_measured(monkeypatch):
    prior, seen = tiny_prior(), []
    enhance = prior.enhance
    monkeypatch.setattr(prior, "enhance", lambda clip, generator: seen.append(clip) or enhance(clip, generator))
    timing = time_clip(prior, 3, 16, 24, repeats=2)
    assert len(seen) == 3
    assert len(timing.seconds) == 2
    assert min(timing.seconds) > 0
    assert timing.peak_bytes is None
    assert timing.estimate == estimate_memory(prior, 3, 16, 24, prior.preset)


def test_the_median_is_told_by_clip_and_by_frame():
    estimate = estimate_memory(tiny_prior(), 4, 16, 24, tiny_prior().preset)
    text = str(ClipTiming(4, (3.0, 2.0, 7.0), 3 * 1024**3, estimate))
    assert "3.00 s a clip of 4 frames, 0.750 s a frame (median of 3: 2.00 to 7.00 s)" in text
    assert "memory measured: 3.0 GiB" in text
    assert f"memory estimated: {estimate}" in text


def test_the_clip_of_noise_has_what_every_layout_reads():
    clip = noise_clip(3, 8, 16)
    assert clip.rgb.shape == (3, 3, 8, 16)
    assert clip.camera_to_world is not None
    assert clip.camera_to_world[:, 0, 3].tolist() == [0.0, 0.5, 1.0]


def test_no_measured_time_is_refused():
    with pytest.raises(ValueError, match="`repeats` must be at least 1, got 0"):
        time_clip(tiny_prior(), 3, 16, 24, repeats=0)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["A", "B"])
def test_a_clip_of_the_full_size_stays_within_its_estimate(layout):
    prior = full_size_prior(layout, torch.float16, "cuda").eval()
    timing = time_clip(prior, 25, 512, 512, repeats=1)
    assert timing.peak_bytes is not None
    assert timing.peak_bytes < timing.estimate.peak
