"""Measures the rasteriser on this machine: the step that training repeats, its stages, and the floor below them."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_prior.waiting_threads import available_cores
from nerfstudio_enhancer.rasterize.dispatch import backend_name, rasterization, rasterize_reference
from nerfstudio_enhancer.rasterize.native_library import available_instruction_sets, instruction_set, load_library
from nerfstudio_enhancer.rasterize.native_ops import native
from nerfstudio_enhancer.rasterize.ssim import fused_ssim

SH_DEGREE = 3
EXTRA_CHANNELS = 3
GAUSSIANS = (50_000, 200_000)
SIZES = ((480, 320), (960, 640))
PLOT_GAUSSIANS = (25_000, 50_000, 100_000, 200_000)
PLOT_SIZES = ((240, 160), (480, 320), (720, 480), (960, 640))
SECONDS_PER_CASE = 0.6
REFERENCE_CASE = (2_000, 96, 64)
"""Gaussians, width, height at which PyTorch is measured: it needs seconds where the native stages need milliseconds."""

# Vector operations that one blended pair of pixel and Gaussian cannot do without, in the cheapest form that we know: a
# multiply, an add, a multiply-add, a comparison and a minimum count 1. What else the kernels spend (lists, idle lanes of
# a block, loads, sums over lanes) is what the ratio to the floor shows.
FORM = 5  # e = e0 - ex u - ey v: 2, h = h0 - hy v: 1, exponent = log2(opacity) - e e - h h: 2
EXP2 = 7  # split into integer and fraction 1, polynomial 5, scale 1
ALPHA = 3  # clamp to 0.999, compare with 1/255, compare with the pixel's end
FORWARD_BLEND = 2  # light = alpha T, T - light; besides 1 per channel
BACKWARD_BLEND = 9  # 1 - alpha, its reciprocal 3, T in front, weight, light behind, dL/dalpha 2; besides 2 per channel
BACKWARD_SHAPE = 9  # g = raw dL/dalpha, g e, g h, and sums of g, g e, g h, g e e, g e h, g h h
BACKWARD_ABSOLUTE = 6  # sums of |dL/dx| and |dL/dy|


def floor_operations(channels: int, absgrad: bool) -> tuple[int, int]:
    """Vector operations per blended pair in the forward and in the backward pass."""
    forward = FORM + EXP2 + ALPHA + FORWARD_BLEND + channels
    backward = FORM + EXP2 + ALPHA + BACKWARD_BLEND + 2 * channels + BACKWARD_SHAPE
    return forward, backward + (BACKWARD_ABSOLUTE if absgrad else 0)


@dataclass(frozen=True)
class Case:
    """What is measured: `full` means 7 channels (RGB, 3 extra, expected depth) with absgrad, else RGB without."""

    gaussians: int
    width: int
    height: int
    full: bool
    threads: int
    isa: str

    @property
    def channels(self) -> int:
        """Blended channels."""
        return 3 + EXTRA_CHANNELS + 1 if self.full else 3

    @property
    def name(self) -> str:
        """For the table, e.g. `50k 480x320 7 ch absgrad`."""
        channels = "7 ch absgrad" if self.full else "RGB"
        return f"{self.gaussians // 1000}k {self.width}x{self.height} {channels}"


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


def measure_step(
    num_gaussians: int, width: int, height: int, repeats: int = 12, full: bool = True, sh: bool = True
) -> dict[str, float]:
    """Milliseconds of one forward and backward pass, the fastest of `repeats`, because other programs only ever add time.

    Slow cases are repeated less often, so that each takes about `SECONDS_PER_CASE`.
    `full` is 7 channels (RGB, 3 extra, expected depth) with absgrad, else RGB; `sh` evaluates SH of degree 3, else the
    colours are given. The keys are `step`, and its parts `projection`, `projection_backward` (both with colours),
    `binning`, `raster_forward`, `raster_backward`, `reduction` and `torch_glue`, which is the rest; also the counts
    `intersections` (tile, Gaussian), `blended_pairs` (pixel, Gaussian) and `lanes` spent on the blocks that hold them.
    """
    native()
    scene = _step_scene(num_gaussians, width, height, full, sh)
    best: dict[str, float] = {"step": float("inf")}
    begun = time.perf_counter()
    for count in range(repeats + 1):  # the first touches fresh memory
        if count > 1 and time.perf_counter() - begun > SECONDS_PER_CASE:
            break
        for tensor in scene.values():
            tensor.grad = None
        start = time.perf_counter()
        render, alpha, info = rasterization(**scene, width=width, height=height, **_options(full, sh))  # pyright: ignore[reportArgumentType]
        torch.autograd.backward([render, alpha], [torch.ones_like(render), torch.ones_like(alpha)])
        step = time.perf_counter() - start
        if 1e3 * step < best["step"]:
            # these nodes are the contexts of Rasterize and Project
            frame, projection = render.grad_fn.frame, info["means2d"].grad_fn  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            seconds = {"projection": projection.forward_seconds, "projection_backward": projection.backward_seconds}
            seconds |= frame.seconds()
            seconds["torch_glue"] = step - sum(seconds.values())
            best = {"step": 1e3 * step} | {key: 1e3 * value for key, value in seconds.items()}
            best["intersections"] = float(frame.intersections())
            best["frame_bytes"] = float(frame.bytes())
            best["blended_pairs"], best["lanes"] = map(float, frame.blended_pairs(1))
    return best


def _step_scene(num_gaussians: int, width: int, height: int, full: bool, sh: bool) -> dict[str, Tensor]:
    scene = synthetic_scene(num_gaussians, width, height)
    if not full:
        del scene["extra_features"]
    if not sh:
        scene["colors"] = scene["colors"][:, 0].contiguous()
    for name, tensor in scene.items():
        if name not in ("viewmats", "Ks"):
            tensor.requires_grad_()
    return scene


def _options(full: bool, sh: bool) -> dict[str, Any]:
    return {
        "sh_degree": SH_DEGREE if sh else None,
        "render_mode": "RGB+ED" if full else "RGB",
        "absgrad": full,
    }


def measure_case(case: Case, vector_seconds: float, repeats: int) -> dict[str, Any]:
    """`measure_step` of one case with the floor of its raster stage; leaves the thread count and kernels as they were.

    `spherical_harmonics` is how much longer the projection takes with SH of degree 3 than with given colours.
    """
    with _threads(case.threads), instruction_set(case.isa):
        width = native().nse_vector_width()
        stages = measure_step(case.gaussians, case.width, case.height, repeats, case.full)
    projection = stages["projection"] + stages["projection_backward"]
    stages["spherical_harmonics"] = max(0.0, projection - _projection_without_sh(case))
    operations = sum(floor_operations(case.channels, case.full))
    floor = 1e3 * stages["blended_pairs"] / width * operations * vector_seconds / case.threads
    raster = stages["raster_forward"] + stages["raster_backward"]
    return {
        **asdict(case),
        **stages,
        "raster": raster,
        "raster_floor": floor,
        "raster_over_floor": raster / floor,
        "bytes_per_intersection": stages["frame_bytes"] / stages["intersections"],
    }


def _projection_without_sh(case: Case) -> float:
    with _threads(case.threads), instruction_set(case.isa):
        return _plain_projection(case.gaussians, case.width, case.height, case.threads, case.isa)


@cache
def _plain_projection(gaussians: int, width: int, height: int, threads: int, isa: str) -> float:
    """Milliseconds of the projection with given colours; the key names all that it depends on."""
    plain = measure_step(gaussians, width, height, 1, full=False, sh=False)
    return plain["projection"] + plain["projection_backward"]


def measure_vector_seconds(isa: str) -> float:
    """Seconds of one vector multiply-add on one thread when nothing waits: the vector rate under the floor."""
    with instruction_set(isa):
        return min(native().nse_vector_seconds() for _ in range(3))


def measure_reference(repeats: int) -> dict[str, float]:
    """Milliseconds of the full step at `REFERENCE_CASE`, in plain PyTorch and native, on one thread."""
    gaussians, width, height = REFERENCE_CASE
    scene = _step_scene(gaussians, width, height, full=True, sh=True)
    best = float("inf")
    with _threads(1):
        for _ in range(min(repeats, 2)):
            start = time.perf_counter()
            render, alpha, _ = rasterize_reference(
                **scene,  # pyright: ignore[reportArgumentType]
                width=width,
                height=height,
                **_options(full=True, sh=True),
            )
            torch.autograd.backward([render, alpha], [torch.ones_like(render), torch.ones_like(alpha)])
            best = min(best, time.perf_counter() - start)
        native_ms = measure_step(gaussians, width, height, repeats)["step"]
    return {"torch_reference_ms": 1e3 * best, "native_ms": native_ms, "speedup": 1e3 * best / native_ms}


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


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit_line(pairs: list[float], milliseconds: list[float]) -> dict[str, float]:
    """Least squares of cost = `fixed_ms` + `ns_per_pair` * pairs, and the share of the variance that it explains."""
    x, y = torch.tensor(pairs, dtype=torch.float64), torch.tensor(milliseconds, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    rest = y - y.mean() - slope * (x - x.mean())
    return {
        "ns_per_pair": 1e6 * slope.item(),
        "fixed_ms": (y.mean() - slope * x.mean()).item(),
        "r_squared": 1 - (rest @ rest / ((y - y.mean()) ** 2).sum()).item(),
    }


def bench_rasterizer(output: Path, repeats: int = 5, report: Callable[[str], None] = lambda line: None) -> dict:
    """Measure every case, write the figures as JSON to `output` and a plot beside it (`.png`), and return the figures.

    The headlines are for the best instruction set on two threads (one, where there is one core):
    `step_ms_50k_480x320_7ch_absgrad`, forward and backward pass of 50,000 Gaussians at 480 x 320 with 7 channels and
    absgrad, and `raster_over_floor_960x640`, the raster stage of 50,000 Gaussians at 960 x 640 over its floor.

    Args:
        output: JSON file.
        repeats: passes per case, of which the fastest counts.
        report: is given each line of the table (Markdown) as soon as it is measured.

    Raises:
        ValueError: `repeats` is below 1.
        RuntimeError: the native library was not built.
    """
    output.parent.mkdir(parents=True, exist_ok=True)  # first: what cannot be kept need not be measured
    if repeats < 1:
        raise ValueError(f"`repeats` must be at least 1, got {repeats}.")
    if load_library() is None:
        raise RuntimeError("The native rasteriser was not built: install a C++17 compiler, then the package again.")
    isas = available_instruction_sets()
    vector = {isa: measure_vector_seconds(isa) for isa in isas}
    cores = available_cores()
    threads = sorted({1, min(2, cores)})
    cases = [
        Case(gaussians, width, height, full, count, isa)
        for isa in isas
        for gaussians in GAUSSIANS
        for width, height in SIZES
        for full in (True, False)
        for count in threads
    ]
    report(table_row(None))
    report("|---" * (len(TABLE_COLUMNS) + 4) + "|")
    measured = []
    for case in cases:
        measured.append(measure_case(case, vector[case.isa], repeats))
        report(table_row(measured[-1]))
    headline = {
        (row["width"], row["height"]): row
        for row in measured
        if row["isa"] == isas[0] and row["threads"] == threads[-1] and row["full"] and row["gaussians"] == 50_000
    }
    sweep = [
        measure_case(Case(gaussians, width, height, True, 1, isas[0]), vector[isas[0]], min(repeats, 2))
        for gaussians in PLOT_GAUSSIANS
        for width, height in PLOT_SIZES
    ]
    fit = fit_line([row["blended_pairs"] for row in sweep], [row["raster"] for row in sweep])
    result: dict[str, Any] = {
        "step_ms_50k_480x320_7ch_absgrad": headline[480, 320]["step"],
        "raster_over_floor_960x640": headline[960, 640]["raster_over_floor"],
        "backend": backend_name(),
        "threads": threads[-1],
        "cores": cores,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "repeats": repeats,
        "vector_multiply_add_ns": {isa: 1e9 * seconds for isa, seconds in vector.items()},
        "cases": measured,
        "reference": {"case": REFERENCE_CASE, **measure_reference(repeats)},
        "ssim_ms_480x320": measure_ssim(480, 320),
        "cost_against_pairs": {"fit": fit, "points": sweep},
    }
    output.write_text(json.dumps(result, indent=2) + "\n")
    plot_cost(result, output.with_suffix(".png"))
    for line in summary(result):
        report(line)
    return result


TABLE_COLUMNS: dict[str, str] = {
    "projection": "projection",
    "spherical_harmonics": "(of it SH)",
    "binning": "binning",
    "raster_forward": "raster fwd",
    "raster_backward": "raster bwd",
    "reduction": "reduction",
    "torch_glue": "torch glue",
    "step": "step",
    "raster_floor": "raster floor",
}


def table_row(row: dict[str, Any] | None) -> str:
    """One Markdown line of the table in milliseconds; None gives the heading."""
    if row is None:
        return "| " + " | ".join(["kernels", "threads", "case", *TABLE_COLUMNS.values(), "raster / floor"]) + " |"
    both = {**row, "projection": row["projection"] + row["projection_backward"]}
    case = Case(*(row[field] for field in ("gaussians", "width", "height", "full", "threads", "isa")))
    cells = [case.isa, str(case.threads), case.name, *(f"{both[key]:.1f}" for key in TABLE_COLUMNS)]
    return "| " + " | ".join([*cells, f"{row['raster_over_floor']:.2f}"]) + " |"


def summary(result: dict[str, Any]) -> list[str]:
    """What follows the table."""
    reference, fit = result["reference"], result["cost_against_pairs"]["fit"]
    gaussians, width, height = reference["case"]
    return [
        "",
        f"step, 50k Gaussians at 480x320, 7 channels, absgrad, {result['threads']} threads: "
        f"{result['step_ms_50k_480x320_7ch_absgrad']:.1f} ms",
        f"raster stage over its floor at 960x640: {result['raster_over_floor_960x640']:.2f}",
        f"raster stage against blended pairs: {fit['ns_per_pair']:.2f} ns per pair + {fit['fixed_ms']:.1f} ms, "
        f"R^2 = {fit['r_squared']:.4f}",
        f"PyTorch reference at {gaussians} Gaussians, {width}x{height}: {reference['torch_reference_ms']:.0f} ms, "
        f"native {reference['native_ms']:.2f} ms: {reference['speedup']:.0f} times faster",
        f"D-SSIM at 480x320: {result['ssim_ms_480x320']:.1f} ms",
    ]


def plot_cost(result: dict[str, Any], path: Path) -> None:
    """Raster stage against blended pairs with the fitted line and the floor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points, fit = result["cost_against_pairs"]["points"], result["cost_against_pairs"]["fit"]
    figure = Figure(figsize=(6, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for gaussians in PLOT_GAUSSIANS:
        rows = [row for row in points if row["gaussians"] == gaussians]
        x, y = [row["blended_pairs"] / 1e6 for row in rows], [row["raster"] for row in rows]
        axes.plot(x, y, "o", label=f"{gaussians // 1000}k Gaussians")
    most = max(points, key=lambda row: row["blended_pairs"])
    end = most["blended_pairs"] / 1e6
    axes.plot([0, end], [fit["fixed_ms"], fit["fixed_ms"] + fit["ns_per_pair"] * end], "k-", label="fit")
    axes.plot([0, end], [0, most["raster_floor"]], "k:", label="floor")
    axes.set_xlabel("blended pairs (pixel, Gaussian), millions")
    axes.set_ylabel("raster forward + backward, ms")
    axes.set_title(f"{points[0]['isa']}, 1 thread, 7 channels, absgrad: R² = {fit['r_squared']:.4f}")
    axes.legend()
    figure.savefig(path)
