"""Path -> clip: renders the splats along a trajectory with everything the prior and the confidence need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

if TYPE_CHECKING:
    from nerfstudio_enhancer.model import EnhancerModel


@dataclass(frozen=True)
class RenderedClip:
    """What the splats show along one trajectory."""

    rgb: Float[Tensor, "t h w 3"]
    """sRGB in [0, 1], composited on the model's background."""
    alpha: Float[Tensor, "t h w 1"]
    """Accumulated opacity in [0, 1]."""
    depth: Float[Tensor, "t h w 1"]
    """Expected depth, world units."""
    scale_map: Float[Tensor, "t h w 3"]
    """Scale vectors composited as colours, world units."""


@torch.no_grad()
def render_clip(model: EnhancerModel, cameras: Cameras, on_frame: Callable[[], None] | None = None) -> RenderedClip:
    """Render every camera (shape [t], one image size) in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        frames = []
        for index in range(cameras.shape[0]):
            frames.append(model.get_outputs_for_camera(cameras[index : index + 1]))
            if on_frame is not None:
                on_frame()
    finally:
        model.train(was_training)
    return RenderedClip(
        rgb=torch.stack([frame["rgb"] for frame in frames]),
        alpha=torch.stack([frame["accumulation"] for frame in frames]),
        depth=torch.stack([frame["depth"] for frame in frames]),
        scale_map=torch.stack([frame["scale_map"] for frame in frames]),
    )


def trajectory_cameras(camera_to_world: Float[Tensor, "t 3 4"], first: Cameras, last: Cameras) -> Cameras:
    """Cameras along a trajectory: focal lengths glide from the first reference to the last, the image size is the first's.

    Args:
        camera_to_world: poses, OpenGL axes; the ends are the references'.
        first: camera of the first reference, shape [1].
        last: camera of the last reference, shape [1]; its intrinsics are brought to the first's image size.
    """
    width, height = int(first.width.item()), int(first.height.item())
    scale_x, scale_y = width / int(last.width.item()), height / int(last.height.item())
    share = torch.linspace(0, 1, camera_to_world.shape[0])[:, None]

    def glide(name: str, scale: float) -> Tensor:
        a, b = getattr(first, name).cpu().reshape(1, 1), getattr(last, name).cpu().reshape(1, 1) * scale
        return (1 - share) * a + share * b

    return Cameras(
        camera_to_worlds=camera_to_world.cpu(),
        fx=glide("fx", scale_x),
        fy=glide("fy", scale_y),
        cx=glide("cx", scale_x),
        cy=glide("cy", scale_y),
        width=width,
        height=height,
        camera_type=CameraType.PERSPECTIVE,
    )
