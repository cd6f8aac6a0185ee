"""The store of enhanced views: filled by rounds, drawn from by the data manager, saved beside the checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from nerfstudio.cameras.cameras import Cameras, CameraType
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from diffusion_prior.files import save_file

LEAST_NEED = 0.05
"""Mean need below which a round is not trained on: so few steps help no scene, but make its training another one by chance."""
FORMAT_VERSION = 2
VIEWS_FILE = "views.safetensors"
META_FILE = "round.json"
SHOWN_ALPHA = "shown_alpha"
"""Key of a batch under which `EnhancedViews.alpha` lies, where there is one."""


@dataclass(frozen=True)
class EnhancedViews:
    """The views that one round made, ready for the loss. Images in float16: what is saved is what is trained on."""

    rgb: Float[Tensor, "t h w 3"]
    """sRGB in [0, 1], nerfstudio image layout."""
    pixel_confidence: Float[Tensor, "t h w 1"]
    """P_c, mean 1 over the clip, times the references' agreement."""
    image_confidence: Float[Tensor, " t"]
    """I_c, mean 1 over the round."""
    need: Float[Tensor, " t"]
    """How much each view is needed and agrees with the references, in [0, 1]: views are drawn in proportion to it."""
    camera_to_world: Float[Tensor, "t 3 4"]
    """OpenGL axes, nerfstudio world units."""
    intrinsics: Float[Tensor, "t 4"]
    """fx, fy, cx, cy in pixels."""
    alpha: Float[Tensor, "t h w 1"] | None = None
    """Opacity of the renders in [0, 1], where references are transparent in part; what is clear there takes the step's background."""

    @property
    def num_views(self) -> int:
        return self.rgb.shape[0]


