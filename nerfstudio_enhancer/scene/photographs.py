"""From a frame's word to a checked file: the photograph exists, can be read, and fits its intrinsics and mask."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from nerfstudio_enhancer.scene.capture import Frame

MAX_AUTO_RESOLUTION_PX = 1600
"""As in nerfstudio: longer photographs are read from the folder's downscaled copies (`images_2`, ...), if there are any."""
SUPPORTED_MODES = {"L": "grey", "RGB": "colour", "RGBA": "colour with alpha"}
MASK_MODES = ("1", "L", "I", "I;16")
PROBE_SIZE_PX = (64, 64)
OPAQUE = 128


def checked_photographs(
    frames: Sequence[Frame], folder: Path, needs_pixels: bool, as_named: bool = False
) -> list[Frame]:
    """Frames whose files and intrinsics belong together: `image` and `mask` exist, can be decoded and have one size.

    The intrinsics are rescaled where the file is a smaller or larger copy of the picture they were written for.

    Args:
        frames: frames of one split; no other photograph is opened.
        folder: folder of the capture, where `images_N` and `masks_N` may hold downscaled copies.
        needs_pixels: whether a mask that keeps no pixel is an error (true for training).
        as_named: read the very files, however large, since the user has named their folder; otherwise smaller copies of large ones.

    Raises:
        FileNotFoundError: a photograph or mask is missing.
        ValueError: it cannot be read, has an unknown pixel format, or its size contradicts the intrinsics.
    """
    _require_files([frame for frame in frames if not (frame.image.exists() if as_named else _available(frame, folder))])
    with ThreadPoolExecutor(max_workers=2) as executor:
        return list(executor.map(lambda frame: _checked(frame, folder, needs_pixels, as_named), frames))


