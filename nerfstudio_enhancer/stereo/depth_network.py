"""A learned distribution of depth for every pixel of a reference view, from its matching costs and its picture.

Stereo knows depth where two references see the same textured surface, which with few views is a minor part of the
pixels. Everywhere else the picture itself tells roughly how far away things are. The network reads both: the costs of a
plane sweep (all of 0.5 where no other reference sees the pixel) and the photograph, the latter also through AlexNet's
ImageNet features that are bundled for LPIPS. Plane-sweep costs as channels of a two-dimensional network: SimpleRecon
(Sayed et al. 2022), section 3.2. It gives a distribution over the sweep's planes instead of a number, so that splats can
be spread over what is uncertain.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from diffusion_prior.perceptual import FEATURES_PATH, INPUT_SCALE, INPUT_SHIFT, AlexNetFeatures

UNKNOWN_COST = 0.5
"""Matching cost that tells nothing."""


@dataclass(frozen=True)
class DepthNetworkConfig:
    """Sizes of the network."""

    num_planes: int = 64
    """Planes of the sweep, evenly spaced in inverse depth."""
    widths: tuple[int, ...] = (32, 64, 96, 160, 224)
    """Channels at each halving of the resolution."""
    picture_features: int = 48
    """Channels to which each used layer of AlexNet is reduced."""
    groups: int = 8
    """Groups of the group norms."""

    def to_text(self) -> str:
        """As JSON, for the metadata of a weights file."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> DepthNetworkConfig:
        """What `to_text` wrote."""
        values = json.loads(text)
        return cls(**{**values, "widths": tuple(values["widths"])})


class DepthNetwork(nn.Module):
    """U-Net from matching costs and picture to logits over the sweep's planes."""

    def __init__(self, config: DepthNetworkConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or DepthNetworkConfig()
        widths, features = config.widths, config.picture_features
        self.stem = nn.Conv2d(config.num_planes + NUM_PICTURE_CHANNELS, widths[0], 3, padding=1)
        self.reduce = nn.ModuleList(nn.Conv2d(channels, features, 1) for channels in ALEXNET_CHANNELS)
        self.encoder, self.down, self.decoder = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            extra = features if 1 <= level <= len(ALEXNET_CHANNELS) else 0
            self.encoder.append(
                nn.Sequential(
                    _Residual(width + extra, width, config.groups),
                    *([_Residual(width, width, config.groups)] if level > 0 else []),
                )
            )
            if level > 0:
                self.down.append(nn.Conv2d(widths[level - 1], width, 3, stride=2, padding=1))
        for level in range(len(widths) - 1):
            self.decoder.append(_Residual(widths[level] + widths[level + 1], widths[level], config.groups))
        self.head = nn.Conv2d(widths[0], config.num_planes, 3, padding=1)
        self.trust_in_matching = nn.Parameter(torch.tensor(4.0))

    def forward(
        self, cost: Float[Tensor, "b d h w"], rgb: Float[Tensor, "b 3 H W"], rays: Float[Tensor, "b 3 h w"]
    ) -> Float[Tensor, "b d h w"]:
        """Logits over the planes.

        Args:
            cost: matching cost in [0, 1] of every plane, far to near; UNKNOWN_COST where nothing is known.
            rgb: the photograph, sRGB in [0, 1], at twice the resolution of the costs or more.
            rays: x / z and y / z of every pixel's ray, and the logarithm of far over near depth.
        """
        size = cost.shape[-2:]
        matching = UNKNOWN_COST - cost
        small = F.interpolate(rgb, size, mode="area") if rgb.shape[-2:] != size else rgb
        x = self.stem(torch.cat([matching, small - 0.5, rays], dim=1))
        skips: list[Tensor] = []
        layers = [reduce(layer) for reduce, layer in zip(self.reduce, self._picture_features(rgb))]
        for level, encode in enumerate(self.encoder):
            if level > 0:
                x = self.down[level - 1](x)
                if level <= len(layers):
                    layer = F.interpolate(layers[level - 1], x.shape[-2:], mode="bilinear", align_corners=False)
                    x = torch.cat([x, layer], dim=1)
            x = encode(x)
            skips.append(x)
        for level in reversed(range(len(self.decoder))):
            up = F.interpolate(x, skips[level].shape[-2:], mode="nearest")
            x = self.decoder[level](torch.cat([skips[level], up], dim=1))
        return self.head(x) + self.trust_in_matching * matching

    def _picture_features(self, rgb: Tensor) -> list[Tensor]:
        """Layers 1, 2 and 5 of AlexNet, which is frozen and no part of this network's weights."""
        alexnet = _alexnet(rgb.device)
        shift, scale = (rgb.new_tensor(values)[:, None, None] for values in (INPUT_SHIFT, INPUT_SCALE))
        with torch.no_grad():
            layers = alexnet((2 * rgb - 1 - shift) / scale)
        return [layers[index] / typical for index, typical in zip(ALEXNET_LAYERS, TYPICAL_ACTIVATION)]


NUM_PICTURE_CHANNELS = 6
"""Red, green, blue, x / z, y / z, and the logarithm of far over near."""

ALEXNET_LAYERS = (0, 1, 4)
"""Layers of AlexNet that are used, at a quarter, an eighth and a sixteenth of the picture's size."""

ALEXNET_CHANNELS = (64, 192, 256)
"""Their channels."""

TYPICAL_ACTIVATION = (2.0, 2.0, 1.0)
"""Their activations are divided by this, to be of order 1."""


class _Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels_in: int, channels_out: int, groups: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.norm = nn.GroupNorm(groups, channels_out)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.second(F.silu(self.norm(self.first(F.silu(x)))))


_ALEXNETS: dict[torch.device, AlexNetFeatures] = {}


def _alexnet(device: torch.device) -> AlexNetFeatures:
    """Outside the module, so that its weights are neither trained nor saved twice."""
    if device not in _ALEXNETS:
        from safetensors.torch import load_file

        network = AlexNetFeatures()
        network.load_state_dict(load_file(FEATURES_PATH))
        _ALEXNETS[device] = network.requires_grad_(False).eval().to(device)
    return _ALEXNETS[device]
