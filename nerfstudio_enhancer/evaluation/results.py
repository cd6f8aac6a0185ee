"""The benchmark's results file: one entry per cell, rewritten whole after each cell."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS_FILE = "results.json"
CELL_KEYS = ("scene", "views", "seed", "method")


@dataclass
class Results:
    """Cells that are done, and the settings that they share."""

    settings: dict[str, Any]
    """What all cells of one file have in common; a run with others needs another folder."""
    cells: list[dict[str, Any]] = field(default_factory=list)
    """One entry per cell: scene, views, seed, method, psnr, ssim, lpips, wall_s, peak_rss_mb and more."""
    failures: list[dict[str, Any]] = field(default_factory=list)
    """Cells that failed in the latest run, with the reason."""

    def has(self, key: tuple[Any, ...]) -> bool:
        """Whether a cell (scene, views, seed, method) is done."""
        return any(cell_key(cell) == key for cell in self.cells)

    def add(self, cell: dict[str, Any]) -> None:
        """Add a cell, in place of an older one of the same key."""
        self.drop({cell_key(cell)})
        self.cells.append(cell)
        self.cells.sort(key=lambda entry: tuple(map(str, cell_key(entry))))

    def drop(self, keys: set[tuple[Any, ...]]) -> None:
        """Forget cells."""
        self.cells = [cell for cell in self.cells if cell_key(cell) not in keys]


def cell_key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What tells cells apart."""
    return tuple(cell[name] for name in CELL_KEYS)


def load_results(folder: Path, settings: dict[str, Any]) -> Results:
    """Read the results of an earlier run of the same command, or start afresh where there are none.

    Raises:
        ValueError: if the file cannot be read or belongs to other settings.
    """
    path = folder / RESULTS_FILE
    if not path.exists():
        return Results(settings)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        results = Results(content["settings"], content["cells"])
        for cell in results.cells:
            cell_key(cell)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no results file of the benchmark ({error}); move it away or choose another `--output`."
        ) from error
    names = dict.fromkeys((*settings, *results.settings))
    differing = [name for name in names if results.settings.get(name) != settings.get(name)]
    if differing:
        told = ", ".join(
            f"{name} = {results.settings.get(name)!r} there and {settings.get(name)!r} now" for name in differing
        )
        raise ValueError(f"{path} holds cells of other settings: {told}. Choose another `--output`.")
    return results


def save_results(results: Results, folder: Path) -> None:
    """Write the results so that the file is always whole, whenever the process dies."""
    from diffusion_prior.files import whole_file  # with torch, which `ns-enhancer --help` does without

    content = {"settings": results.settings, "cells": results.cells, "failures": results.failures}
    with whole_file(folder / RESULTS_FILE) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
