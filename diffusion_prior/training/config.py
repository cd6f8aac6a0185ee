"""Settings that all trainings share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from diffusion_prior.data.clips import ClipConfig


@dataclass
class TrainingConfig:
    """What is trained from, for how long and how."""

    pairs: Path
    """Root folder of paired data, as `ns-enhancer make-pairs` writes it."""
    output: Path
    """Folder for checkpoint, log, contact sheets and the finished prior; a training found there goes on."""
    prior: Path | None = None
    """Prior to start from; its other parts are kept as they are. None starts from a compact prior with random weights."""
    steps: int = 100_000
    """Steps of the whole training."""
    max_minutes: float | None = None
    """Stop after this much training time, earlier runs of the same output included; the schedule then ends with it."""
    seed: int = 0
    """Of the weights, the clips, the noise."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up and then lowered to zero along a cosine."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from zero."""
    weight_decay: float = 0.01
    """AdamW's decay per unit of learning rate."""
    clip_norm: float = 1.0
    """Longest gradient; longer ones are shortened to it."""
    ema_decay: float = 0.998
    """How much of the averaged weights each step keeps; shorter at the beginning. The average is what is saved."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the networks; auto takes bfloat16 where the device is fast with it."""
    log_every: int = 10
    """Steps between two lines of the log."""
    validate_every: int = 500
    """Steps between two validations; one more follows the last step."""
    save_every: int = 200
    """Steps between two checkpoints."""
    validation_scenes: tuple[str, ...] = ()
    """Scenes that validate and never train; if empty, one in twelve."""
    validation_clips: int = 6
    """How many fixed clips validate."""
    loader_workers: int = 0
    """Processes that read clips ahead; 0 reads between the steps."""
    clips: ClipConfig = field(default_factory=ClipConfig)
    """Which clips are drawn, and how they are varied."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}.")
        if self.max_minutes is not None and self.max_minutes < 0:
            raise ValueError(f"max_minutes must not be negative, got {self.max_minutes}.")
