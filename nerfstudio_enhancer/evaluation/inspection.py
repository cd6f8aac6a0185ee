"""`ns-enhancer inspect-prior`: what a prior's folder holds, in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from diffusion_prior.checkpoints import read_prior, resolve_folder

MIB = 1024**2


def inspect_prior(name: str) -> str:
    """Read a prior whole and describe its parts: parameters, precision and size on disk.

    Args:
        name: `bundled`, a folder, or the name of a hub repository.

    Raises:
        ValueError: if a part is broken, or does not fit its config.
        FileNotFoundError: if there is no such prior, or a part is missing.
    """
    folder = resolve_folder(name)
    prior = read_prior(folder)
    lines = [f"{folder}", f"{'part':<16}{'parameters':>14}  {'precision':<10}{'on disk, MiB':>12}"]
    total = 0
    for part, module in prior.modules.items():
        count = sum(parameter.numel() for parameter in module.parameters())
        precision = str(next(module.parameters()).dtype).removeprefix("torch.")
        total += count
        lines.append(f"{part:<16}{count:>14,}  {precision:<10}{_size_mib(folder / part):>12.1f}")
    lines.append(f"{'together':<16}{total:>14,}  {'':<10}{_size_mib(folder):>12.1f}")
    lines += [f"{field.name} = {getattr(prior.config, field.name)}" for field in dataclasses.fields(prior.config)]
    return "\n".join(lines)


def _size_mib(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / MIB
