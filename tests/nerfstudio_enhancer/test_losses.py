import torch
from pytorch_msssim import SSIM
from torch.testing import assert_close

from nerfstudio_enhancer.losses import confidence_weighted_photometric


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
