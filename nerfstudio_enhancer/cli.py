"""`ns-enhancer`: one console script for all commands of this package. Heavy imports happen inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from nerfstudio_enhancer.depth_training.train_depth import TrainDepth
from nerfstudio_enhancer.evaluation.benchmark import Benchmark
from nerfstudio_enhancer.evaluation.leave_one_out import LeaveOneOut
from nerfstudio_enhancer.pairs.make_pairs import MakePairs


@dataclass(frozen=True)
class BenchRasterizer:
    """Measure the rasteriser of this machine.

    Times forward and backward passes over synthetic Gaussians stage by stage, with every instruction set, on one and two
    threads, and the floor below which the raster stage cannot fall. Prints a table. Takes about a minute.
    """

    output: Path
    """JSON file for the figures. A plot of cost against blended pairs is written beside it, ending in `.png`."""
    repeats: int = 5
    """Passes per case, of which the fastest counts. Fewer are quicker and noisier."""


@dataclass(frozen=True)
class InspectPrior:
    """Show what a prior's folder holds: layout, parts, parameters, precision, settings, and what is missing.

    The command ends with status 1 where a part is missing or broken.
    """

    path: Annotated[str, tyro.conf.Positional] = "bundled"
    """A prior: `bundled`, a folder, a UNet's folder (`checkpoint-N`, `checkpoint-N@BASE`), or a hub name."""


@dataclass(frozen=True)
class PlanPrior:
    """Compute what the full-size prior takes on GPUs: operations, memory, seconds, training hours and dollars.

    Nothing is timed: operations and bytes are counted on the networks without their weights, which takes a minute.
    """

    layout: Literal["A", "B"] = "B"
    """B: Stable Video Diffusion's UNet (the paper). A: the authors' pose-conditioned one."""
    frames: int = 25
    """Frames of a clip, both references included."""
    height: int = 512
    """Of the frames, in pixels."""
    width: int = 512
    """Of the frames, in pixels."""
    steps: int = 25
    """Sampling steps."""
    efficiency: float = 0.3
    """Share of a card's peak that is assumed to be reached."""
    gpus: int = 2
    """GPUs that train together, each with one clip a step."""


@dataclass(frozen=True)
class TimePrior:
    """Measure what one clip takes on this machine: seconds a frame and peak memory.

    Without a name the networks are the full-size ones with random weights, which take as long as trained ones.
    """

    path: Annotated[str | None, tyro.conf.Positional] = None
    """A prior, named as for `inspect-prior`."""
    layout: Literal["A", "B"] = "B"
    """Of the full-size networks. B: Stable Video Diffusion's UNet (the paper). A: the authors' pose-conditioned one."""
    frames: int = 25
    """Frames of the clip, both references included."""
    height: int = 512
    """Of the frames, in pixels."""
    width: int = 512
    """Of the frames, in pixels."""
    steps: int | None = None
    """Sampling steps; the prior's own by default (25 at full size)."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Arithmetic of the networks; auto takes the fastest that the device is good at."""
    memory: Literal["all", "8gb", "12gb", "16gb", "24gb", "80gb"] = "all"
    """Memory preset."""
    repeats: int = 3
    """Measured times, after one that is not measured."""


@dataclass(frozen=True)
class ConvertPairs:
    """Convert paired data between this package's format and that of 3DGS-Enhancer's authors.

    The authors' scenes (COLMAP folders with `lr/<k>/train_<k>`) hold no opacity, depth and warped references: their renders count as
    opaque, at unknown depth and seen by no reference. The full-size prior takes none of these; the bundled one learns less from them.
    """

    input: Path
    """Folder to read: ours (`<scene>/k<views>_s<seed>_n<steps>`), or one with the authors' scenes in it."""
    output: Path
    """Folder to write to. Nothing in it is overwritten."""
    to: Literal["authors", "ours"]
    """Which format to write."""


