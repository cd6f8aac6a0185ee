"""Settings that all trainings share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from diffusion_prior.data.clips import ClipConfig

UNET_SETTINGS = ("trainable", "lora_rank", "gradient_checkpointing")
"""What `ScaleConfig` says of the UNet: the trainings of the other networks have no use for it."""


@dataclass
class ScaleConfig:
    """What a training needs that outgrows one small machine."""

    trainable: Literal["all", "unet", "temporal", "lora"] = "all"
    """What of UNet and image encoder trains. all: both. unet: the UNet. temporal: its temporal transformer blocks and, where
    it has one, its pose embedding (the authors' choice for the full size). lora: low-rank additions to its attention."""
    lora_rank: int = 64
    """Rank of the additions; memory and freedom grow with it."""
    gradient_checkpointing: bool = False
    """Compute the UNet's activations twice instead of keeping them: about a third slower, a fraction of the memory."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit keeps the optimiser's states in 8 bits; needs a GPU and `pip install bitsandbytes`."""
    encode_frames: int | None = None
    """Most frames of a batch that a VAE which does not train encodes together; fewer take less memory and give the same
    latents. None: all."""
    sharding: bool = False
    """Split weights, gradients, optimiser states and average over the processes (FSDP), for what fits no single GPU."""
    batches_per_step: int | None = None
    """Batches whose gradients one step averages, over all processes together; one per process by default. A resumed training
    keeps its number, whatever the number of processes, and goes on exactly as it would have."""
    shards: str | None = None
    """Stream the training clips from shards (`python -m diffusion_prior.training.shards`): a folder, or a pattern such as
    `https://host/pairs-{000000..000999}.tar` or `pipe:aws s3 cp s3://bucket/pairs-{000000..000999}.tar -`. Of `pairs`
    the validation scenes alone are then read; they are those that the shards lack where both commands were given the same
    `pairs` and `validation_scenes`."""
    steps_per_shard: int = 50
    """Steps that draw their clips from one shard before it is given up for the next."""

    def __post_init__(self) -> None:
        if self.lora_rank < 1:
            raise ValueError(f"lora_rank must be at least 1, got {self.lora_rank}.")
        if self.batches_per_step is not None and self.batches_per_step < 1:
            raise ValueError(f"batches_per_step must be at least 1, got {self.batches_per_step}.")
        if self.encode_frames is not None and self.encode_frames < 1:
            raise ValueError(f"encode_frames must be at least 1, got {self.encode_frames}.")
        if self.steps_per_shard < 1:
            raise ValueError(f"steps_per_shard must be at least 1, got {self.steps_per_shard}.")
        if self.sharding and self.optimizer == "adamw8bit":
            # bitsandbytes takes no DTensors, and a checkpoint could not gather the states that it keeps beside them
            raise ValueError(
                "sharding needs an optimiser whose states PyTorch can split, got optimizer=adamw8bit; set `optimizer` to "
                "adamw, or train without `sharding`."
            )

    def refuse(self, names: Sequence[str], training: str) -> None:
        """Refuse settings that a training would ignore.

        Args:
            names: of the settings that it has no use for.
            training: what it is called.

        Raises:
            ValueError: where one of them is not what it is by default.
        """
        defaults = {entry.name: entry.default for entry in fields(self)}
        changed = [f"{name}={getattr(self, name)!r}" for name in names if getattr(self, name) != defaults[name]]
        if changed:
            raise ValueError(
                f"{training} has no use for {', '.join(names)}: they must stay as they are by default, got "
                f"{', '.join(changed)}; leave them out (`diffusion_prior.training.train_ldm` takes them)."
            )


@dataclass
class TrainingConfig:
    """What is trained from, for how long and how."""

    pairs: Path
    """Root folder of paired data, as `ns-enhancer make-pairs` writes it."""
    output: Path
    """Folder for checkpoint, log, contact sheets, tensorboard's files and the finished prior; a training found there goes on."""
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
    """Steps between two lines of the log (and points in tensorboard)."""
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
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    """Larger networks, more processes, more data."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "validate_every", "save_every", "validation_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_minutes is not None and self.max_minutes < 0:
            raise ValueError(f"max_minutes must not be negative, got {self.max_minutes}.")
