"""Measures the rasteriser on this machine: the step that training repeats, and its stages."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nerfstudio_enhancer.rasterize import native_ops
from nerfstudio_enhancer.rasterize.dispatch import backend_name, rasterization
from nerfstudio_enhancer.rasterize.ssim import fused_ssim

SH_DEGREE = 3
EXTRA_CHANNELS = 3


def synthetic_scene(num_gaussians: int, width: int, height: int, seed: int = 0) -> dict[str, Tensor]:
    """Anisotropic Gaussians that fill the view of one camera: the arguments of `rasterization` that are tensors."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    depth = 1 + 4 * uniform(num_gaussians)
    # 1.2 times the view frustum: about a third of the Gaussians lies outside
    x, y = (1.2 * depth * (uniform(num_gaussians) - 0.5) for _ in range(2))
    return {
        "means": torch.stack([x, y * height / width, depth], dim=-1),
        "quats": normal(num_gaussians, 4),
        "scales": torch.exp(0.5 * normal(num_gaussians, 3) - 4.3),
        "opacities": torch.sigmoid(normal(num_gaussians)),
        "colors": 0.3 * normal(num_gaussians, (SH_DEGREE + 1) ** 2, 3),
        "extra_features": uniform(num_gaussians, EXTRA_CHANNELS),
        "viewmats": torch.eye(4)[None],
        "Ks": torch.tensor([[[width, 0.0, width / 2], [0.0, width, height / 2], [0.0, 0.0, 1.0]]]),
    }


def measure_step(num_gaussians: int, width: int, height: int, repeats: int = 12) -> dict[str, float]:
    """Milliseconds of forward and backward pass with 7 channels (RGB of SH degree 3, 3 extra, expected depth) and absgrad.

    Each figure is the least of `repeats`, because other programs only ever add time. The keys are `step`, `forward`,
    `backward`, and with the native backend `projection`, `projection_backward`, `binning`, `raster_forward`,
    `raster_backward`, `reduction`; also `intersections`, which is a count.
    """
    scene = synthetic_scene(num_gaussians, width, height)
    for name in ("means", "quats", "scales", "opacities", "colors", "extra_features"):
        scene[name].requires_grad_()
    best: dict[str, float] = {}

    def keep(name: str, seconds: float) -> None:
        best[name] = min(best.get(name, float("inf")), 1e3 * seconds)

    with _StageClock(keep):
        for _ in range(repeats):
            for tensor in scene.values():
                tensor.grad = None
            start = time.perf_counter()
            render, alpha, info = rasterization(
                **scene,  # pyright: ignore[reportArgumentType]
                width=width,
                height=height,
                sh_degree=SH_DEGREE,
                packed=False,
                render_mode="RGB+ED",
                absgrad=True,
            )
            middle = time.perf_counter()
            torch.autograd.backward([render, alpha], [torch.ones_like(render), torch.ones_like(alpha)])
            end = time.perf_counter()
            keep("forward", middle - start)
            keep("backward", end - middle)
            keep("step", end - start)
            if "flatten_ids" in info:
                best["intersections"] = float(info["flatten_ids"].numel())
    return best


class _StageClock:
    """While it is entered, reports the time of each native stage to `keep`."""

    def __init__(self, keep: Callable[[str, float], None]) -> None:
        self._keep = keep
        self._originals: dict[tuple[type, str], Any] = {}

    def __enter__(self) -> _StageClock:
        self._wrap(native_ops.Project, "forward", "projection")
        self._wrap(native_ops.Project, "backward", "projection_backward")
        self._wrap(native_ops.Rasterize, "forward", None)
        self._wrap(native_ops.Rasterize, "backward", None)
        return self

    def __exit__(self, *_: object) -> None:
        for (owner, name), original in self._originals.items():
            setattr(owner, name, staticmethod(original))

    def _wrap(self, owner: type, name: str, stage: str | None) -> None:
        original = getattr(owner, name)
        self._originals[owner, name] = original

        def timed(ctx: Any, *args: Any) -> Any:
            start = time.perf_counter()
            result = original(ctx, *args)
            if stage is not None:
                self._keep(stage, time.perf_counter() - start)
            else:
                for key, seconds in ctx.frame.seconds().items():
                    if (key in _BACKWARD_STAGES) == (name == "backward"):
                        self._keep(key, seconds)
            return result

        setattr(owner, name, staticmethod(timed))


_BACKWARD_STAGES = ("raster_backward", "reduction")


def measure_ssim(width: int, height: int, repeats: int = 12) -> float:
    """Milliseconds of value and gradient of `fused_ssim` for one RGB image; the least of `repeats`."""
    generator = torch.Generator().manual_seed(0)
    pred = torch.rand(1, 3, height, width, generator=generator).requires_grad_()
    target = torch.rand(1, 3, height, width, generator=generator)
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        fused_ssim(pred, target).backward()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def bench_rasterizer(output: Path) -> dict[str, Any]:
    """Measure, write the figures as JSON to `output`, and return them.

    The headline is `step_ms_50k_480x320_7ch_absgrad`: forward and backward pass of 50,000 Gaussians at 480 x 320 with
    7 channels and absgrad, in milliseconds, on `torch.get_num_threads()` threads.
    """
    step = measure_step(50_000, 480, 320)
    result: dict[str, Any] = {
        "backend": backend_name(),
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "step_ms_50k_480x320_7ch_absgrad": step["step"],
        "stages_ms_50k_480x320_7ch_absgrad": step,
        "stages_ms_50k_960x640_7ch_absgrad": measure_step(50_000, 960, 640),
        "ssim_ms_320x240": measure_ssim(320, 240),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(result, indent=2) + "\n")
    return result
