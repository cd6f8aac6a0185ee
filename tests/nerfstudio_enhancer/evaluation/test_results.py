import json

import pytest

from nerfstudio_enhancer.evaluation.results import Results, load_results, save_results

ENTRY = {"scene": "garden", "views": 3, "seed": 0, "method": "geometry", "psnr": 20.0}


def test_results_come_back_as_they_were_saved(tmp_path):
    results = Results({"preset": "quick"}, failures=[{"cell": "a", "error": "b"}])
    results.add(ENTRY)
    save_results(results, tmp_path / "new/folder")
    again = load_results(tmp_path / "new/folder", {"preset": "quick"})
    assert again.cells == [ENTRY]
    assert again.has(("garden", 3, 0, "geometry"))
    assert not again.has(("garden", 3, 1, "geometry"))


def test_a_cell_done_again_replaces_the_older_one():
    results = Results({})
    results.add(ENTRY)
    results.add({**ENTRY, "psnr": 21.0})
    assert [entry["psnr"] for entry in results.cells] == [21.0]


def test_a_failed_save_leaves_the_older_file_whole(tmp_path):
    save_results(Results({"preset": "quick"}, [ENTRY]), tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_results(Results({"preset": "quick"}, [{**ENTRY, "psnr": object()}]), tmp_path)
    assert load_results(tmp_path, {"preset": "quick"}).cells == [ENTRY]


def test_results_of_other_settings_are_not_mixed(tmp_path):
    save_results(Results({"preset": "quick", "steps": 1500}), tmp_path)
    with pytest.raises(ValueError, match="steps = 1500 there and 3000 now"):
        load_results(tmp_path, {"preset": "quick", "steps": 3000})


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"settings": {}, "cells": [{"scene": "garden"}]})])
def test_a_foreign_results_file_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match="is no results file of the benchmark"):
        load_results(tmp_path, {})
