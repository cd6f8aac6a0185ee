"""The folders of several scenes that one command works on."""

import os
from collections.abc import Sequence
from pathlib import Path


def scene_folders(data: Sequence[Path]) -> tuple[Path, ...]:
    """Folders of scenes as absolute paths, so that each has a name, which `.` has not, and one spelling.

    Raises:
        ValueError: for no scene, or scenes of the same name.
        FileNotFoundError: if one is missing.
    """
    folders = tuple(Path(os.path.abspath(folder)) for folder in data)
    names = [folder.name for folder in folders]
    if not names:
        raise ValueError("`--data` takes at least one scene, got none: give `--data SCENE...`.")
    if len(set(names)) != len(names):
        raise ValueError(f"scenes are told apart by folder name, got {sorted(names)}; rename those that are alike.")
    for folder in folders:
        if not folder.exists():
            raise FileNotFoundError(f"there is no scene at {folder}.")
    return folders
