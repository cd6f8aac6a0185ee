"""Random numbers that depend on seed, step and purpose alone: nothing to save, and a resumed run draws the same."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffusion_prior.seeded import seeded


def step_generator(seed: int, step: int, purpose: str) -> torch.Generator:
    """A CPU generator for one purpose at one step.

    Args:
        seed: the run's seed (`--machine.seed`).
        step: training step, epoch or round.
        purpose: what is drawn; different purposes give independent numbers.
    """
    return torch.Generator().manual_seed(_number(seed, step, purpose))


@contextmanager
def step_seed(seed: int, step: int, purpose: str, device: torch.device | str) -> Iterator[None]:
    """Within it torch's global generators give such numbers, for code that takes no generator; after it they go on as before.

    Args:
        seed: the run's seed (`--machine.seed`).
        step: training step, epoch or round.
        purpose: what is drawn; different purposes give independent numbers.
        device: whose generator is drawn from, beside the CPU's.
    """
    with seeded(_number(seed, step, purpose), device):
        yield


def _number(seed: int, step: int, purpose: str) -> int:
    return zlib.crc32(f"{seed}/{step}/{purpose}".encode())
