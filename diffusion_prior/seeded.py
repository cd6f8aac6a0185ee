"""Random weights and layers that draw the same for the same seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Within it torch's global generators start from a seed, for layers that take no generator; after it they go on as before.

    Args:
        seed: of what is drawn.
        device: whose generator is drawn from, beside the CPU's.
    """
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seed)
        yield
