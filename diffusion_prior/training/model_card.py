"""MODEL_CARD.md of a trained prior: data, steps, losses, figures, licence, taken from the trainings' own logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_prior.checkpoints import read_prior
from diffusion_prior.data.pairs import find_runs, read_header
from diffusion_prior.training.records import LOG_NAME

CARD_NAME = "MODEL_CARD.md"
STAGE_TITLES = {
    "vae": "VAE",
    "ldm": "latent diffusion model (UNet and image encoder)",
    "std": "spatial-temporal decoder",
    "coarse": "coarse repair",
}
NOT_LOSSES = {"step", "seconds", "learning_rate", "gradient_norm"}


@dataclass(frozen=True)
class Stage:
    """One finished training."""

    name: str
    """`vae`, `ldm`, `std` or `coarse`."""
    folder: Path
    """Its output folder."""


def write_model_card(path: Path, prior_folder: Path, stages: Sequence[Stage], pairs: Path) -> None:
    """Write the card of a prior.

    Args:
        path: where.
        prior_folder: the prior that it describes.
        stages: the trainings that made it, in their order.
        pairs: root folder of the paired data that all of them used.
    """
    sections = [_head(), _networks(prior_folder), _data(pairs), *(_stage(stage) for stage in stages), _licence()]
    path.write_text("\n".join(sections), encoding="utf-8")


def _head() -> str:
    return (
        "# Compact video prior\n\n"
        "Repairs clips of rendered Gaussian splats between two reference photographs, after 3DGS-Enhancer (arXiv 2410.16266). Same\n"
        "architecture and folder format as the SVD-size prior, trained from random weights on a CPU. Intended for pictures of about 320 to\n"
        "480 pixels. It knows few scenes: it sharpens and completes what the renders and the references show, it does not invent rooms.\n"
    )


def _networks(prior_folder: Path) -> str:
    prior = read_prior(prior_folder)
    rows = [
        f"| {name} | {sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M |"
        for name, module in prior.modules.items()
    ]
    megabytes = sum(file.stat().st_size for file in prior_folder.rglob("*.safetensors")) / 1e6
    steps = prior.config.num_inference_steps
    return (
        "\n## Networks\n\n| part | parameters |\n|---|---|\n"
        + "\n".join(rows)
        + f"\n\nfloat16, {megabytes:.1f} MB together; {steps} sampling step{'s' if steps > 1 else ''}.\n"
    )


def _data(pairs: Path) -> str:
    scenes: dict[str, list[int]] = {}
    for folder in find_runs(pairs):
        header = read_header(folder)
        scenes.setdefault(header.scene, []).append(header.num_frames)
    rows = [f"| {scene} | {len(frames)} | {sum(frames)} |" for scene, frames in sorted(scenes.items())]
    total = sum(sum(frames) for frames in scenes.values())
    return (
        f"\n## Data\n\n{total} pairs of render and photograph from {sum(map(len, scenes.values()))} runs of sparse splats over "
        f"{len(scenes)} scenes:\n\n| scene | runs | pairs |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _stage(stage: Stage) -> str:
    lines = [json.loads(line) for line in (stage.folder / LOG_NAME).read_text(encoding="utf-8").splitlines()]
    losses = [line for line in lines if any(name == "loss" or name.endswith("/loss") for name in line)]
    figures = [line for line in lines if line not in losses]
    text = f"\n## Training: {STAGE_TITLES.get(stage.name, stage.name)}\n\n"
    if losses:
        last = losses[-1]
        text += f"{last['step']} steps, {last['seconds'] / 60:.1f} minutes. Losses, mean of the first and of the last tenth of the log:\n\n"
        text += _loss_table(losses)
    if figures:
        text += "\nValidation on scenes that did not train:\n\n" + _figure_table(figures)
    return text


def _loss_table(lines: list[dict[str, Any]]) -> str:
    tenth = max(1, len(lines) // 10)
    every = dict.fromkeys(name for line in lines for name in line)  # some losses belong to some of the steps
    names = [name for name in every if name.split("/")[-1] not in NOT_LOSSES]
    rows = [f"| {name} | {_mean(lines[:tenth], name)} | {_mean(lines[-tenth:], name)} |" for name in names]
    return "| loss | first | last |\n|---|---|---|\n" + "\n".join(rows) + "\n"


def _figure_table(lines: list[dict[str, Any]]) -> str:
    by_step = {line["step"]: line for line in lines}  # a resumed training validates a step again
    names = [name for name in lines[-1] if name not in NOT_LOSSES]
    rows = [
        f"| {step} | " + " | ".join(f"{line[name]:.4g}" if name in line else "" for name in names) + " |"
        for step, line in sorted(by_step.items())
    ]
    return f"| step | {' | '.join(names)} |\n" + "|---" * (len(names) + 1) + "|\n" + "\n".join(rows) + "\n"


def _mean(lines: list[dict[str, Any]], name: str) -> str:
    values = [line[name] for line in lines if name in line]
    return f"{sum(values) / len(values):.4g}" if values else ""


def _licence() -> str:
    return (
        "\n## Licence\n\n"
        "The weights are for research use. The code that made them is Apache-2.0, but most of the training photographs come from public\n"
        "repositories that state no licence for them, and some from data sets for non-commercial use. Whoever needs weights with a\n"
        "clear title trains on photographs of their own with the same commands:\n\n"
        "    ns-enhancer make-pairs --help\n"
        "    python -m diffusion_prior.training.train_all --help\n"
    )