def read_rgb_and_usable(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of a checked photograph, uint8 [h, w, 3], and which of them may be used, bool [h, w] (mask and alpha)."""
    with Image.open(frame.image) as image:
        pixels = np.array(image.convert("RGBA" if image.mode == "RGBA" else "RGB"))
    usable = pixels[..., 3] >= OPAQUE if pixels.shape[-1] == 4 else np.ones(pixels.shape[:2], dtype=bool)
    if frame.mask is not None:
        with Image.open(frame.mask) as mask:
            usable &= np.array(mask).astype(bool)
    return np.ascontiguousarray(pixels[..., :3]), usable


def _available(frame: Frame, folder: Path) -> bool:
    return frame.image.exists() or _smaller_copy(frame.image, frame.name, folder, "images", 2) is not None


def _require_files(missing: list[Frame]) -> None:
    if missing:
        named = ", ".join(str(frame.image) for frame in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FileNotFoundError(
            f"{len(missing)} posed photograph(s) do not exist: {named}. Put them there, or remove them from the capture."
        )


def _checked(frame: Frame, folder: Path, needs_pixels: bool, as_named: bool) -> Frame:
    longest_px = max(frame.width, frame.height)
    image = frame.image if as_named else _file_to_read(frame.image, frame.name, folder, longest_px)
    frame = _fit_intrinsics(frame, image, *_probe(image))
    if frame.mask is not None:
        frame = replace(frame, mask=_checked_mask(frame, folder, needs_pixels))
    if needs_pixels and _may_be_transparent(image) and not read_rgb_and_usable(frame)[1].any():
        raise ValueError(
            f"The photograph {image} is transparent{' or masked' if frame.mask is not None else ''} everywhere, so that "
            "nothing could be learnt from this reference view. Correct its transparency or choose another view."
        )
    return frame


def _may_be_transparent(image: Path) -> bool:
    with Image.open(image) as file:
        return file.mode == "RGBA"


def _file_to_read(image: Path, name: str, folder: Path, long_side_px: int) -> Path:
    """The photograph itself or, where it is large or missing, a downscaled copy (nerfstudio's rule)."""
    factor, chosen = 1, image if image.exists() else None
    while chosen is None or long_side_px / factor > MAX_AUTO_RESOLUTION_PX:
        copy = _smaller_copy(image, name, folder, "images", 2 * factor)
        if copy is None:
            break
        factor, chosen = 2 * factor, copy
    return chosen or image


def _smaller_copy(image: Path, name: str, folder: Path, prefix: str, factor: int) -> Path | None:
    """The copy of a file in `images_FACTOR` (or the next smaller one, if the file itself is missing)."""
    while factor <= 16:
        for copy in (folder / f"{prefix}_{factor}" / Path(name).name, folder / f"{prefix}_{factor}" / name):
            if copy.exists():
                return copy
        if image.exists():
            return None
        factor *= 2
    return None


def _probe(image: Path) -> tuple[int, int]:
    """Width and height of a photograph that can be decoded to the end and has a pixel format nerfstudio reads rightly."""
    try:
        with Image.open(image) as file:
            size, mode = file.size, file.mode
            file.draft("L", PROBE_SIZE_PX)  # a JPEG is decoded at an eighth: quick, yet it finds a truncated file
            file.load()
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, ... depending on the format
        raise ValueError(
            f"The photograph {image} cannot be read ({error}); replace the file or remove it from the capture."
        ) from error
    if mode not in SUPPORTED_MODES:
        raise ValueError(
            f"The photograph {image} has the pixel format {mode}; supported are 8-bit {', '.join(SUPPORTED_MODES)}. "
            f"Convert it, for example by `magick {image.name} -colorspace sRGB -depth 8 {image.stem}.png`."
        )
    return size


def _fit_intrinsics(frame: Frame, image: Path, width: int, height: int) -> Frame:
    """Intrinsics for the size of the file, which must be a scaled copy of the stated size up to rounding."""
    scale_x, scale_y = width / frame.width, height / frame.height
    fits = abs(frame.width * scale_y - width) <= 1 or abs(frame.height * scale_x - height) <= 1
    if not fits:
        turned = (
            " The sides look swapped: turn the pixels as the EXIF orientation says."
            if ((width > height) != (frame.width > frame.height))
            else ""
        )
        raise ValueError(
            f"The photograph {image} has {width}x{height} pixels, its intrinsics are for {frame.width}x{frame.height} "
            f"(w x h), which has another shape.{turned} Correct the intrinsics, or pose the photographs again."
        )
    return replace(
        frame,
        image=image,
        width=width,
        height=height,
        fx=frame.fx * scale_x,
        fy=frame.fy * scale_y,
        cx=frame.cx * scale_x,
        cy=frame.cy * scale_y,
    )


def _checked_mask(frame: Frame, folder: Path, needs_pixels: bool) -> Path:
    """The mask file, of the photograph's size and with one channel."""
    assert frame.mask is not None
    for mask in _mask_candidates(frame.mask, folder):
        if not mask.exists():
            continue
        try:
            with Image.open(mask) as file:
                size, mode, pixels = file.size, file.mode, np.array(file)
        except Exception as error:  # see _probe
            raise ValueError(f"The mask {mask} cannot be read ({error}); replace it or remove it.") from error
        if size != (frame.width, frame.height):
            continue
        if mode not in MASK_MODES:
            raise ValueError(f"The mask {mask} has the pixel format {mode}; a mask has one channel (white = use).")
        if needs_pixels and not pixels.any():
            raise ValueError(
                f"The mask {mask} keeps no pixel of {frame.name}, so that nothing could be learnt from this reference "
                "view; in a mask white means use and black means ignore. Correct the mask or choose another view."
            )
        return mask
    if not frame.mask.exists():
        raise FileNotFoundError(f"The mask {frame.mask} of {frame.name} does not exist.")
    raise ValueError(
        f"The mask {frame.mask} has another size than its photograph {frame.image}, which has "
        f"{frame.width}x{frame.height} pixels (w x h). Photographs of a folder such as images_2 need masks of their size in "
        "masks_2; `sparse-views --image-folder images` reads the whole ones."
    )


def _mask_candidates(mask: Path, folder: Path) -> list[Path]:
    """The mask itself, then its downscaled copies, in the same sub-folders or in none."""
    masks = folder / "masks"
    nested = [mask.relative_to(masks)] if mask.is_relative_to(masks) else []
    places = [*nested, Path(mask.name)]
    return [mask, *(folder / f"masks_{factor}" / place for place in places for factor in (2, 4, 8, 16))]
