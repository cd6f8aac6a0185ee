"""LPIPS (Zhang et al. 2018) with AlexNet features, from files that are already on the machine: nothing is ever downloaded."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

FEATURES_PATH = Path(__file__).parent / "lpips_alexnet" / "alexnet_features.safetensors"
MIN_SIZE_PX = 31
"""AlexNet's third and later layers have no pixel left below this height or width."""

# Statistics of ImageNet for inputs in [-1, 1], as published with LPIPS v0.1.
INPUT_SHIFT = (-0.030, -0.088, -0.188)
INPUT_SCALE = (0.458, 0.448, 0.450)
NORM_EPSILON = 1e-8


class AlexNetFeatures(nn.Module):
    """The five convolution layers of torchvision's AlexNet; gives each layer's activations."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.ModuleDict(
            {
                "0": nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
                "3": nn.Conv2d(64, 192, kernel_size=5, padding=2),
                "6": nn.Conv2d(192, 384, kernel_size=3, padding=1),
                "8": nn.Conv2d(384, 256, kernel_size=3, padding=1),
                "10": nn.Conv2d(256, 256, kernel_size=3, padding=1),
            }
        )

    def forward(self, image: Float[Tensor, "b 3 h w"]) -> list[Tensor]:
        activations = []
        x = image
        for name, convolution in self.features.items():
            if name in ("3", "6"):
                x = F.max_pool2d(x, kernel_size=3, stride=2)
            x = F.relu(convolution(x))
            activations.append(x)
        return activations


class AlexNetLpips(nn.Module):
    """LPIPS v0.1 with frozen AlexNet features and the learned linear heads of the `lpips` package."""

    shift: Tensor
    scale: Tensor

    def __init__(self, features_path: Path = FEATURES_PATH, heads_path: Path | None = None) -> None:
        super().__init__()
        self.backbone = AlexNetFeatures()
        self.backbone.load_state_dict(load_file(features_path))
        heads = torch.load(heads_path or _installed_heads_path(), map_location="cpu", weights_only=True)
        for layer in range(5):
            self.register_buffer(f"head_{layer}", heads[f"lin{layer}.model.1.weight"].clone())
        self.register_buffer("shift", rearrange(torch.tensor(INPUT_SHIFT), "c -> c 1 1"))
        self.register_buffer("scale", rearrange(torch.tensor(INPUT_SCALE), "c -> c 1 1"))
        self.requires_grad_(False)
        self.eval()

    def forward(self, pred: Float[Tensor, "b 3 h w"], target: Float[Tensor, "b 3 h w"]) -> Float[Tensor, " b"]:
        """Distance of each pair; RGB in [0, 1], the same as `lpips_alex`."""
        distance = torch.zeros(pred.shape[0], device=pred.device)
        activations = zip(self._normalised_activations(pred), self._normalised_activations(target), strict=True)
        for layer, (pred_features, target_features) in enumerate(activations):
            squared = (pred_features - target_features) ** 2
            head = self.get_buffer(f"head_{layer}").to(squared.dtype)
            distance = distance + F.conv2d(squared, head).mean(dim=(1, 2, 3), dtype=torch.float32)
        return distance

    def _normalised_activations(self, rgb: Tensor) -> list[Tensor]:
        scaled = ((2 * rgb - 1) - self.shift) / self.scale
        activations = self.backbone(scaled.contiguous(memory_format=torch.channels_last))
        return [x * torch.rsqrt(x.square().sum(dim=1, keepdim=True) + NORM_EPSILON) for x in activations]


def lpips_alex(pred: Float[Tensor, "b 3 h w"], target: Float[Tensor, "_ 3 _ _"]) -> Float[Tensor, " b"]:
    """LPIPS-AlexNet v0.1 of each pair of pictures; 0 = same, larger = more different.

    Differentiable with respect to both. Under autocast the convolutions run in its lower precision.

    Args:
        pred: RGB in [0, 1].
        target: RGB in [0, 1], of the same shape.

    Raises:
        ValueError: if the shapes differ or a side is shorter than 31 pixels.
        ImportError: if the `lpips` package, whose linear heads are used, is not installed.
    """
    if pred.shape != target.shape:
        raise ValueError(f"LPIPS compares pictures of one shape, got {tuple(pred.shape)} and {tuple(target.shape)}.")
    if min(pred.shape[-2:]) < MIN_SIZE_PX:
        raise ValueError(
            f"LPIPS needs pictures of at least {MIN_SIZE_PX} x {MIN_SIZE_PX} pixels, got {tuple(pred.shape[-2:])}; "
            "resize them or leave the measure out."
        )
    return _network(pred.device)(pred, target)


@cache
def _network(device: torch.device) -> AlexNetLpips:
    return AlexNetLpips().to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def _installed_heads_path() -> Path:
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise ImportError("LPIPS takes its linear heads from the package `lpips`: run `pip install lpips`.")
    return Path(package.origin).parent / "weights" / "v0.1" / "alex.pth"
