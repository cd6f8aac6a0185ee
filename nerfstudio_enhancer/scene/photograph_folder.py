"""Which of a capture's folders of photographs is read: data sets are published with downscaled copies beside the originals."""

import re
from dataclasses import replace
from pathlib import Path

from nerfstudio_enhancer.scene.capture import Capture, Frame


def with_photographs_from(capture: Capture, folder: str | None) -> Capture:
    """The capture with its photographs read from one folder, such as `images_4` (DL3DV, Mip-NeRF 360).

    Without a name nothing changes, unless the photographs that the capture names are not there: the largest downscaled
    copies (`images_2`, `images_4`, ...) are taken then, since DL3DV is published without the originals. Intrinsics are
    scaled to the files later on.

    Raises:
        FileNotFoundError: the named folder does not exist.
    """
    if folder is not None:
        if not (capture.folder / folder).is_dir():
            have = sorted(path.name for path in capture.folder.glob("images*") if path.is_dir())
            raise FileNotFoundError(
                f"{capture.folder} has no folder {folder!r} of photographs; it has {', '.join(have) or 'none'}."
            )
        return _moved(capture, capture.folder / folder)
    if capture.frames[0].image.exists():
        return capture
    copies = sorted(_downscaled(capture.folder).items())
    return _moved(capture, copies[0][1]) if copies else capture


def _downscaled(folder: Path) -> dict[int, Path]:
    found = ((re.fullmatch(r"images_(\d+)", path.name), path) for path in folder.glob("images_*") if path.is_dir())
    return {int(match[1]): path for match, path in found if match}


def _moved(capture: Capture, photographs: Path) -> Capture:
    return replace(capture, frames=tuple(_frame_in(frame, photographs, capture.folder) for frame in capture.frames))


def _frame_in(frame: Frame, photographs: Path, folder: Path) -> Frame:
    """The frame with its file in another folder; its name, by which splits know it, stays."""
    inside = frame.image.relative_to(folder) if frame.image.is_relative_to(folder) else Path(frame.image.name)
    below = Path(*inside.parts[1:]) if len(inside.parts) > 1 else inside
    return replace(frame, image=photographs / below)