COMMANDS = {
    "benchmark": Benchmark,
    "leave-one-out": LeaveOneOut,
    "make-pairs": MakePairs,
    "convert-pairs": ConvertPairs,
    "train-depth": TrainDepth,
    "bench-rasterizer": BenchRasterizer,
    "inspect-prior": InspectPrior,
    "plan-prior": PlanPrior,
    "time-prior": TimePrior,
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `ns-enhancer`. Errors that a user can mend are printed without traceback, with status 1."""
    command = tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="ns-enhancer",
        description="Commands beside nerfstudio's own: benchmarks, training of prior and depth network, and checks.",
        args=arguments,
        sort_subcommands=False,
    )
    try:
        _run(command)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"ns-enhancer: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("ns-enhancer: interrupted; what is done is kept, and repeating the command goes on.", file=sys.stderr)
        sys.exit(130)


def _run(command: object) -> None:
    runners: dict[type, Callable] = {
        Benchmark: _benchmark,
        LeaveOneOut: _leave_one_out,
        MakePairs: _make_pairs,
        ConvertPairs: _convert_pairs,
        TrainDepth: _train_depth,
        BenchRasterizer: _bench_rasterizer,
        InspectPrior: _inspect_prior,
        PlanPrior: _plan_prior,
        TimePrior: _time_prior,
    }
    runners[type(command)](command)


def _benchmark(command: Benchmark) -> None:
    from nerfstudio_enhancer.evaluation.benchmark import run_benchmark

    run_benchmark(command)


def _leave_one_out(command: LeaveOneOut) -> None:
    from nerfstudio_enhancer.evaluation.leave_one_out import leave_one_out

    leave_one_out(command)


def _make_pairs(command: MakePairs) -> None:
    from nerfstudio_enhancer.pairs.make_pairs import make_pairs

    make_pairs(command)


def _convert_pairs(command: ConvertPairs) -> None:
    from nerfstudio_enhancer.pairs.authors_layout import convert_pairs

    written = convert_pairs(command.input, command.output, command.to)
    print(f"{len(written)} {'scenes' if command.to == 'authors' else 'runs'} written to {command.output}.")


def _train_depth(command: TrainDepth) -> None:
    from nerfstudio_enhancer.depth_training.train_depth import train_depth

    print(f"The weights are in {train_depth(command)}.")


def _bench_rasterizer(command: BenchRasterizer) -> None:
    from nerfstudio_enhancer.rasterize.bench import bench_rasterizer

    bench_rasterizer(command.output, command.repeats, report=print)


def _inspect_prior(command: InspectPrior) -> None:
    from nerfstudio_enhancer.evaluation.inspection import inspect_prior

    report = inspect_prior(command.path)
    print(report.text)
    if report.faults:
        sys.exit(1)


def _plan_prior(command: PlanPrior) -> None:
    from diffusion_prior.plan import Plan, describe

    print(describe(Plan(**vars(command))))


def _time_prior(command: TimePrior) -> None:
    import torch

    from diffusion_prior.checkpoints import load_prior
    from diffusion_prior.full_size import full_size_prior
    from diffusion_prior.memory import PRESETS
    from diffusion_prior.prior import fast_dtype
    from diffusion_prior.runner import DTYPES
    from diffusion_prior.sampling_config import SamplingConfig
    from diffusion_prior.timing import time_clip

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fast_dtype(device) if command.precision == "auto" else DTYPES[command.precision]
    preset = PRESETS[command.memory]
    if command.path is None:
        prior = full_size_prior(command.layout, dtype, "cpu" if preset.offload else device).eval()
    else:
        prior = load_prior(command.path, "cpu", dtype)
    prior.sampling = SamplingConfig(steps=command.steps)
    prior.use_memory_preset(preset)
    prior.to(device)
    timing = time_clip(prior, command.frames, command.height, command.width, command.repeats)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"Measured on {name}, {command.width} x {command.height}, {dtype}, memory preset {command.memory}.\n{timing}")
