from __future__ import annotations

import pytest
import torch
from pytorch_msssim import SSIM
from references import ssim_by_loops

from nerfstudio_enhancer.rasterize import fused_ssim, ssim


def images(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(*shape, generator=generator)
    pred = (target + 0.2 * torch.randn(*shape, generator=generator)).clamp(0, 1)
    return pred, target


def value_and_gradient(function, pred, target):
    pred = pred.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = function(pred, target)
    value.backward()
    return value.detach(), pred.grad


@pytest.mark.parametrize("shape", [(1, 3, 48, 64), (2, 3, 11, 11), (1, 1, 13, 12), (1, 4, 37, 131), (3, 2, 29, 15)])
def test_value_and_gradient_equal_pytorch_msssim(shape):
    pred, target = images(*shape)
    value, grad = value_and_gradient(fused_ssim, pred, target)
    expected, expected_grad = value_and_gradient(
        SSIM(data_range=1.0, size_average=True, channel=shape[1]), pred, target
    )
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-4 * expected_grad.abs().max().item())


def test_value_equals_a_loop_over_windows():
    pred, target = images(1, 1, 17, 14)
    assert fused_ssim(pred, target).item() == pytest.approx(ssim_by_loops(pred[0, 0], target[0, 0]), abs=1e-5)


def test_equal_images_have_ssim_one_and_no_gradient():
    pred, _ = images(1, 3, 20, 20)
    value, grad = value_and_gradient(fused_ssim, pred, pred.clone())
    assert value.item() == pytest.approx(1.0, abs=1e-6)
    # float32: the derivative maps cancel to 1e-7 of their size, which is 1 / 300 pixels here
    assert grad.abs().max().item() < 1e-5


def test_a_black_and_a_white_image_have_ssim_of_the_luminance_constant():
    # means 0 and 1, no variance: (2*0*1 + C1) / (0 + 1 + C1) * (0 + C2) / (0 + C2), C1 = 1e-4
    value = fused_ssim(torch.zeros(1, 1, 12, 12), torch.ones(1, 1, 12, 12))
    assert value.item() == pytest.approx(1e-4 / 1.0001, rel=1e-3)


def test_a_view_of_an_image_with_channels_last_gives_the_same_and_keeps_its_layout():
    pred, target = images(1, 3, 32, 40)
    value, grad = value_and_gradient(fused_ssim, pred, target)
    viewed = pred.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    other_value, other_grad = value_and_gradient(
        fused_ssim, viewed, target.transpose(2, 3).contiguous().transpose(2, 3)
    )
    assert torch.equal(value, other_value)
    assert torch.equal(grad, other_grad)
    assert other_grad.stride() == viewed.stride()


def test_the_gradient_is_scaled_by_the_incoming_gradient():
    pred, target = images(1, 3, 16, 16)
    _, grad = value_and_gradient(fused_ssim, pred, target)
    _, scaled = value_and_gradient(lambda p, t: -0.2 * fused_ssim(p, t), pred, target)
    torch.testing.assert_close(scaled, -0.2 * grad)


def test_float64_and_a_wanted_target_gradient_go_to_pytorch_msssim():
    pred, target = images(1, 3, 16, 16)
    expected = fused_ssim(pred, target).item()
    assert fused_ssim(pred.double(), target.double()).dtype == torch.float64
    target.requires_grad_()
    value = fused_ssim(pred, target)
    value.backward()
    assert value.item() == pytest.approx(expected, abs=1e-5)
    assert target.grad is not None
    assert target.grad.abs().max() > 0


def test_without_the_library_pytorch_msssim_is_used(monkeypatch):
    pred, target = images(1, 3, 16, 16)
    expected = fused_ssim(pred, target)
    monkeypatch.setattr(ssim, "load_library", lambda: None)
    torch.testing.assert_close(fused_ssim(pred, target), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("pred_shape", "target_shape", "message"),
    [
        ((1, 3, 20, 20), (1, 3, 20, 21), "one shape"),
        ((3, 20, 20), (3, 20, 20), "one shape"),
        ((1, 3, 10, 20), (1, 3, 10, 20), "at least 11 x 11"),
        ((0, 3, 20, 20), (0, 3, 20, 20), "at least 11 x 11"),
    ],
)
def test_wrong_shapes_are_refused(pred_shape, target_shape, message):
    with pytest.raises(ValueError, match=message):
        fused_ssim(torch.zeros(pred_shape), torch.zeros(target_shape))
