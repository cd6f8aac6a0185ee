import pytest
import torch

from diffusion_prior.noise import add_noise, karras_sigmas, lognormal_sigmas, loss_weight, precondition


def test_preconditioning_by_hand():
    # sigma = 0.75: sigma^2 + 1 = 1.5625 = 1.25^2, so skip = 0.64, in = 0.8, out = -0.6
    factors = precondition(torch.tensor([0.75, 1.0]))
    torch.testing.assert_close(factors.skip, torch.tensor([0.64, 0.5]))
    torch.testing.assert_close(factors.input, torch.tensor([0.8, 0.5**0.5]))
    torch.testing.assert_close(factors.out, torch.tensor([-0.6, -(0.5**0.5)]))
    torch.testing.assert_close(factors.noise, torch.tensor([-0.0719205, 0.0]))  # ln(0.75) / 4


def test_network_input_and_target_have_unit_variance_at_every_sigma():
    # x = clean + sigma n with unit clean and n; target F = (clean - skip x) / out
    sigma = torch.tensor([0.01, 0.5, 3.0, 80.0])
    factors = precondition(sigma)
    torch.testing.assert_close(factors.input**2 * (1 + sigma**2), torch.ones(4))
    variance = ((1 - factors.skip) ** 2 + (factors.skip * sigma) ** 2) / factors.out**2
    torch.testing.assert_close(variance, torch.ones(4))


def test_loss_weight_is_one_over_out_squared():
    sigma = torch.tensor([0.1, 1.0, 50.0])
    torch.testing.assert_close(loss_weight(sigma), 1 / precondition(sigma).out ** 2)
    assert loss_weight(torch.tensor([1.0])).item() == 2.0


def test_karras_sigmas_fall_from_max_to_min_then_zero():
    sigmas = karras_sigmas(5, 0.02, 80.0)
    assert len(sigmas) == 6
    torch.testing.assert_close(sigmas[[0, 4, 5]], torch.tensor([80.0, 0.02, 0.0]))
    assert (sigmas.diff() < 0).all()


def test_karras_sigmas_by_hand_with_rho_one():
    # rho 1 is linear: 9, 5, 1
    torch.testing.assert_close(karras_sigmas(3, 1.0, 9.0, rho=1.0), torch.tensor([9.0, 5.0, 1.0, 0.0]))


def test_karras_sigmas_equal_those_of_diffusers():
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        timestep_type="continuous",
        beta_schedule="scaled_linear",
    )
    scheduler.set_timesteps(25)
    torch.testing.assert_close(karras_sigmas(25, 0.002, 700.0), scheduler.sigmas, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("steps", "low", "high", "match"),
    [(0, 0.1, 1.0, "at least 1 step, got 0"), (2, 1.0, 1.0, "got 1.0 and 1.0"), (2, 0.0, 1.0, "got 0.0 and 1.0")],
)
def test_impossible_schedules_are_refused(steps, low, high, match):
    with pytest.raises(ValueError, match=match):
        karras_sigmas(steps, low, high)


def test_training_sigmas_follow_the_lognormal_and_the_generator():
    first, again = (lognormal_sigmas(20000, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    # standard error of the mean of 20,000: 1.6 / 141 = 0.011; four of them
    assert abs(first.log().mean() - 0.7) < 0.045
    assert abs(first.log().std() - 1.6) < 0.045


def test_noise_is_scaled_by_each_clips_own_sigma():
    clean = torch.ones(2, 1, 1, 1, 1)
    noisy = add_noise(clean, torch.full_like(clean, 2.0), torch.tensor([0.0, 3.0]))
    assert noisy.flatten().tolist() == [1.0, 7.0]
