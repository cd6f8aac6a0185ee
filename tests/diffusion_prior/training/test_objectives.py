import math

import pytest
import torch

from diffusion_prior.conditioning import LatentCondition
from diffusion_prior.training.objectives import (
    denoising_loss,
    discriminator_hinge,
    draw_dropped_clips,
    drop_middle_frames,
    ema_decay_at,
    generator_hinge,
    kl_to_unit_normal,
    learning_rate_factor,
    perceptual_distance,
    psnr,
)


def test_learning_rate_warms_up_peaks_and_falls_to_zero():
    # warm-up over 3 steps: 1/4, 2/4, 3/4, then 1; half a cosine: 1 at 0, 0.5 in the middle, 0 at the end
    assert [learning_rate_factor(step, 0.0, 3) for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert learning_rate_factor(1000, 0.5, 3) == pytest.approx(0.5)
    assert learning_rate_factor(1000, 1.0, 3) == pytest.approx(0.0)


def test_average_forgets_fast_at_first():
    # (1 + 0) / (10 + 0) and (1 + 9) / (10 + 9), then the limit
    assert ema_decay_at(0, 0.99) == pytest.approx(0.1)
    assert ema_decay_at(9, 0.99) == pytest.approx(10 / 19)
    assert ema_decay_at(10**6, 0.99) == 0.99


def test_unit_normal_has_no_divergence_from_itself():
    assert kl_to_unit_normal(torch.zeros(4), torch.zeros(4)) == 0
    # mean 2, variance e: (4 + e - 1 - 1) / 2
    assert float(kl_to_unit_normal(torch.tensor([2.0]), torch.tensor([1.0]))) == pytest.approx((2 + math.e) / 2)


def test_every_noise_level_weighs_alike():
    # the network's own error is 1 everywhere: D is off by c_out = sigma / sqrt(sigma^2 + 1), which the weight undoes
    for sigma in (0.1, 1.0, 80.0):
        clean = torch.zeros(1, 2, 1, 2, 2)
        denoised = clean + sigma / math.sqrt(sigma**2 + 1)
        for kind in ("l1", "l2"):
            assert float(denoising_loss(denoised, clean, torch.tensor([sigma]), kind)) == pytest.approx(1.0, rel=1e-5)


def test_each_clip_has_the_weight_of_its_own_noise_level():
    clean = torch.zeros(2, 1, 1, 1, 1)
    denoised = torch.ones(2, 1, 1, 1, 1)
    # (1 + 1) / 1 = 2 and (1 + 4) / 4 = 1.25
    assert float(denoising_loss(denoised, clean, torch.tensor([1.0, 2.0]), "l2")) == pytest.approx((2 + 1.25) / 2)


def test_the_authors_weigh_absolute_errors_by_the_whole_weight_and_l1_by_its_root():
    clean = torch.zeros(2, 1, 1, 1, 1)
    denoised = torch.tensor([0.5, -0.2]).reshape(2, 1, 1, 1, 1)
    sigma = torch.tensor([1.0, 0.5])
    # (1 + 1) / 1 = 2 and (1 + 0.25) / 0.25 = 5: 2 * 0.5 = 1 and 5 * 0.2 = 1; squared, 2 * 0.25 = 0.5 and 5 * 0.04 = 0.2
    assert float(denoising_loss(denoised, clean, sigma, "authors")) == pytest.approx(1.0)
    assert float(denoising_loss(denoised, clean, sigma, "l2")) == pytest.approx(0.35)
    roots = (math.sqrt(2) * 0.5 + math.sqrt(5) * 0.2) / 2
    assert float(denoising_loss(denoised, clean, sigma, "l1")) == pytest.approx(roots)


def test_dropout_takes_the_condition_of_middle_frames_only():
    condition = LatentCondition(
        latents=torch.ones(2, 4, 3, 2, 2),
        extra=torch.ones(2, 4, 2, 2, 2),
        embeddings=torch.ones(2, 4, 1, 5),
        micro=torch.ones(2, 3),
    )
    dropped = drop_middle_frames(condition, torch.tensor([True, False]))
    for values in (dropped.latents, dropped.extra, dropped.embeddings):
        frame_means = values.flatten(2).mean(dim=2)
        assert frame_means.tolist() == [[1, 0, 0, 1], [1, 1, 1, 1]]
    assert torch.equal(dropped.micro, condition.micro)


def test_dropout_hits_the_asked_share_of_clips():
    generator = torch.Generator().manual_seed(0)
    share = draw_dropped_clips(10_000, 0.1, generator).float().mean()
    assert abs(float(share) - 0.1) < 0.01  # 3 standard deviations of a binomial share
    assert not draw_dropped_clips(100, 0.0, generator).any()


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    # real: relu(1-2), relu(1-0) -> 0, 1, mean 0.5; fake: relu(1-3), relu(1+1) -> 0, 2, mean 1; half their sum
    assert float(discriminator_hinge(real, fake)) == pytest.approx(0.75)
    assert float(generator_hinge(fake)) == pytest.approx(1.0)


def test_psnr_by_hand():
    pred = torch.full((1, 3, 2, 2), 0.6)
    # error 0.1 everywhere: -10 log10(0.01) = 20 dB; values above 1 count as 1
    torch.testing.assert_close(psnr(pred, pred - 0.1), torch.tensor([20.0]))
    assert float(psnr(pred, pred)) == 100
    torch.testing.assert_close(psnr(torch.full((1, 3, 2, 2), 7.0), torch.full((1, 3, 2, 2), 0.9)), torch.tensor([20.0]))


def test_perceptual_distance_takes_clips_and_ignores_what_is_out_of_range():
    clip = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bright = torch.where(clip > 0.9, torch.full_like(clip, 5.0), clip)
    assert float(perceptual_distance(clip, clip)) == 0
    torch.testing.assert_close(perceptual_distance(bright, clip), perceptual_distance(bright.clamp(-1, 1), clip))
