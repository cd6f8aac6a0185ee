"""What the prior at the paper's size costs on GPUs that are not at hand: computed from its networks on the meta device.

Everything here is arithmetic: operations and bytes are counted exactly, seconds follow from a card's published peak and an
efficiency that has to be assumed. Nothing is timed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from diffusion_prior.accounting import Cost, cost_of, weight_bytes
from diffusion_prior.full_size import full_size_prior
from diffusion_prior.memory import (
    GIB,
    PRESETS,
    decoding_cost,
    denoising_cost,
    embedding_cost,
    encoding_cost,
    estimate_presets,
    unet_stand_ins,
)
from diffusion_prior.prior import VideoPrior
from diffusion_prior.training.config import ScaleConfig
from diffusion_prior.training.trainable import choose_trainable

TERA = 1e12


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet."""

    peak_tflops: float
    """Dense bfloat16 or float16 matrix products with float32 sums, in 10^12 operations per second."""
    dollars_per_hour: float
    """Rent, as assumed."""


CARDS = {
    "RTX 4090": Card(165.0, 0.5),
    "A100 80 GB": Card(312.0, 1.8),
    "H100 SXM": Card(989.0, 3.0),
}


@dataclass
class Plan:
    """Which clip and which training are planned."""

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
    guidance: bool = True
    """Whether every step runs the unconditional pass too."""
    efficiency: float = 0.3
    """Share of a card's peak that is reached. The paper's own training reached `paper_efficiency` of an A100's."""
    training_steps: int = 80_000
    """Of the latent diffusion model."""
    gpus: int = 2
    """GPUs that train together, each with one clip a step."""

    def __post_init__(self) -> None:
        if not 0 < self.efficiency <= 1:
            raise ValueError(f"`efficiency` must be in (0, 1], got {self.efficiency}.")
        if min(self.frames, self.height, self.width, self.steps, self.training_steps, self.gpus) < 1:
            raise ValueError("frames, height, width, steps, training steps and GPUs must all be at least 1.")


@dataclass(frozen=True)
class ClipCost:
    """Floating-point operations of enhancing one clip, by part."""

    encode: int
    embed: int
    denoise_pass: int
    passes: int
    decode: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.encode + self.embed + self.passes * self.denoise_pass + self.decode


def clip_cost(prior: VideoPrior, plan: Plan) -> ClipCost:
    """Count one clip, sampled in one window without tiles."""
    rows, columns = plan.height // prior.latent_factor, plan.width // prior.latent_factor
    return ClipCost(
        encode=plan.frames * encoding_cost(prior, rows, columns).flops,
        embed=embedding_cost(prior, plan.frames).flops,
        denoise_pass=denoising_cost(prior, plan.frames, rows, columns).flops,
        passes=plan.steps * (2 if plan.guidance else 1),
        decode=decoding_cost(prior, plan.frames, rows, columns).flops,
    )


def training_cost(plan: Plan, trainable: Literal["unet", "temporal"], checkpointing: bool) -> tuple[Cost, int, int]:
    """One forward and backward pass of the UNet for one clip.

    Returns:
        The cost; how many parameters train; bytes of float32 weights, gradients, AdamW's two states and the average.
    """
    prior = full_size_prior(plan.layout, torch.bfloat16)
    choose_trainable(prior, ScaleConfig(trainable=trainable, gradient_checkpointing=checkpointing))
    rows, columns = plan.height // prior.latent_factor, plan.width // prior.latent_factor
    arguments = unet_stand_ins(prior, plan.frames, rows, columns)
    cost = cost_of(lambda: prior.unet.train()(*arguments).square().mean().backward())
    trained = sum(parameter.numel() for parameter in prior.unet.parameters() if parameter.requires_grad)
    own = sum(parameter.numel() for parameter in prior.unet.parameters())
    return cost, trained, 4 * own + 16 * trained


def seconds(flops: float, card: Card, efficiency: float) -> float:
    """Time of so many operations."""
    return flops / (card.peak_tflops * TERA * efficiency)


def describe(plan: Plan) -> str:
    """The whole plan in words and tables."""
    prior = full_size_prior(plan.layout)
    clip = clip_cost(prior, plan)
    size = f"{plan.frames} frames of {plan.width} x {plan.height}"
    lines = [
        f"Computed, not measured. {size}, layout {plan.layout}, efficiency {plan.efficiency:.0%} of the card's peak.",
        "",
        "part            parameters   GiB    TFLOP per clip",
    ]
    flops = {
        "vae": clip.encode,
        "image_encoder": clip.embed,
        "unet": clip.passes * clip.denoise_pass,
        "std": clip.decode,
    }
    for name, module in prior.modules.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        lines.append(f"{name:<15}{count:>11,}{weight_bytes([module]) / GIB:>6.2f}{flops[name] / TERA:>12,.0f}")
    lines += [
        f"UNet: {clip.passes} passes of {clip.denoise_pass / TERA:.1f} TFLOP; together {clip.total / TERA:,.0f} TFLOP",
        "",
        "memory preset   GiB at its peak (encode, embed, denoise, decode)",
    ]
    estimates = estimate_presets(prior, plan.frames, plan.height, plan.width, PRESETS.values())
    lines += [f"{name:<15} {estimate}" for name, estimate in zip(PRESETS, estimates)]
    lines += ["", "card            seconds per clip   seconds per frame"]
    for name, card in CARDS.items():
        time = seconds(clip.total, card, plan.efficiency)
        lines.append(f"{name:<15}{time:>17.1f}{time / plan.frames:>20.2f}")
    return "\n".join([*lines, "", *_training_lines(plan, clip)])


def _training_lines(plan: Plan, clip: ClipCost) -> list[str]:
    lines = [
        f"training of the UNet, {plan.training_steps:,} steps of one clip on each of {plan.gpus} GPUs, bfloat16",
        "trains     checkpointing   parameters     TFLOP per clip   GiB of states   GiB of activations",
    ]
    per_step = 0.0
    for trainable in ("temporal", "unet"):
        for checkpointing in (False, True):
            cost, trained, states = training_cost(plan, trainable, checkpointing)
            flops = cost.flops + 2 * clip.encode + clip.embed  # condition and photographs are encoded
            lines.append(
                f"{trainable:<11}{'yes' if checkpointing else 'no':<14}{trained:>12,}{flops / TERA:>19,.0f}"
                f"{states / GIB:>16.1f}{cost.peak_bytes / GIB:>21.1f}"
            )
            if trainable == "temporal" and checkpointing:
                per_step = flops
    lines += ["", f"temporal with checkpointing, {plan.gpus} GPUs:", "card            hours   GPU hours   dollars"]
    for name, card in CARDS.items():
        hours = plan.training_steps * seconds(per_step, card, plan.efficiency) / 3600
        dollars = hours * plan.gpus * card.dollars_per_hour
        lines.append(
            f"{name:<15}{hours:>6.0f}{hours * plan.gpus:>12.0f}{dollars:>10,.0f}  at {card.dollars_per_hour} $/h"
        )
    lines.append(
        f"The paper's 80,000 steps took 3 days on 2 A100: {paper_efficiency(per_step):.0%} of their peak, if each step was one "
        "clip of this size per GPU."
    )
    return lines


def paper_efficiency(flops_per_step: float) -> float:
    """Share of an A100's peak at which 80,000 steps of one clip per GPU take the paper's three days."""
    return 80_000 * flops_per_step / (3 * 24 * 3600) / (CARDS["A100 80 GB"].peak_tflops * TERA)