class EnhancedViewStore:
    """Rounds of enhanced views by the step at which they were made; the newest `keep_rounds` are drawn from."""

    def __init__(self, keep_rounds: int = 1) -> None:
        if keep_rounds < 1:
            raise ValueError(f"The store must keep at least 1 round, got {keep_rounds}.")
        self.keep_rounds = keep_rounds
        self.rounds: dict[int, list[EnhancedViews]] = {}

    def add(self, step: int, clips: list[EnhancedViews]) -> None:
        """Add a round; clips may differ in image size. Older rounds than `keep_rounds` are dropped from memory."""
        if not clips:
            raise ValueError(f"The round at step {step} made no view; a round needs at least one clip.")
        self.rounds[step] = clips
        for old in sorted(self.rounds)[: -self.keep_rounds]:
            del self.rounds[old]

    @property
    def num_views(self) -> int:
        return sum(clip.num_views for clip in self._clips())

    @property
    def mean_need(self) -> float:
        """Mean need of all views that are drawn from; 0 for an empty store."""
        return float(self._needs().mean()) if self.num_views else 0.0

    @property
    def share(self) -> float:
        """Share of the batches, of those that may be enhanced views, that are: the mean need, 0 below `LEAST_NEED`."""
        need = self.mean_need
        return need if need >= LEAST_NEED else 0.0

    def draw(self, generator: torch.Generator, device: torch.device | str = "cpu") -> tuple[Cameras, dict]:
        """One view, in proportion to its need: its camera (shape [1]) and its batch (image, pixel_confidence, image_confidence).

        Raises:
            ValueError: when the store holds no view that is needed.
        """
        if self.mean_need == 0:
            raise ValueError("No enhanced view to draw: run a round first.")
        index = int(torch.multinomial(self._needs(), 1, generator=generator))
        for clip in self._clips():
            if index < clip.num_views:
                return _camera(clip, index, device), _batch(clip, index, device)
            index -= clip.num_views
        raise AssertionError("index beyond the store")

    def _needs(self) -> Float[Tensor, " n"]:
        return torch.cat([clip.need for clip in self._clips()])

    def _clips(self) -> list[EnhancedViews]:
        return [clip for step in sorted(self.rounds) for clip in self.rounds[step]]

    def save_round(self, folder: Path, step: int, settings: dict, figures: dict | None = None) -> Path:
        """Write the round of a step to `folder/round-step-NNNNNNNNN`, whole or not at all.

        Args:
            folder: of all rounds.
            step: of this one.
            settings: kept with it, for people.
            figures: what was measured of it, likewise.

        Returns:
            The folder of the round.
        """
        target = folder / round_folder_name(step)
        partial = folder / f".partial-{target.name}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            tensors = {
                f"{i:03d}.{name}": getattr(clip, name).contiguous().cpu()
                for i, clip in enumerate(self.rounds[step])
                for name in EnhancedViews.__dataclass_fields__
                if getattr(clip, name) is not None
            }
            save_file(tensors, partial / VIEWS_FILE)
            meta = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "clips": len(self.rounds[step]),
                "settings": settings,
                **(figures or {}),
            }
            (partial / META_FILE).write_text(json.dumps(meta, indent=1, default=str))
            if target.exists():
                shutil.rmtree(target)
            partial.rename(target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return target

    def load_rounds(self, folder: Path, up_to_step: int) -> list[int]:
        """Read the rounds of `folder` made at or before a step; a folder without rounds is an empty store.

        Returns:
            Steps of all rounds found up to that step (also those too old to be kept in memory).

        Raises:
            ValueError: where a round's files are damaged or of another format version.
        """
        found = []
        for path in sorted(folder.glob("round-step-*")):
            meta = _read_meta(path)
            if meta["step"] > up_to_step:
                continue
            found.append(int(meta["step"]))
            self.add(int(meta["step"]), _read_clips(path, int(meta["clips"])))
        return found


def newest_settings(folder: Path, up_to_step: int) -> dict:
    """The settings that the newest round of `folder` made at or before a step was kept with; empty without such a round.

    Raises:
        ValueError: where a round's description is damaged or of another format version.
    """
    metas = [_read_meta(path) for path in folder.glob("round-step-*")]
    past = [meta for meta in metas if meta["step"] <= up_to_step]
    return max(past, key=lambda meta: meta["step"])["settings"] if past else {}


def round_folder_name(step: int) -> str:
    """Name of the folder of the round made at a step."""
    return f"round-step-{step:09d}"


def _read_meta(path: Path) -> dict:
    try:
        meta = json.loads((path / META_FILE).read_text())
        version = meta["format_version"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"The enhanced views in {path} cannot be read ({error}). Delete that folder: the round is then made again."
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"The enhanced views in {path} have format version {version}, this release reads {FORMAT_VERSION}. "
            "Delete that folder: the round is then made again."
        )
    return meta


def _read_clips(path: Path, count: int) -> list[EnhancedViews]:
    try:
        tensors = load_file(path / VIEWS_FILE)
        return [
            EnhancedViews(
                **{
                    name: tensors[f"{i:03d}.{name}"]
                    for name in EnhancedViews.__dataclass_fields__
                    if name != "alpha" or f"{i:03d}.{name}" in tensors
                }
            )
            for i in range(count)
        ]
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(
            f"The enhanced views in {path} are damaged ({error}). Delete that folder: the round is then made again."
        ) from error


def _camera(clip: EnhancedViews, index: int, device: torch.device | str) -> Cameras:
    fx, fy, cx, cy = clip.intrinsics[index].tolist()
    camera = Cameras(
        camera_to_worlds=clip.camera_to_world[index][None],
        fx=fx,
        fy=fy,
        cx=cx,
        cy=cy,
        width=clip.rgb.shape[2],
        height=clip.rgb.shape[1],
        camera_type=CameraType.PERSPECTIVE,
    ).to(device)
    camera.metadata = {"enhanced": True}
    return camera


def _batch(clip: EnhancedViews, index: int, device: torch.device | str) -> dict:
    batch = {
        "image": clip.rgb[index].to(device).float(),
        "pixel_confidence": clip.pixel_confidence[index].to(device).float(),
        "image_confidence": float(clip.image_confidence[index]),
    }
    if clip.alpha is not None:
        batch[SHOWN_ALPHA] = clip.alpha[index].to(device).float()
    return batch
