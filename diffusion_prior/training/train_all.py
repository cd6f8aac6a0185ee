"""Train a whole compact prior: VAE, latent diffusion model, spatial-temporal decoder, coarse repair; write it with its model card.

Stages that are finished are not done again, the one that was broken off goes on. `torchrun --nproc-per-node 2 -m ...` uses one process
per core, which is faster on a CPU than two threads in one process; `accelerate launch` is for GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from diffusion_prior.checkpoints import read_prior, save_prior
from diffusion_prior.training import train_coarse, train_ldm, train_std, train_vae
from diffusion_prior.training.config import TrainingConfig
from diffusion_prior.training.loop import PRIOR_NAME
from diffusion_prior.training.model_card import CARD_NAME, Stage, write_model_card
from diffusion_prior.training.setup import is_main_process, log_to_console, wait_for_everyone


@dataclass
class PlanConfig:
    """Training of a whole prior on a budget."""

    pairs: Path
    """Root folder of paired data, as `ns-enhancer make-pairs` writes it."""
    output: Path
    """Folder for the four stages, the finished prior (`prior/`) and its MODEL_CARD.md; what is found there goes on."""
    vae_minutes: float = 8.0
    """Training time of the VAE."""
    ldm_minutes: float = 15.0
    """Training time of UNet and image encoder."""
    std_minutes: float = 30.0
    """Training time of the spatial-temporal decoder."""
    coarse_minutes: float = 30.0
    """Training time of the coarse repair."""
    coarse_folds: int = 4
    """Networks of the coarse repair, see `train_coarse`; at most as many as there are scenes that train."""
    sampling_steps: int = 1
    """Sampling steps that the prior is made for. One is direct regression, all that minutes of training are enough for."""
    regression_share: float = 1.0
    """Share of the latent diffusion model's training at the highest noise level; below 1 for more than one sampling step."""
    seed: int = 0
    """Of everything random."""
    validate_every: int = 500
    """Steps between two validations of a stage."""
    validation_scenes: tuple[str, ...] = ()
    """Scenes that validate and never train; if empty, one in twelve."""


def run(config: PlanConfig) -> None:
    """Do what is left of the four stages, then export."""
    folders = {name: config.output / name for name in ("vae", "ldm", "std", "coarse")}
    vae = train_vae.VaeConfig(**_shared(config, folders["vae"], config.vae_minutes), prior=None)
    ldm = train_ldm.LdmConfig(
        **_shared(config, folders["ldm"], config.ldm_minutes),
        prior=folders["vae"] / PRIOR_NAME,
        regression_share=config.regression_share,
        sampling_steps=config.sampling_steps,
    )
    std = train_std.StdConfig(**_shared(config, folders["std"], config.std_minutes), prior=folders["ldm"] / PRIOR_NAME)
    coarse = train_coarse.CoarseConfig(
        **_shared(config, folders["coarse"], config.coarse_minutes),
        prior=folders["std"] / PRIOR_NAME,
        folds=config.coarse_folds,
    )
    _unless_finished(vae, lambda: train_vae.run(vae))
    _unless_finished(ldm, lambda: train_ldm.run(ldm))
    _unless_finished(std, lambda: train_std.run(std))
    _unless_finished(coarse, lambda: train_coarse.run(coarse))
    if is_main_process():
        prior = read_prior(folders["coarse"] / PRIOR_NAME)
        save_prior(prior, config.output / PRIOR_NAME)
        stages = [Stage(name, folder) for name, folder in folders.items()]
        write_model_card(config.output / PRIOR_NAME / CARD_NAME, config.output / PRIOR_NAME, stages, config.pairs)
    wait_for_everyone()


def _shared(config: PlanConfig, output: Path, minutes: float) -> dict[str, Any]:
    return {
        "pairs": config.pairs,
        "output": output,
        "max_minutes": minutes,
        "seed": config.seed,
        "validate_every": config.validate_every,
        "validation_scenes": config.validation_scenes,
    }


def _unless_finished(stage: TrainingConfig, train: Callable[[], None]) -> None:
    if not (stage.output / PRIOR_NAME / "model_index.json").is_file():
        train()


if __name__ == "__main__":
    log_to_console()
    run(tyro.cli(PlanConfig, description=__doc__))
