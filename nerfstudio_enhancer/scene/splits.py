"""Which photographs are reference views, which are test views, and which are kept out of everything."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from nerfstudio_enhancer.scene.capture import Capture

MIN_REFERENCE_VIEWS = 2
NAMED_REFERENCES = "`reference_views`"

SplitRule = Literal["references-first", "test-first"]
"""references-first: k references spread evenly over the capture, test views are every 8th of the rest (3DGS-Enhancer,
section 5.1, for DL3DV and Mip-NeRF 360). test-first: test views are every 8th photograph from the first on (Mip-NeRF 360,
Barron et al. 2022, and on it ReconFusion, Wu et al. 2024), k references are spread evenly over the others."""


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
    capture: Capture,
    num_views: int | None,
    reference_views: Sequence[str] | None,
    test_every: int,
    rule: SplitRule = "references-first",
    split_file: Path | None = None,
) -> ViewSplit:
    """Split a capture by the rules of sparse-view papers.

    `num_views`: k references spread evenly over the capture order, at round(linspace(0, n - 1, k)) (halves to even);
    test views are every `test_every`-th of the rest, from its first on, all others are unused. `reference_views`: the
    same with references given by name. A capture that lists its own training and test photographs keeps its test
    views, unless `test_every` is 1, which takes all the rest: k references are then spread over its training
    photographs. With neither argument every training photograph is a reference: the capture's own list, or all but
    every `test_every`-th photograph.

    `rule` says which of the two groups is chosen first; with "test-first" the capture's own lists do not count where there
    are `num_views` or `reference_views`. `split_file` names both groups, see `read_split_file`.

    Raises:
        ValueError: fewer than two references, more than there are photographs, or an unknown name.
    """
    if split_file is not None:
        if num_views is not None or reference_views is not None:
            raise ValueError(
                "A `split_file` names the references itself: pass neither `num_views` nor `reference_views`."
            )
        return read_split_file(split_file, capture)
    if num_views is not None and reference_views is not None:
        raise ValueError("Pass either `num_views` or `reference_views`, not both.")
    names = [frame.name for frame in capture.frames]
    sparse = num_views is not None or reference_views is not None
    if rule == "test-first" and sparse:
        return _test_first(names, num_views, reference_views, test_every)
    if test_every < 1:
        raise ValueError(f"`test_every` must be at least 1, got {test_every}.")
    listed_train, listed_test = _listed(capture, names)
    if reference_views is not None:
        reference = _indices(reference_views, names, NAMED_REFERENCES)
    elif num_views is not None:
        pool = list(range(len(names))) if listed_train is None else listed_train
        reference = _spread_evenly(pool, num_views)
    elif listed_train is not None:
        reference = listed_train
    else:
        reference = [index for index in range(len(names)) if index % test_every != 0]
    _require_two(reference, len(names))
    rest = [index for index in range(len(names)) if index not in set(reference)]
    if listed_test is not None and not (sparse and test_every == 1):
        test = [index for index in listed_test if index in set(rest)]
    else:
        test = rest[::test_every] if sparse or listed_train is not None else rest
    unused = [index for index in rest if index not in set(test)]
    return ViewSplit(tuple(reference), tuple(test), tuple(unused))


def read_split_file(path: Path, capture: Capture) -> ViewSplit:
    """Groups from a JSON file; photographs that it does not list are unused.

    `{"train_ids": [...], "test_ids": [...]}`, positions in the sorted file names: the `train_test_split_K.json` that
    ReconFusion publishes for K = 3, 6, 9 views of each scene of Mip-NeRF 360 (https://reconfusion.github.io). Or
    `{"train": [...], "test": [...]}`, names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such JSON, names photographs that are not there, or one in both groups.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The split file {path} does not exist.")
    try:
        entries = json.loads(path.read_text(encoding="utf-8-sig"))
        train, test = (_members(entries, group, capture) for group in ("train", "test"))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'The split file {path} must hold {{"train_ids": [...], "test_ids": [...]}} or {{"train": [...], "test": '
            f"[...]}}; it cannot be read so ({type(error).__name__}: {error})."
        ) from error
    names = [frame.name for frame in capture.frames]
    if both := sorted(set(train) & set(test)):
        raise ValueError(f"The split file {path} lists {names[both[0]]} both for training and for testing.")
    _require_two(train, len(names))
    unused = set(range(len(names))) - set(train) - set(test)
    return ViewSplit(tuple(train), tuple(test), tuple(sorted(unused)))


def _members(entries: dict[str, Any], group: str, capture: Capture) -> list[int]:
    """Indices into the capture's frames of one group of a split file."""
    names = [frame.name for frame in capture.frames]
    if group in entries:
        return _indices(entries[group], names, f"The split file's `{group}`")
    by_name = sorted(range(len(names)), key=names.__getitem__)  # plain order of the names, as the lists were made
    members = []
    for position in entries[f"{group}_ids"]:
        if not 0 <= position < len(names):
            raise ValueError(
                f"The split file's `{group}_ids` holds {position}, but there are {len(names)} photographs; it is of "
                "another scene, or photographs are missing."
            )
        members.append(by_name[position])
    return sorted(members)


def _test_first(
    names: list[str], num_views: int | None, reference_views: Sequence[str] | None, test_every: int
) -> ViewSplit:
    if test_every < 2:
        raise ValueError(f"`test_every` must be at least 2 where test views are chosen first, got {test_every}.")
    test = list(range(0, len(names), test_every))
    pool = [index for index in range(len(names)) if index % test_every]
    if num_views is not None:
        reference = _spread_evenly(pool, num_views)
    else:
        reference = _indices(reference_views or (), names, NAMED_REFERENCES)
        if held_out := [names[index] for index in reference if index not in pool]:
            raise ValueError(
                f"Where test views are chosen first, `reference_views` must not be among them, every {test_every}th photograph "
                f"from the first on; got {', '.join(held_out)}. Name others, or leave out `--split-rule test-first`."
            )
        _require_two(reference, len(names))
    unused = [index for index in pool if index not in set(reference)]
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
        all_of_them = (
            f" Every eighth or so is held out to test on: end the command with `sparse-views --num-views {num_frames}` to train on "
            "all of them, or add photographs."
        )
        raise ValueError(
            f"At least {MIN_REFERENCE_VIEWS} reference views are needed, got {len(reference)} out of {num_frames} posed "
            f"photograph(s).{all_of_them if num_frames >= MIN_REFERENCE_VIEWS else ' Add photographs.'}"
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
