"""Structural similarity, fused on the CPU: value and gradient in one pass over the images."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nerfstudio_enhancer.rasterize.native_library import SsimArgs, check_status, load_library
from nerfstudio_enhancer.rasterize.native_ops import native

WINDOW = 11


def fused_ssim(pred: Tensor, target: Tensor) -> Tensor:
    """Mean SSIM of two image batches, differentiable with respect to `pred`.

    Equals `pytorch_msssim.SSIM(data_range=1.0, size_average=True, channel=c)`: an 11-tap Gaussian window of standard
    deviation 1.5, no padding. Any memory layout is read as it is.

    Args:
        pred: images [b, c, h, w] in [0, 1].
        target: images [b, c, h, w] in [0, 1]; receives no gradient on the CPU.

    Raises:
        ValueError: the shapes differ, are not 4-dimensional, or a side is below 11 pixels.
    """
    if pred.dim() != 4 or pred.shape != target.shape:
        raise ValueError(
            f"fused_ssim compares two batches [b, c, h, w] of one shape, got {tuple(pred.shape)} and {tuple(target.shape)}."
        )
    if min(pred.shape[-2:]) < WINDOW or pred.numel() == 0:
        raise ValueError(f"fused_ssim needs images of at least {WINDOW} x {WINDOW} pixels, got {tuple(pred.shape)}.")
    on_cpu = pred.device.type == "cpu" and target.device.type == "cpu"
    is_float = pred.dtype == torch.float32 and target.dtype == torch.float32
    if on_cpu and is_float and not target.requires_grad and load_library() is not None:
        return _FusedSsim.apply(pred, target)  # pyright: ignore[reportReturnType]
    return _msssim(pred.shape[1])(pred, target)


@cache
def _msssim(channels: int) -> nn.Module:
    from pytorch_msssim import SSIM

    return SSIM(data_range=1.0, size_average=True, channel=channels)


def _arguments(pred: Tensor, target: Tensor) -> SsimArgs:
    batch, channels, height, width = pred.shape
    return SsimArgs(
        batch=batch,
        channels=channels,
        height=height,
        width=width,
        pred_strides=(ctypes.c_int64 * 4)(*pred.stride()),
        target_strides=(ctypes.c_int64 * 4)(*target.stride()),
        threads=torch.get_num_threads(),
        pred=pred.data_ptr(),
        target=target.data_ptr(),
    )


class _FusedSsim(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, target: Tensor) -> Tensor:
        """Mean SSIM; keeps the three derivative maps if a gradient is wanted."""
        args = _arguments(pred, target)
        derivatives = None
        if ctx.needs_input_grad[0]:
            b, c, h, w = pred.shape
            derivatives = torch.empty(3, b, c, h - WINDOW + 1, w - WINDOW + 1)
            args.derivatives = derivatives.data_ptr()
        mean = ctypes.c_double()
        args.mean = ctypes.addressof(mean)
        check_status(native().nse_ssim_forward(ctypes.byref(args)))
        ctx.save_for_backward(pred, target, derivatives)
        return pred.new_tensor(mean.value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *v_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradient of `pred`, in its memory layout."""
        pred, target, derivatives = ctx.saved_tensors
        args = _arguments(pred, target)
        grad = torch.empty_like(pred)
        args.grad_strides = (ctypes.c_int64 * 4)(*grad.stride())
        args.derivatives, args.grad, args.scale = derivatives.data_ptr(), grad.data_ptr(), float(v_outputs[0])
        check_status(native().nse_ssim_backward(ctypes.byref(args)))
        return grad, None
