"""Depth of reference views as the depth network sees it: a distribution for every pixel, where stereo sees and where not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from diffusion_prior.files import save_file, whole_file
from nerfstudio_enhancer.stereo.config import SweepConfig
from nerfstudio_enhancer.stereo.depth_network import UNKNOWN_COST, DepthNetwork, DepthNetworkConfig
from nerfstudio_enhancer.stereo.sweep import matching_cost, pixel_grid
from nerfstudio_enhancer.stereo.views import StereoView, choose_sources
from nerfstudio_enhancer.threads import map_on_threads

WEIGHTS_PATH = Path(__file__).parent / "weights" / "depth_network.safetensors"

NETWORK_PX = 160
"""Long side of the matching costs that the network reads; it was trained at this size."""

PICTURE_FACTOR = 2
"""The photograph is given to it at so many times the size of the costs."""

NETWORK_SWEEP = SweepConfig(windows_px=(3, 7))
"""Matching costs that the network reads."""


@dataclass(frozen=True)
class DepthDistribution:
    """What the network says of one reference view."""

    view: StereoView
    """The picture at the distribution's resolution, and its camera."""
    inverse_depth: Float[Tensor, " d"]
    """Planes from far to near, per world unit."""
    probability: Float[Tensor, "d h w"]
    """Of every plane; sums to 1 over the planes."""

    def quantile(self, share: Float[Tensor, "h w"] | float) -> Float[Tensor, "h w"]:
        """Depth below which the given share of the probability lies counted from far to near, between planes linearly."""
        share = torch.as_tensor(share).expand(self.probability.shape[1:])
        return 1 / self._inverse_at(self.probability.cumsum(0), share)

    def draw(self, row: Tensor, column: Tensor, share: Float[Tensor, " m"]) -> Float[Tensor, " m"]:
        """Depth at pixels (row, column) [m] for numbers in [0, 1): distributed as the network says if those are uniform."""
        return 1 / self._inverse_at(self.probability[:, row, column].cumsum(0), share)

    def _inverse_at(self, cumulated: Tensor, share: Tensor) -> Tensor:
        share = share.clamp(0, 1 - 1e-6) * cumulated[-1]
        above = (cumulated > share).to(torch.uint8).argmax(dim=0, keepdim=True)
        upper = cumulated.gather(0, above)[0]
        lower = torch.where(above[0] > 0, cumulated.gather(0, (above - 1).clamp(min=0))[0], torch.zeros_like(upper))
        between = (share - lower) / (upper - lower).clamp(min=1e-12) - 0.5
        step = self.inverse_depth[1] - self.inverse_depth[0]
        inverse = self.inverse_depth[above[0]] + between * step
        return inverse.clamp(float(self.inverse_depth[0]), float(self.inverse_depth[-1]))


@torch.no_grad()
def predict_depth(
    views: Sequence[StereoView], depth_ranges: Sequence[tuple[float, float]], max_sources: int
) -> list[DepthDistribution]:
    """Distribution of the depth of every view.

    Args:
        views: undistorted reference views.
        depth_ranges: near and far depth of each view, world units.
        max_sources: most other views that a view is matched with.
    """
    network = bundled_network()
    small = [view.resized(min(NETWORK_PX, max(view.size))) for view in views]
    sources = choose_sources(views, depth_ranges, max_sources)
    network.to(views[0].grey.device)

    def likely(index: int) -> DepthDistribution:
        view, (near, far) = small[index], depth_ranges[index]
        planes = torch.linspace(1 / far, 1 / near, network.config.num_planes).to(view.grey)
        cost = costs_of(view, [small[i] for i in sources[index]], planes)
        picture = picture_at(views[index].rgb, view.size)
        logits = network(cost[None], picture[None], rays(view, (near, far))[None])
        return DepthDistribution(view, planes, logits[0].softmax(0))

    return map_on_threads(likely, range(len(views)))


def costs_of(view: StereoView, sources: Sequence[StereoView], planes: Float[Tensor, " d"]) -> Float[Tensor, "d h w"]:
    """Matching costs in [0, 1] of every plane, as the network reads them."""
    if not sources:
        return view.grey.new_full((len(planes), *view.size), UNKNOWN_COST)
    return matching_cost(view, sources, planes, NETWORK_SWEEP).permute(2, 0, 1)


def rays(view: StereoView, depth_range: tuple[float, float]) -> Float[Tensor, "3 h w"]:
    """X / z and y / z of the pixels' rays, and the logarithm of far over near."""
    near, far = depth_range
    direction = torch.einsum("ij,jhw->ihw", torch.linalg.inv(view.intrinsics).to(view.grey), pixel_grid(view))
    direction[2] = torch.log(torch.tensor(far / near))
    return direction


def picture_at(rgb: Float[Tensor, "H W 3"], size: Sequence[int]) -> Float[Tensor, "3 _ _"]:
    """A photograph as the network reads it beside costs of the given size."""
    picture = rgb.permute(2, 0, 1)[None]
    to = [PICTURE_FACTOR * side for side in size]
    return F.interpolate(picture, to, mode="bilinear", antialias=True, align_corners=False)[0]


@cache
def bundled_network() -> DepthNetwork:
    """The network that comes with the package."""
    return load_network(WEIGHTS_PATH)


def load_network(path: Path) -> DepthNetwork:
    """Read weights that `save_network` wrote; nothing of the network trains.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged or holds other weights.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"There are no weights of the depth network at {path}; install the package again.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {})["config"]
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118  # no dictionary
        network = DepthNetwork(DepthNetworkConfig.from_text(text))
        network.load_state_dict(weights)
    except (SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} holds no weights of a depth network: {error}") from error
    return network.eval().requires_grad_(False)


def save_network(network: DepthNetwork, path: Path) -> None:
    """Write weights as they are bundled: float16, with their sizes."""
    weights = {name: value.half().contiguous() for name, value in network.state_dict().items()}
    with whole_file(path) as partial:
        save_file(weights, partial, metadata={"config": network.config.to_text()})
