"""The rasteriser in plain PyTorch: the oracle of the tests, and the fallback where no compiler was at hand.

Differentiable by autograd in every input, in float32 and float64. It loops over tiles in Python and costs seconds
where the native one costs milliseconds.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_SIZE = 16
ALPHA_MIN, ALPHA_MAX, TRANSMITTANCE_STOP = 1.0 / 255.0, 0.999, 1e-4


def quaternions_to_rotations(quats: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of quaternions wxyz [..., 4], which need not be normalised."""
    w, x, y, z = F.normalize(quats, dim=-1).unbind(-1)
    rows = [
        *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    ]
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def spherical_harmonics(degree: int, directions: Tensor, coefficients: Tensor) -> Tensor:
    """Colours [..., 3] of SH coefficients [..., K, 3] seen along `directions` [..., 3] (Sloan, JCGT 2013)."""
    x, y, z = F.normalize(directions, dim=-1).unbind(-1)
    xx, yy, zz, xy = x * x, y * y, z * z, x * y
    basis = [torch.full_like(x, 0.2820947917738781)]
    if degree >= 1:
        basis += [-0.48860251190292 * y, 0.48860251190292 * z, -0.48860251190292 * x]
    if degree >= 2:
        basis += [
            1.092548430592079 * xy,
            -1.092548430592079 * y * z,
            0.9461746957575601 * zz - 0.3153915652525201,
            -1.092548430592079 * x * z,
            0.5462742152960395 * (xx - yy),
        ]
    if degree >= 3:
        c = 0.4570457994644658 - 2.285228997322329 * zz
        basis += [
            -0.5900435899266435 * y * (3 * xx - yy),
            2.890611442640554 * xy * z,
            c * y,
            z * (1.865881662950577 * zz - 1.119528997770346),
            c * x,
            1.445305721320277 * z * (xx - yy),
            -0.5900435899266435 * x * (xx - 3 * yy),
        ]
    stacked = torch.stack(basis, dim=-1)
    return (stacked[..., None] * coefficients[..., : stacked.shape[-1], :]).sum(dim=-2)


