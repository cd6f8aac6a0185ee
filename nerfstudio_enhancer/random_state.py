"""Random numbers that depend on seed, step and purpose alone: nothing to save, and a resumed run draws the same."""

from __future__ import annotations

import zlib

import torch


def step_generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose at one step.

    Args:
        seed: the run's seed (`--machine.seed`).
        step: training step, epoch or round.
        purpose: what is drawn; different purposes give independent numbers.
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{step}/{purpose}".encode()))
