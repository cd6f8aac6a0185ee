import pytest
import torch

from diffusion_prior.noise import exponential_sigmas, karras_sigmas
from diffusion_prior.sampler import SAMPLERS, frame_guidance, guide, sample_dpm_2m, sample_euler, sample_heun


@pytest.mark.parametrize("sample", SAMPLERS.values())
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_a_perfect_denoiser_gives_the_clean_sample(steps, sample):
    clean = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    sampled = sample(lambda noisy, sigma: clean, noise, karras_sigmas(steps, 0.02, 80.0))
    torch.testing.assert_close(sampled, clean)


def test_two_euler_steps_by_hand():
    # denoiser D(x) = x / 2, sigmas 4, 2, 0, noise 1: x = 4; D = 2, slope (4 - 2) / 4 = 0.5, x = 4 - 2 * 0.5 = 3; D = 1.5
    sampled = sample_euler(lambda noisy, sigma: noisy / 2, torch.ones(1), torch.tensor([4.0, 2.0, 0.0]))
    assert sampled.item() == 1.5


def test_many_steps_reach_the_exact_solution_for_gaussian_data():
    # data N(0, 1): D = x / (1 + s^2); the flow keeps x / sqrt(1 + s^2): from 80 n to 80 / sqrt(6401) n = 0.99992 n
    sampled = sample_euler(lambda noisy, sigma: noisy / (1 + sigma**2), torch.ones(1), karras_sigmas(500, 0.002, 80.0))
    assert abs(sampled.item() - 0.99992) < 0.01  # Euler's own error falls as 1 / steps


def test_guidance_rises_linearly_over_the_frames():
    assert frame_guidance(5, 1.0, 3.0).tolist() == [1.0, 1.5, 2.0, 2.5, 3.0]


def test_guidance_extrapolates_from_the_unconditional_frame_by_frame():
    conditional = torch.full((1, 3, 1, 1, 1), 2.0)
    unconditional = torch.full((1, 3, 1, 1, 1), 1.0)
    guided = guide(conditional, unconditional, torch.tensor([0.0, 1.0, 3.0]))
    assert guided.flatten().tolist() == [1.0, 2.0, 4.0]


def test_two_heun_steps_by_hand():
    # D(x) = x / 2, sigmas 4, 2, 0, noise 1: x = 4, slope 0.5; Euler predicts 3 at sigma 2, slope (3 - 1.5) / 2 = 0.75;
    # x = 4 - 2 * (0.5 + 0.75) / 2 = 2.75; the last step is Euler's: D = 1.375
    sampled = sample_heun(lambda noisy, sigma: noisy / 2, torch.ones(1), torch.tensor([4.0, 2.0, 0.0]))
    assert sampled.item() == 1.375


def test_three_dpm_steps_by_hand():
    # D(x) = x / 2, sigmas 8, 4, 2, 0: x = 8, D = 4; x = 4 + (8 - 4) / 2 = 6; D = 3, both steps ln 2: 1.5 * 3 - 0.5 * 4 = 2.5;
    # x = 2.5 + (6 - 2.5) / 2 = 4.25; the last step gives D = 2.125
    sampled = sample_dpm_2m(lambda noisy, sigma: noisy / 2, torch.ones(1), torch.tensor([8.0, 4.0, 2.0, 0.0]))
    assert sampled.item() == 2.125


def test_doubling_the_steps_halves_eulers_error_and_quarters_that_of_the_second_order_solvers():
    def error(sample, steps):  # the flow of Gaussian data, as above: 80 / sqrt(6401)
        levels = karras_sigmas(steps, 0.002, 80.0).double()
        sampled = sample(lambda noisy, sigma: noisy / (1 + sigma**2), torch.ones(1, dtype=torch.float64), levels)
        return abs(sampled.item() - 80 / 6401**0.5)

    gains = {name: error(sample, 40) / error(sample, 80) for name, sample in SAMPLERS.items()}
    # measured 1.99, 4.21 and 4.34: the orders show as the steps shrink
    assert gains["euler"] == pytest.approx(2, abs=0.1)
    assert gains["heun"] == pytest.approx(4, abs=0.5)
    assert gains["dpm++2m"] == pytest.approx(4, abs=0.5)


def test_exponential_levels_fall_by_one_factor():
    levels = exponential_sigmas(4, 1.0, 8.0)
    torch.testing.assert_close(levels, torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match="0 < sigma_min < sigma_max"):
        exponential_sigmas(4, 8.0, 1.0)
