"""What gsplat's strategies call and gsplat offers on CUDA only, for CPU tensors: so that its MCMCStrategy runs here too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from nerfstudio_enhancer.rasterize.reference import quaternions_to_rotations


def compute_relocation(opacities: Tensor, scales: Tensor, ratios: Tensor, binoms: Tensor) -> tuple[Tensor, Tensor]:
    """Opacities and scales of `ratios` equal Gaussians that together look like one (Kheradmand et al. 2024, eq. 9).

    The double sum over binomials of the equation is one sum, because the column of Pascal's triangle under (n, k) adds up
    to (n + 1, k + 1). It alternates in sign, hence float64.

    Args:
        opacities: of the Gaussians that are multiplied, in (0, 1). [N]
        scales: their standard deviations. [N, 3]
        ratios: how many each becomes, limited to 1 ... n_max - 1 as in gsplat's table; changed in place as gsplat does. [N]
        binoms: binomial coefficients n over k. [n_max, n_max]

    Returns:
        New opacities [N] and scales [N, 3].
    """
    n_max = binoms.shape[0]
    ratios.clamp_(min=1, max=n_max)
    count = ratios.double()
    new = 1 - (1 - opacities.double()) ** (1 / count)
    k = torch.arange(n_max, dtype=torch.float64)
    # (n, k + 1) = (n - 1, k) n / (k + 1), which the table holds up to n = n_max
    rows = binoms.double()[ratios.long() - 1] * count[:, None] / (k + 1)
    signs = torch.where(k % 2 == 0, 1.0, -1.0).double()
    denominator = (rows * signs / torch.sqrt(k + 1) * new[:, None] ** (k + 1)).sum(-1)
    return new.to(opacities.dtype), (scales * (opacities.double() / denominator)[:, None]).to(scales.dtype)


def quat_scale_to_covar_preci(
    quats: Tensor, scales: Tensor, compute_covar: bool = True, compute_preci: bool = True, triu: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Covariances and precisions [N, 3, 3] of quaternions wxyz [N, 4] and standard deviations [N, 3].

    With `triu` the upper triangles row by row, [N, 6].
    """
    rotations = quaternions_to_rotations(quats)

    def squared(factors: Tensor) -> Tensor:
        m = rotations * factors[..., None, :]
        full = m @ m.transpose(-1, -2)
        return full.flatten(-2)[..., [0, 1, 2, 4, 5, 8]] if triu else full

    return (squared(scales) if compute_covar else None), (squared(1 / scales) if compute_preci else None)


def let_strategies_run() -> None:
    """Give gsplat's strategies, if they are loaded, the functions above for CPU tensors; CUDA tensors still go to gsplat."""
    operations = sys.modules.get("gsplat.strategy.ops")
    if operations is None or hasattr(operations.compute_relocation, "on_cuda"):
        return
    for on_cpu in (compute_relocation, quat_scale_to_covar_preci):
        setattr(operations, on_cpu.__name__, _by_device(on_cpu, getattr(operations, on_cpu.__name__)))


def _by_device(on_cpu: Callable, on_cuda: Callable) -> Callable:
    @wraps(on_cuda)
    def dispatch(*args: Any, **kwargs: Any) -> tuple:
        first = args[0] if args else next(iter(kwargs.values()))
        return (on_cpu if first.device.type == "cpu" else on_cuda)(*args, **kwargs)

    dispatch.on_cuda = on_cuda  # pyright: ignore[reportAttributeAccessIssue]
    return dispatch