def project_gaussians(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    viewmats: Tensor,
    intrinsics: Tensor,
    width: int,
    height: int,
    near_plane: float = 0.01,
    far_plane: float = 1e10,
    radius_clip: float = 0.0,
    eps2d: float = 0.3,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """EWA projection as in gsplat 1.4: radii [C, N] int32, means2d [C, N, 2], depths [C, N], conics [C, N, 3], compensations [C, N].

    Gaussians that are not drawn have radius 0, and 0 in everything else.
    """
    rotation, translation = viewmats[:, :3, :3], viewmats[:, :3, 3]
    points = torch.einsum("cij,nj->cni", rotation, means) + translation[:, None]
    depths = points[..., 2]
    in_depth = (depths >= near_plane) & (depths <= far_plane) & (depths > 0)
    z = torch.where(in_depth, depths, torch.ones_like(depths))
    fx, fy, cx, cy = (intrinsics[:, i, j, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    margin_x, margin_y = 0.3 * 0.5 * width / fx, 0.3 * 0.5 * height / fy
    tan_x, tan_y = points[..., 0] / z, points[..., 1] / z
    clamped_x = torch.minimum(torch.maximum(tan_x, -cx / fx - margin_x), (width - cx) / fx + margin_x)
    clamped_y = torch.minimum(torch.maximum(tan_y, -cy / fy - margin_y), (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * clamped_x / z, zero, fy / z, -fy * clamped_y / z], dim=-1)
    factors = quaternions_to_rotations(quats) * scales[:, None, :]
    t = torch.einsum("cnij,cjk,nkl->cnil", jacobian.unflatten(-1, (2, 3)), rotation, factors)
    cxx0, cyy0, cxy = (t[..., 0, :] ** 2).sum(-1), (t[..., 1, :] ** 2).sum(-1), (t[..., 0, :] * t[..., 1, :]).sum(-1)
    det0 = cxx0 * cyy0 - cxy * cxy
    cxx, cyy = cxx0 + eps2d, cyy0 + eps2d
    det = cxx * cyy - cxy * cxy
    half_sum = 0.5 * (cxx + cyy)
    largest = half_sum + torch.sqrt(torch.clamp(half_sum * half_sum - det, min=0.01))
    radius = torch.ceil(3.0 * torch.sqrt(largest)).detach()
    means2d = torch.stack([fx * tan_x + cx, fy * tan_y + cy], dim=-1)
    visible = in_depth & (det > 0) & torch.isfinite(det) & torch.isfinite(radius) & (radius > radius_clip)
    for axis, size in ((0, width), (1, height)):
        visible = visible & (means2d[..., axis] + radius > 0) & (means2d[..., axis] - radius < size)
    radii = torch.where(visible, radius.clamp(max=1e9), torch.zeros_like(radius)).int()
    safe_det = torch.where(visible, det, torch.ones_like(det))
    conics = torch.stack([cyy / safe_det, -cxy / safe_det, cxx / safe_det], dim=-1)
    ratio = torch.where(visible, det0 / safe_det, torch.ones_like(det))
    compensations = torch.sqrt(ratio.clamp(min=1e-30))

    def masked(value: Tensor) -> Tensor:
        mask = visible.reshape(*visible.shape, *[1] * (value.dim() - 2))
        return torch.where(mask, value, torch.zeros_like(value))

    return radii, masked(means2d), masked(depths), masked(conics), masked(compensations)


def rasterize_gaussians(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    features: Tensor,
    depths: Tensor,
    radii: Tensor,
    width: int,
    height: int,
    backgrounds: Tensor | None = None,
    absgrad: bool = False,
) -> tuple[Tensor, Tensor]:
    """Blend front to back as gsplat 1.4: render [C, H, W, F] and accumulated opacity [C, H, W, 1].

    Alpha is at most 0.999, contributions below 1/255 are skipped, and a pixel is closed by the first Gaussian that would
    bring its transmittance to 1e-4 or less. A Gaussian touches the 16 x 16 tiles that its square of 3 standard deviations
    touches. With `absgrad`, the backward pass adds up `means2d.absgrad`.
    """
    cameras = means2d.shape[0]
    if absgrad:
        means2d.absgrad = torch.zeros_like(means2d)  # pyright: ignore[reportAttributeAccessIssue]
    tiles_x, tiles_y = math.ceil(width / TILE_SIZE), math.ceil(height / TILE_SIZE)
    low = torch.floor((means2d.detach() - radii[..., None]) / TILE_SIZE)
    high = torch.ceil((means2d.detach() + radii[..., None]) / TILE_SIZE)
    images, alphas = [], []
    for camera in range(cameras):
        visible = torch.nonzero(radii[camera] > 0)[:, 0]
        order = visible[torch.argsort(depths[camera, visible].detach(), stable=True)]
        left, top = low[camera, order].unbind(-1)
        right, bottom = high[camera, order].unbind(-1)
        rows = []
        for tile_y in range(tiles_y):
            row = []
            in_row = (top <= tile_y) & (tile_y < bottom)
            for tile_x in range(tiles_x):
                index = order[in_row & (left <= tile_x) & (tile_x < right)]
                size_y = min(TILE_SIZE, height - tile_y * TILE_SIZE)
                size_x = min(TILE_SIZE, width - tile_x * TILE_SIZE)
                ys = torch.arange(size_y, dtype=means2d.dtype) + tile_y * TILE_SIZE + 0.5
                xs = torch.arange(size_x, dtype=means2d.dtype) + tile_x * TILE_SIZE + 0.5
                pixels = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1).reshape(-1, 2)
                blended = _blend(means2d, conics, opacities, features, camera, index, pixels, absgrad)
                row.append(blended.unflatten(0, (size_y, size_x)))
            rows.append(torch.cat(row, dim=1))
        image = torch.cat(rows, dim=0)
        render, alpha = image[..., :-1], image[..., -1:]
        if backgrounds is not None:
            render = render + (1 - alpha) * backgrounds[camera]
        images.append(render)
        alphas.append(alpha)
    return torch.stack(images), torch.stack(alphas)


def _blend(
    means2d: Tensor,
    conics: Tensor,
    opacities: Tensor,
    features: Tensor,
    camera: int,
    index: Tensor,
    pixels: Tensor,
    absgrad: bool,
) -> Tensor:
    """Features and opacity [p, F + 1] of the Gaussians `index`, near to far, at `pixels` [p, 2]."""
    # [p, n, 2], a copy of the means for each pixel so that a hook sees the gradient of each
    centres = means2d[camera, index][None].expand(pixels.shape[0], -1, -1)
    if absgrad and centres.requires_grad:
        absolute: Tensor = means2d.absgrad  # pyright: ignore[reportAttributeAccessIssue]

        def accumulate(grad: Tensor) -> None:
            absolute[camera].index_add_(0, index, grad.abs().sum(0))

        centres.register_hook(accumulate)
    delta = centres - pixels[:, None]
    a, b, c = conics[camera, index].unbind(-1)
    dx, dy = delta.unbind(-1)
    sigma = 0.5 * (a * dx * dx + c * dy * dy) + b * dx * dy
    alpha = (opacities[camera, index] * torch.exp(-sigma)).clamp(max=ALPHA_MAX)
    alpha = torch.where((alpha >= ALPHA_MIN) & (sigma >= 0), alpha, torch.zeros_like(alpha))
    behind = torch.cumprod(1 - alpha, dim=1)
    front = torch.cat([torch.ones_like(behind[:, :1]), behind[:, :-1]], dim=1) if index.numel() else behind
    weights = alpha * front * (behind > TRANSMITTANCE_STOP)
    ones = torch.ones_like(features[camera, index][:, :1])
    return weights @ torch.cat([features[camera, index], ones], dim=-1)
