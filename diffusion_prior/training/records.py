"""What a training leaves to be read while it goes on: a line for every figure, contact sheets, and both for tensorboard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"
SHEETS_NAME = "sheets"
TENSORBOARD_NAME = "tensorboard"
SHEET_TAG = "validation/render, predictions, photograph"


class Records:
    """The log, the sheets and the tensorboard files of one training. One process alone may have them."""

    def __init__(self, output: Path, step: int = 0) -> None:
        """Go on with the records in a folder.

        Args:
            output: folder of the training.
            step: that it starts after. What a killed run showed of later ones goes from tensorboard, since they come again.
        """
        self._output = output
        (output / SHEETS_NAME).mkdir(parents=True, exist_ok=True)
        self._board = SummaryWriter(str(output / TENSORBOARD_NAME), purge_step=step + 1 if step > 0 else None)

    def training(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """Keep the figures of one training step."""
        self._keep("training", step, seconds, figures)

    def validation(
        self, step: int, seconds: float, figures: Mapping[str, float], sheet: Float[Tensor, "3 h w"] | None
    ) -> None:
        """Keep the figures of a validation and its contact sheet, in [0, 1]."""
        self._keep("validation", step, seconds, figures)
        if sheet is not None:
            save_picture(sheet, self._output / SHEETS_NAME / f"step-{step:07d}.png")
            self._board.add_image(SHEET_TAG, sheet.clamp(0, 1).cpu(), step)
            self._board.flush()

    def close(self) -> None:
        """Write what is still held back."""
        self._board.close()

    def _keep(self, group: str, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        line = {"step": step, "seconds": round(seconds, 1)} | {
            name: float(f"{value:.6g}") for name, value in figures.items()
        }
        with (self._output / LOG_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in figures.items():
            self._board.add_scalar(f"{group}/{name}", value, step)


def save_picture(rgb: Float[Tensor, "3 h w"], path: Path) -> None:
    """Write a picture in [0, 1] as PNG."""
    pixels = (rgb.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(path)
