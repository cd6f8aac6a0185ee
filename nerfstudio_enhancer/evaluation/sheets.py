"""Side-by-side pictures of the benchmark: the photograph beside what each method shows at the same test view."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusion_prior.files import whole_file

ROWS = 4
"""Test views on a sheet, evenly spread."""
LABEL_HEIGHT_PX = 18


def write_comparison(renders: Mapping[str, Path], path: Path) -> None:
    """Write one picture: a row for each of some test views, the photograph first, then one column for each method.

    Args:
        renders: for each method, the folder with nerfstudio's evaluation pictures (photograph and render side by side).
        path: the PNG to write.

    Raises:
        FileNotFoundError: if a folder holds no evaluation picture.
    """
    names = _shown(next(iter(renders.values())))
    columns = ["photograph", *renders]
    rows = []
    for name in names:
        halves = {method: _halves(folder / name) for method, folder in renders.items()}
        photograph = next(iter(halves.values()))[0]
        rows.append([photograph, *(render for _, render in halves.values())])
    width = max(picture.width for row in rows for picture in row)
    heights = [max(picture.height for picture in row) for row in rows]
    sheet = Image.new("RGB", (width * len(columns), LABEL_HEIGHT_PX + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        draw.text((column * width + 4, 3), label, fill="black", font=ImageFont.load_default())
    top = LABEL_HEIGHT_PX
    for row, height in zip(rows, heights):
        for column, picture in enumerate(row):
            sheet.paste(picture, (column * width, top))
        top += height
    with whole_file(path) as partial:
        sheet.save(partial, format="PNG")


def _shown(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.glob("*_img_*.png"))
    if not names:
        raise FileNotFoundError(f"{folder} holds no evaluation picture `eval_img_NNNN.png`.")
    count = min(ROWS, len(names))
    last = max(1, count - 1)
    return [names[round(i * (len(names) - 1) / last)] for i in range(count)]


def _halves(path: Path) -> tuple[Image.Image, Image.Image]:
    """Nerfstudio writes photograph and render into one picture, left and right."""
    with Image.open(path) as picture:
        both = picture.convert("RGB")
    middle = both.width // 2
    return both.crop((0, 0, middle, both.height)), both.crop((middle, 0, both.width, both.height))
