"""Fixtures that several tests share: a tiny ray-traced scene as the folders users have."""

from collections.abc import Callable
from pathlib import Path

import pytest
from scenes import TinyScene, tiny_scene, write_colmap_folder, write_nerfstudio_folder


@pytest.fixture
def scene() -> TinyScene:
    """Ten photographs of 64 x 48 pixels."""
    return tiny_scene()


@pytest.fixture
def nerfstudio_folder(tmp_path: Path) -> Callable[..., Path]:
    """`nerfstudio_folder(num_images=10, width=64, height=48, mode="RGB", masks=False, ...)` writes a nerfstudio-data folder.

    `mode` is RGB, RGBA or L; further arguments are those of `scenes.write_nerfstudio_folder`.
    """

    def write(num_images: int = 10, width: int = 64, height: int = 48, name: str = "nerfstudio", **kwargs) -> Path:
        return write_nerfstudio_folder(tmp_path / name, tiny_scene(num_images, width, height), **kwargs)

    return write


@pytest.fixture
def colmap_folder(tmp_path: Path) -> Callable[..., Path]:
    """`colmap_folder(num_images=10, width=64, height=48, binary=True, model="sparse/0")` writes a COLMAP folder."""

    def write(num_images: int = 10, width: int = 64, height: int = 48, name: str = "colmap", **kwargs) -> Path:
        return write_colmap_folder(tmp_path / name, tiny_scene(num_images, width, height), **kwargs)

    return write
