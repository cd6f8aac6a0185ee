"""The last stage: the prior repairs what the splats show at any camera, as an output of its own beside `rgb`.

Difix3D+ (Wu et al., CVPR 2025) repairs renders after training too. Splats average what enhanced views say, and
lose their detail; a render that is repaired itself keeps it, but no longer agrees with its neighbours by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from torch import Tensor

from nerfstudio_enhancer.conventions import to_channels_last
from nerfstudio_enhancer.enhance_step import EnhanceConfig, Prior, References, condition_clip, reference_frame
from nerfstudio_enhancer.names import REPAIRED
from nerfstudio_enhancer.random_state import step_generator
from nerfstudio_enhancer.rendering import render_clip
from nerfstudio_enhancer.warping import WarpSources, nearest_references

if TYPE_CHECKING:
    from nerfstudio_enhancer.model import EnhancerModel


class RenderRepair:
    """Repairs renders of one scene, each as a clip of its own between its two nearest references."""

    def __init__(self, config: EnhanceConfig, references: Callable[[], References], prior: Prior) -> None:
        """Read nothing yet.

        Args:
            config: whose `repair_share` and `warp_references` hold.
            references: reference photographs and cameras, asked for at the first repair.
            prior: repairs the clips.
        """
        self._config = config
        self._read = references
        self._prior = prior
        self._references: References | None = None
        self._sources: tuple[int, WarpSources] | None = None

    @torch.no_grad()
    def __call__(self, model: EnhancerModel, camera: Cameras) -> Float[Tensor, "h w 3"]:
        """What a camera (shape [1]) sees, repaired; sRGB in [0, 1]. The same splats and camera give the same picture."""
        if self._references is None:
            self._references = self._read()
        references = replace(self._references, cameras=model.learnt_cameras(self._references.cameras))
        nearest = nearest_references(camera, references.cameras)
        first, last = nearest[0], nearest[min(1, len(nearest) - 1)]
        cameras = _between(camera, references.cameras[first : first + 1], references.cameras[last : last + 1])
        rendered = render_clip(model, cameras.to(model.device))
        ends = reference_frame(references, first, rendered), reference_frame(references, last, rendered)
        sources = self._warp_sources(model, references) if self._config.warp_references else None
        condition = condition_clip(rendered, ends, cameras, sources)
        enhanced = self._prior.enhance(condition, step_generator(model.seed, 0, REPAIRED)).rgb
        return torch.lerp(rendered.rgb[1], to_channels_last(enhanced)[1].to(rendered.rgb), self._config.repair_share)

    def _warp_sources(self, model: EnhancerModel, references: References) -> WarpSources:
        """Depth at the references, rendered anew when the splats have trained on."""
        if self._sources is None or self._sources[0] != model.step:
            self._sources = model.step, WarpSources.of(model, references)
        return self._sources[1]


class RepairableOutputs(dict[str, Any]):
    """What a camera sees, by name, and the repair of it, which takes long and is made when it is asked for first."""

    def __init__(self, outputs: Mapping[str, Any], repair: Callable[[], Tensor], offered: bool) -> None:
        """Outputs and how to repair them.

        Args:
            outputs: of the model.
            repair: makes the repaired picture.
            offered: whether it is among the outputs by name, too.
        """
        super().__init__(outputs)
        self._repair = repair
        self._made: Tensor | None = None
        if offered:
            self[REPAIRED] = None

    @property
    def repaired(self) -> Float[Tensor, "h w 3"]:
        """The repaired picture."""
        if self._made is None:
            self._made = self._repair()
        return self._made

    def __getitem__(self, name: str) -> Any:
        return self.repaired if name == REPAIRED and name in self else super().__getitem__(name)


def _between(camera: Cameras, first: Cameras, last: Cameras) -> Cameras:
    """A camera between two references, whose intrinsics are brought to its image size; shape [3]."""
    width, height = int(camera.width.item()), int(camera.height.item())
    parts = (first, camera, last)

    def column(name: str, side: str, size: int) -> Tensor:
        values = [getattr(part, name).cpu().reshape(1, 1) * size / int(getattr(part, side).item()) for part in parts]
        return torch.cat(values)

    return Cameras(
        camera_to_worlds=torch.cat([part.camera_to_worlds.cpu().reshape(1, 3, 4) for part in parts]),
        fx=column("fx", "width", width),
        fy=column("fy", "height", height),
        cx=column("cx", "width", width),
        cy=column("cy", "height", height),
        width=width,
        height=height,
        camera_type=CameraType.PERSPECTIVE,
    )
