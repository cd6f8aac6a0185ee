"""Which photographs are reference views, which are test views, and which are kept out of everything."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nerfstudio_enhancer.scene.capture import Capture

MIN_REFERENCE_VIEWS = 2


@dataclass(frozen=True)
class ViewSplit:
    """Indices into the capture's frames; the three groups share none."""

    reference: tuple[int, ...]
    """Views to train on: all that a method may look at."""
    test: tuple[int, ...]
    """Views to measure on."""
    unused: tuple[int, ...]
    """Views that nothing looks at, save the benchmark's oracle."""


def split_views(
    capture: Capture, num_views: int | None, reference_views: Sequence[str] | None, test_every: int
) -> ViewSplit:
    """Split a capture by the rules of sparse-view papers.

    `num_views`: k references spread evenly over the capture order, at round(linspace(0, n - 1, k)) (halves to even);
    test views are every `test_every`-th of the rest, from its first on, all others are unused. `reference_views`: the
    same with references given by name. A capture that lists its own training and test photographs keeps its test
    views: k references are then spread over its training photographs. With neither argument every training
    photograph is a reference: the capture's own list, or all but every `test_every`-th photograph.

    Raises:
        ValueError: fewer than two references, more than there are photographs, or an unknown name.
    """
    if test_every < 1:
        raise ValueError(f"`test_every` must be at least 1, got {test_every}.")
    if num_views is not None and reference_views is not None:
        raise ValueError("Pass either `num_views` or `reference_views`, not both.")
    names = [frame.name for frame in capture.frames]
    listed_train, listed_test = _listed(capture, names)
    if reference_views is not None:
        reference = _indices(reference_views, names, "`reference_views`")
    elif num_views is not None:
        pool = list(range(len(names))) if listed_train is None else listed_train
        reference = _spread_evenly(pool, num_views)
    elif listed_train is not None:
        reference = listed_train
    else:
        reference = [index for index in range(len(names)) if index % test_every != 0]
    _require_two(reference, len(names))
    rest = [index for index in range(len(names)) if index not in set(reference)]
    sparse = num_views is not None or reference_views is not None
    if listed_test is not None:
        test = [index for index in listed_test if index in set(rest)]
    else:
        test = rest[::test_every] if sparse or listed_train is not None else rest
    unused = [index for index in rest if index not in set(test)]
    return ViewSplit(tuple(reference), tuple(test), tuple(unused))


def _spread_evenly(pool: list[int], num_views: int) -> list[int]:
    if num_views < MIN_REFERENCE_VIEWS or num_views > len(pool):
        raise ValueError(
            f"`num_views` must be at least {MIN_REFERENCE_VIEWS} reference views and at most the {len(pool)} "
            f"photographs there are to choose from, got {num_views}."
        )
    positions = np.round(np.linspace(0, len(pool) - 1, num_views)).astype(int)
    return [pool[position] for position in positions]


def _require_two(reference: list[int], num_frames: int) -> None:
    if len(reference) < MIN_REFERENCE_VIEWS:
        raise ValueError(
            f"At least {MIN_REFERENCE_VIEWS} reference views are needed, got {len(reference)} out of {num_frames} posed "
            f"photograph(s); pass `--num-views {max(num_frames, MIN_REFERENCE_VIEWS)}` to train on all of them, or add photographs."
        )


def _listed(capture: Capture, names: list[str]) -> tuple[list[int] | None, list[int] | None]:
    """The capture's own training and test photographs, where it lists them."""
    splits = capture.named_splits
    train = (
        _indices(splits["train"], names, "The capture's list of training photographs") if "train" in splits else None
    )
    held_out = splits.get("test") or splits.get("val")
    test = _indices(held_out, names, "The capture's list of test photographs") if held_out else None
    if train is None and test is not None:
        train = [index for index in range(len(names)) if index not in set(test)]
    return train, test


def _indices(wanted: Sequence[str], names: list[str], what: str) -> list[int]:
    """Positions of the wanted names in capture order; a name may be given without folder, or without suffix too."""
    return sorted({_index(name, names, what) for name in wanted})


def _index(wanted: str, names: list[str], what: str) -> int:
    path = Path(wanted)
    for matches in (
        [i for i, name in enumerate(names) if name == path.as_posix()],
        [i for i, name in enumerate(names) if Path(name).name == path.name],
        [i for i, name in enumerate(names) if Path(name).stem == path.name],
    ):
        if len(matches) == 1:
            return matches[0]
        if len(matches) > 1:
            raise ValueError(f"{what} name(s) {wanted!r}, which fits {[names[i] for i in matches]}; add the folder.")
    raise ValueError(f"{what} name(s) {wanted!r}, which is no posed photograph; there are {', '.join(names[:5])}, ...")
