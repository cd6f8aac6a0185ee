import math

import pytest
import torch
from pytorch_msssim import SSIM
from torch.testing import assert_close

from nerfstudio_enhancer.losses import confidence_weighted_photometric, disparity_smoothness, ray_spread


def images(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(16, 20, 3, generator=generator), torch.rand(16, 20, 3, generator=generator)


def splatfacto_loss(rendered: torch.Tensor, target: torch.Tensor, ssim_lambda: float) -> torch.Tensor:
    """As in nerfstudio's SplatfactoModel.get_loss_dict."""
    ssim = SSIM(data_range=1.0, size_average=True, channel=3)
    simloss = 1 - ssim(target.permute(2, 0, 1)[None, ...], rendered.permute(2, 0, 1)[None, ...])
    return (1 - ssim_lambda) * torch.abs(target - rendered).mean() + ssim_lambda * simloss


def test_full_confidence_equals_splatfacto_loss() -> None:
    rendered, target = images()
    loss = confidence_weighted_photometric(rendered, target, torch.ones(16, 20, 1), 1.0, 0.2)
    assert_close(loss, splatfacto_loss(rendered, target, 0.2), rtol=1e-5, atol=1e-6)


def test_weights_by_hand_without_the_ssim_term() -> None:
    rendered = torch.zeros(16, 16, 3)
    target = torch.full((16, 16, 3), 0.5)
    pixel = torch.ones(16, 16, 1)
    pixel[:8] = 3.0  # mean of P_c |d| = (3 + 1) / 2 * 0.5 = 1
    assert_close(confidence_weighted_photometric(rendered, target, pixel, 0.25, 0.0), torch.tensor(0.25))


def test_image_confidence_scales_both_terms() -> None:
    rendered, target = images(1)
    one = confidence_weighted_photometric(rendered, target, torch.ones(16, 20, 1), 1.0, 0.2)
    assert_close(confidence_weighted_photometric(rendered, target, torch.ones(16, 20, 1), 0.3, 0.2), 0.3 * one)


def test_a_pixel_without_confidence_gets_no_gradient_from_l1() -> None:
    rendered, target = images(2)
    rendered.requires_grad_()
    pixel = torch.ones(16, 20, 1)
    pixel[0, 0] = 0.0
    confidence_weighted_photometric(rendered, target, pixel, 1.0, 0.0).backward()
    assert rendered.grad is not None
    assert torch.all(rendered.grad[0, 0] == 0)
    assert torch.all(rendered.grad[1:] != 0)


def test_disparity_smoothness_by_hand() -> None:
    depth = torch.tensor([[1.0, 2.0], [2.0, 2.0]])[..., None]  # median 2: disparities 2, 1 / 1, 1
    flat = torch.full((2, 2, 3), 0.5)
    # down: mean of |1 - 2| and 0; right: mean of |1 - 2| and 0
    assert float(disparity_smoothness(depth, flat)) == pytest.approx(0.5 + 0.5)
    edge = flat.clone()
    edge[0, 0] = 0.55  # one step of the edge's width on both sides of the jump
    assert float(disparity_smoothness(depth, edge)) == pytest.approx(math.exp(-1), rel=1e-4)


def test_disparity_smoothness_does_not_depend_on_the_unit_of_depth() -> None:
    depth = torch.rand(6, 7, 1, generator=torch.Generator().manual_seed(0)) + 0.5
    photograph = torch.rand(6, 7, 3, generator=torch.Generator().manual_seed(1))
    once, again = disparity_smoothness(depth, photograph), disparity_smoothness(depth * 7, photograph)
    torch.testing.assert_close(once, again)


def test_disparity_of_pixels_where_nothing_is_stays_finite() -> None:
    depth = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])[..., None].requires_grad_()
    loss = disparity_smoothness(depth, torch.zeros(2, 3, 3))
    loss.backward()
    assert loss.isfinite()
    assert depth.grad is not None
    assert depth.grad.isfinite().all()


def moments_of(disparities: list[list[float]], weights: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """What compositing splats of these disparities with these weights gives, one row of pixels."""
    d, w = torch.tensor(disparities), torch.tensor(weights)
    return torch.stack([(w * d).sum(-1), (w * d**2).sum(-1)], dim=-1)[None], w.sum(-1)[None, :, None]


def test_ray_spread_by_hand() -> None:
    # Left: 1 and 3 in equal parts, deviation 1 around 2. Right: one surface at 2. The picture's mean is 2.
    moments, alpha = moments_of([[1.0, 3.0], [2.0, 2.0]], [[0.5, 0.5], [0.4, 0.6]])
    deviation = math.sqrt(0.25 + 1e-4) - 0.01
    assert float(ray_spread(moments, alpha)) == pytest.approx(deviation / 2, rel=1e-4)


def test_ray_spread_does_not_know_the_scenes_scale() -> None:
    near, alpha = moments_of([[1.0, 3.0], [2.0, 2.5]], [[0.5, 0.3], [0.4, 0.1]])
    far = moments_of([[0.1, 0.3], [0.2, 0.25]], [[0.5, 0.3], [0.4, 0.1]])[0]
    assert_close(ray_spread(near, alpha), ray_spread(far, alpha))


def test_ray_spread_of_an_empty_picture_is_zero_and_has_finite_gradients() -> None:
    moments = torch.zeros(4, 4, 2, requires_grad=True)
    loss = ray_spread(moments, torch.zeros(4, 4, 1))
    loss.backward()
    assert float(loss.detach()) == 0
    assert moments.grad is not None
    assert torch.isfinite(moments.grad).all()


def test_ray_spread_draws_the_splats_of_a_ray_together() -> None:
    disparity = torch.tensor([1.0, 3.0], requires_grad=True)
    weights = torch.tensor([0.5, 0.4])
    moments = torch.stack([(weights * disparity).sum(), (weights * disparity**2).sum()])[None, None]
    ray_spread(moments, weights.sum().reshape(1, 1, 1)).backward()
    assert disparity.grad is not None
    assert disparity.grad[0] < 0 < disparity.grad[1]
