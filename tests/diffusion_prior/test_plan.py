import pytest
import torch
from tiny_prior import tiny_prior

from diffusion_prior.full_size import full_size_prior
from diffusion_prior.plan import CARDS, ClipCost, Plan, clip_cost, paper_efficiency, seconds


def test_the_full_size_prior_has_the_published_parameters_and_takes_no_memory():
    prior = full_size_prior("A")
    assert sum(parameter.numel() for parameter in prior.unet.parameters()) == 1_527_615_722
    assert sum(parameter.numel() for parameter in prior.image_encoder.parameters()) == 632_076_800
    assert {parameter.device.type for module in prior.modules.values() for parameter in module.parameters()} == {"meta"}
    assert (prior.config.num_frames, prior.unet.layout) == (26, "A")


def test_the_parts_of_a_clip_add_up_and_guidance_doubles_the_passes():
    cost = ClipCost(encode=1, embed=2, denoise_pass=10, passes=50, decode=4)
    assert cost.total == 1 + 2 + 500 + 4
    prior = tiny_prior()
    small = Plan(frames=2, height=64, width=64, steps=3)
    with_guidance = clip_cost(prior, small)
    without = clip_cost(prior, Plan(frames=2, height=64, width=64, steps=3, guidance=False))
    assert (with_guidance.passes, without.passes) == (6, 3)
    assert with_guidance.denoise_pass == without.denoise_pass > 0


def test_seconds_and_the_papers_efficiency_by_hand():
    # 312 TFLOP at half of 312 TFLOP/s
    assert seconds(312e12, CARDS["A100 80 GB"], 0.5) == pytest.approx(2.0)
    # three days are 259,200 s: 80,000 steps of 312 TFLOP / 3.24 each would be all of an A100
    assert paper_efficiency(312e12 * 259_200 / 80_000) == pytest.approx(1.0)


def test_half_precision_is_counted_and_the_vae_stays_in_single_precision():
    prior = full_size_prior()
    assert (prior.unet.dtype, prior.vae.dtype) == (torch.float16, torch.float32)


def test_plans_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"`efficiency` must be in \(0, 1\], got 0"):
        Plan(efficiency=0.0)
    with pytest.raises(ValueError, match="at least 1"):
        Plan(frames=0)
