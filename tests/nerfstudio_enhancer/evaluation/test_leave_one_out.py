import json
from pathlib import Path

import pytest

from nerfstudio_enhancer.evaluation.leave_one_out import (
    LeaveOneOut,
    best_check,
    curves_table,
    leave_one_out,
    left_out,
    plan_folds,
    write_split,
)
from nerfstudio_enhancer.scene.capture import read_capture
from nerfstudio_enhancer.scene.splits import read_split_file


def figures(psnr):
    return {"psnr": psnr, "ssim": 0.5, "lpips": 0.4}


@pytest.mark.parametrize(
    ("references", "folds", "expected"),
    [(9, 1, [4]), (9, 3, [2, 4, 6]), (3, 1, [1]), (3, 3, [0, 1, 2]), (4, 9, [0, 1, 2, 3])],
)
def test_references_left_out_are_spread_evenly_inner_ones_first(references, folds, expected):
    assert left_out(references, folds) == expected


def test_two_references_are_too_few_to_leave_one_out():
    with pytest.raises(ValueError, match="at least 3, got 2"):
        left_out(2, 1)


@pytest.mark.parametrize("with_test_views", [False, True])
def test_no_training_sees_the_reference_left_out_or_a_test_view(nerfstudio_folder, tmp_path, with_test_views):
    data = nerfstudio_folder(num_images=12, width=64, height=48)
    settings = LeaveOneOut((data,), tmp_path, views=(4,), steps=(30, 60), folds=2, with_test_views=with_test_views)
    folds = plan_folds(settings)
    # 4 references out of 12: the rounded places 0, 4, 7, 11; test views: the 1st and the 8th + 1 of the other 8
    capture = read_capture(data)
    names = [frame.name for frame in capture.frames]
    assert [(fold.steps, names.index(fold.left_out)) for fold in folds] == [(30, 4), (30, 7), (60, 4), (60, 7)]
    for fold in folds:
        split = read_split_file(write_split(fold), capture)
        trained = {names[i] for i in split.reference}
        assert trained | {fold.left_out} == {names[i] for i in (0, 4, 7, 11)}
        assert fold.left_out not in trained
        measured = {names[i] for i in split.test}
        assert measured == {fold.left_out, *([names[1]] if with_test_views else [])}


def test_the_best_check_has_the_best_mean_over_the_references_left_out():
    def curve(*psnr):
        return [{"step": 10 * (i + 1), "left_out": figures(value)} for i, value in enumerate(psnr)]

    # means 15, 17, 16.5: the second, although the last is best for one of them
    assert best_check([curve(16.0, 17.0, 15.0), curve(14.0, 17.0, 18.0)]) == 1


def test_the_table_tells_test_views_apart_and_marks_the_choice():
    curve = [
        {"step": 10, "left_out": figures(16.0), "test": figures(14.0)},
        {"step": 20, "left_out": figures(15.0), "test": figures(15.0)},
    ]
    table = curves_table([{"scene": "garden", "views": 4, "steps": 20, "curve": curve}])
    rows = [line for line in table.splitlines() if line.startswith("| garden")]
    assert rows == [
        "| garden | 4 | 20 | 10 | 16.00 / 0.500 / 0.400 | 14.00 / 0.500 / 0.400 | best PSNR |",
        "| garden | 4 | 20 | 20 | 15.00 / 0.500 / 0.400 | 15.00 / 0.500 / 0.400 |  |",
    ]


@pytest.mark.slow
def test_a_training_is_measured_on_the_way_and_repeated_only_for_test_views(nerfstudio_folder, tmp_path):
    data = nerfstudio_folder(num_images=12, width=64, height=48)
    settings = LeaveOneOut((data,), tmp_path, views=(3,), steps=(6,), checks=2, folds=1, max_image_size=48)
    (entry,) = leave_one_out(settings).cells
    assert [check["step"] for check in entry["curve"]] == [3, 6]
    assert all(set(check) == {"step", "left_out"} for check in entry["curve"])
    assert all(5 < check["left_out"]["psnr"] < 60 for check in entry["curve"])
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == [entry]

    assert leave_one_out(settings).cells == [entry]
    other = {**entry, "scene": "another", "method": "of another command"}
    content = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**content, "cells": [other, entry]}))
    more = LeaveOneOut(**{**vars(settings), "with_test_views": True})
    kept, again = leave_one_out(more).cells
    assert kept == other
    assert set(again["curve"][0]) == {"step", "left_out", "test"}
    # the same training, whoever else is measured
    assert [check["left_out"] for check in again["curve"]] == [check["left_out"] for check in entry["curve"]]


def test_a_missing_scene_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no scene at"):
        plan_folds(LeaveOneOut((Path("nowhere"),), tmp_path))
    with pytest.raises(ValueError, match="told apart by folder name"):
        plan_folds(LeaveOneOut((tmp_path / "a" / "garden", tmp_path / "b" / "garden"), tmp_path))
