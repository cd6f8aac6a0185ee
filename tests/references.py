"""Slow, obvious implementations that the tests compare against. Plain loops, float64, no cleverness."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def blend_by_loops(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    features: Tensor,
    depths: Tensor,
    radii: Tensor,
    width: int,
    height: int,
    background: Tensor,
) -> tuple[Tensor, Tensor]:
    """One camera, one pixel and one Gaussian at a time: render [h, w, f] and opacity [h, w] (gsplat 1.4's rules)."""
    order = [int(i) for i in torch.argsort(depths, stable=True) if radii[i] > 0]
    render, opacity = torch.zeros(height, width, features.shape[-1], dtype=means2d.dtype), torch.zeros(height, width)
    for y in range(height):
        for x in range(width):
            transmittance = 1.0
            for i in order:
                (mx, my), r = means2d[i].tolist(), int(radii[i])
                tile_x, tile_y = x // 16, y // 16
                if not (math.floor((mx - r) / 16) <= tile_x < math.ceil((mx + r) / 16)):
                    continue
                if not (math.floor((my - r) / 16) <= tile_y < math.ceil((my + r) / 16)):
                    continue
                a, b, c = conics[i].tolist()
                dx, dy = mx - (x + 0.5), my - (y + 0.5)
                sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
                alpha = min(0.999, float(opacities[i]) * math.exp(-sigma))
                if sigma < 0 or alpha < 1 / 255:
                    continue
                if transmittance * (1 - alpha) <= 1e-4:
                    break
                render[y, x] += features[i] * alpha * transmittance
                transmittance *= 1 - alpha
            render[y, x] += transmittance * background
            opacity[y, x] = 1 - transmittance
    return render, opacity


def ssim_by_loops(pred: Tensor, target: Tensor) -> float:
    """Mean SSIM of two planes [h, w]: 11 x 11 Gaussian window of standard deviation 1.5, data range 1."""
    weights = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    window = torch.tensor([[a * b for a in weights] for b in weights], dtype=torch.float64)
    window = window / window.sum()
    values = []
    for y in range(pred.shape[0] - 10):
        for x in range(pred.shape[1] - 10):
            p, t = pred[y : y + 11, x : x + 11].double(), target[y : y + 11, x : x + 11].double()
            mean_p, mean_t = (window * p).sum(), (window * t).sum()
            var_p, var_t = (window * (p - mean_p) ** 2).sum(), (window * (t - mean_t) ** 2).sum()
            covariance = (window * (p - mean_p) * (t - mean_t)).sum()
            luminance = (2 * mean_p * mean_t + 0.01**2) / (mean_p**2 + mean_t**2 + 0.01**2)
            values.append(luminance * (2 * covariance + 0.03**2) / (var_p + var_t + 0.03**2))
    return float(torch.stack(values).mean())


def gsplat_projection(
    means: Tensor, quats: Tensor, scales: Tensor, viewmats: Tensor, intrinsics: Tensor, width: int, height: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gsplat's own PyTorch projection: radii, means2d, depths, conics, compensations."""
    from gsplat.cuda._torch_impl import _fully_fused_projection, _quat_scale_to_covar_preci

    covars, _ = _quat_scale_to_covar_preci(quats, scales, compute_preci=False)
    return _fully_fused_projection(  # pyright: ignore[reportReturnType]
        means, covars, viewmats, intrinsics, width, height, calc_compensations=True
    )


def gsplat_spherical_harmonics(degree: int, directions: Tensor, coefficients: Tensor) -> Tensor:
    """gsplat's own PyTorch spherical harmonics."""
    from gsplat.cuda._torch_impl import _spherical_harmonics

    return _spherical_harmonics(degree, directions, coefficients)


def layout_a_forward(
    stock: torch.nn.Module, sample: Tensor, noise_condition: Tensor, embeddings: Tensor, poses: Tensor
) -> Tensor:
    """The pose-conditioned UNet stated anew: sinusoids and their two layers by loops, then diffusers' own blocks.

    `stock` is a diffusers UNet that also holds `pose_embedding`; shapes [b f c h w], [b], [b f 1 d], [b f 22].
    """
    layers = stock.pose_embedding.linear_1, stock.pose_embedding.linear_2
    rows = []
    for b in range(sample.shape[0]):
        level = stock.time_embedding(stock.time_proj(noise_condition[b : b + 1]))[0]
        for f in range(sample.shape[1]):
            angles = [[float(number) * 10000 ** (-i / 24) for i in range(24)] for number in poses[b, f]]
            waves = []
            for row in angles:
                waves += [math.cos(angle) for angle in row] + [math.sin(angle) for angle in row]
            hidden = torch.nn.functional.silu(layers[0](torch.tensor(waves)))
            rows.append(level + layers[1](hidden))
    shared = {"temb": torch.stack(rows), "image_only_indicator": torch.zeros(sample.shape[:2])}
    context = {"encoder_hidden_states": embeddings.flatten(0, 1)}
    hidden = stock.conv_in(sample.flatten(0, 1))
    skips = [hidden]
    for block in stock.down_blocks:
        hidden, more = block(hidden_states=hidden, **shared, **(context if hasattr(block, "attentions") else {}))
        skips += more
    hidden = stock.mid_block(hidden_states=hidden, **shared, **context)
    for block in stock.up_blocks:
        taken = tuple(skips[-len(block.resnets) :])
        del skips[-len(block.resnets) :]
        hidden = block(
            hidden_states=hidden,
            res_hidden_states_tuple=taken,
            **shared,
            **(context if hasattr(block, "attentions") else {}),
        )
    out = stock.conv_out(torch.nn.functional.silu(stock.conv_norm_out(hidden)))
    return out.unflatten(0, sample.shape[:2])
