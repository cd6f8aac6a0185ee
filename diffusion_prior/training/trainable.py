"""Which parameters of a prior train: all, the UNet's temporal blocks, or low-rank additions that are merged at the end."""

from __future__ import annotations

from torch import nn

from diffusion_prior.prior import VideoPrior
from diffusion_prior.seeded import seeded
from diffusion_prior.training.config import ScaleConfig

TEMPORAL_PARTS = ("temporal_transformer_block", "pose_embedding")
"""In the names of the parameters that the authors train at full size."""
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
"""Layers of the attention that get low-rank additions."""


def choose_trainable(prior: VideoPrior, scale: ScaleConfig, seed: int = 0) -> None:
    """Let the chosen parameters of UNet and image encoder train and no others; switch gradient checkpointing.

    Args:
        prior: changed in place; with `lora` its UNet gets additional layers until `merge_additions`.
        scale: what is chosen.
        seed: of the additions' first weights.

    Raises:
        ImportError: `lora` without peft.
        ValueError: `temporal` for a UNet without temporal transformer blocks.
    """
    prior.unet.requires_grad_(scale.trainable in ("all", "unet"))
    prior.image_encoder.requires_grad_(scale.trainable == "all")
    if scale.trainable == "temporal":
        chosen = [
            parameter
            for name, parameter in prior.unet.named_parameters()
            if any(part in name for part in TEMPORAL_PARTS)
        ]
        if not chosen:
            raise ValueError(f"the UNet has no parameters named {' or '.join(TEMPORAL_PARTS)}; set `trainable` to all.")
        for parameter in chosen:
            parameter.requires_grad_(True)
    if scale.trainable == "lora":
        _add_low_rank_layers(prior.unet, scale.lora_rank, seed)
    if scale.gradient_checkpointing:
        prior.unet.enable_gradient_checkpointing()


def _add_low_rank_layers(unet: nn.Module, rank: int, seed: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("trainable=lora needs peft: pip install 'nerfstudio-enhancer[train]'.") from error
    with seeded(seed):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), unet)


def merge_additions(unet: nn.Module) -> None:
    """Add low-rank additions to the layers that they belong to, and remove them; without any, nothing happens."""
    if not any("lora_" in name for name, _ in unet.named_parameters()):
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for parent in list(unet.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge()
                setattr(parent, name, child.get_base_layer())
