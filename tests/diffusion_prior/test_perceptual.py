import pytest
import torch
from torchmetrics.functional.image.lpips import _LPIPS

from diffusion_prior.perceptual import AlexNetLpips, lpips_alex


def picture(seed: int, height: int = 64, width: int = 48) -> torch.Tensor:
    """Smooth colour noise [2 3 h w] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(2, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)


@pytest.fixture(scope="module")
def torchmetrics_lpips() -> _LPIPS:
    """The implementation that `ns-eval` uses, with its own linear heads and our features instead of a download."""
    reference = _LPIPS(pretrained=True, net="alex", pnet_rand=True)
    features = AlexNetLpips().backbone.features
    for name, module in reference.net.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.load_state_dict(features[name.rsplit(".", 1)[-1]].state_dict())
    return reference


def test_equals_torchmetrics_with_the_same_features(torchmetrics_lpips):
    pred, target = picture(0), picture(1)
    expected = torchmetrics_lpips(pred, target, normalize=True).flatten()
    assert expected.min() > 0.05
    torch.testing.assert_close(lpips_alex(pred, target), expected, rtol=1e-4, atol=1e-5)


def test_is_zero_only_for_the_same_picture():
    pred = picture(0)
    assert torch.equal(lpips_alex(pred, pred), torch.zeros(2))
    assert (lpips_alex(pred, (pred + 0.1).clamp(0, 1)) > 0).all()


def test_is_symmetric():
    torch.testing.assert_close(lpips_alex(picture(0), picture(1)), lpips_alex(picture(1), picture(0)))


def test_grows_with_blur():
    sharp = picture(0)
    blur = [torch.nn.functional.avg_pool2d(sharp, size, 1, size // 2) for size in (3, 7, 13)]
    distances = [lpips_alex(blurred, sharp).mean() for blurred in blur]
    assert distances[0] < distances[1] < distances[2]


def test_gradient_reaches_the_prediction_and_is_finite_even_at_the_target():
    pred = picture(0).requires_grad_()
    lpips_alex(pred, picture(1)).sum().backward()
    assert pred.grad is not None
    assert pred.grad.abs().max() > 0
    black = torch.zeros(1, 3, 64, 64, requires_grad=True)
    lpips_alex(black, torch.zeros(1, 3, 64, 64)).sum().backward()
    assert black.grad is not None
    assert black.grad.isfinite().all()


def test_its_own_weights_are_never_trained():
    assert not any(parameter.requires_grad for parameter in AlexNetLpips().parameters())


def test_refuses_pictures_that_the_network_cannot_see():
    with pytest.raises(ValueError, match="at least 31 x 31"):
        lpips_alex(torch.zeros(1, 3, 30, 64), torch.zeros(1, 3, 30, 64))


def test_refuses_unequal_shapes():
    with pytest.raises(ValueError, match="one shape"):
        lpips_alex(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 32))
