import shutil
from dataclasses import replace

import pytest
import torch
from smooth_scenes import write_smooth_scene

from diffusion_prior.data.clips import ClipConfig, ClipDataset, find_gaps
from diffusion_prior.data.pairs import find_runs, read_run, write_run
from diffusion_prior.data.small_runs import small_run, small_runs


@pytest.fixture
def paired(tmp_path):
    for seed, scene in enumerate(("ale", "juice")):
        write_smooth_scene(tmp_path / "pairs", scene, seed, size=(32, 48))
    return tmp_path / "pairs"


def test_every_small_pixel_is_the_mean_of_those_that_it_stands_for(paired):
    run = read_run(find_runs(paired)[0])
    small = small_run(run, 12)
    assert small.render.shape == (4, 3, 8, 12)
    assert small.warped.shape == (4, 8, 8, 12)
    expected = run.target[2, 1, 8:12, 20:24].float().mean()
    assert abs(float(small.target[2, 1, 2, 5]) - float(expected)) <= 0.5 + 1e-4
    torch.testing.assert_close(small.intrinsics, run.intrinsics / 4)
    assert torch.equal(small.before, run.before)
    assert torch.equal(small.camera_to_world, run.camera_to_world)


def test_pictures_that_are_small_already_stay_as_they_are(paired):
    run = read_run(find_runs(paired)[0])
    assert torch.equal(small_run(run, 100).render, run.render)


def test_clips_are_drawn_from_small_copies_of_the_wanted_scenes(paired, tmp_path):
    small_runs(paired, tmp_path / "small", 12, ["juice"])
    assert [folder.parent.name for folder in find_runs(tmp_path / "small")] == ["juice"]
    config = ClipConfig(num_frames=4, batch_size=2, crop_px=None, size_multiple=1)
    batch = ClipDataset(find_gaps(tmp_path / "small"), config)[0]
    assert batch.rgb.shape == (2, 4, 3, 8, 12)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_copies_that_are_there_are_not_made_again(paired, tmp_path):
    small_runs(paired, tmp_path / "small", 12, ["ale"])
    first = times(tmp_path / "small")
    headers = small_runs(paired, tmp_path / "small", 12, ["ale", "juice"])
    assert [header.scene for header in headers] == ["ale", "juice"]
    assert first.items() <= times(tmp_path / "small").items()


def test_a_copy_of_what_has_changed_is_made_again_and_what_is_gone_is_not_drawn_from(paired, tmp_path):
    small = tmp_path / "small"
    small_runs(paired, small, 12, ["ale", "juice"])
    ale, juice = find_runs(paired)
    run = read_run(ale)
    write_run(ale, replace(run, target=255 - run.target))
    shutil.rmtree(juice)
    (header,) = small_runs(paired, small, 12, ["ale", "juice"])
    expected = small_run(read_run(ale), 12).target
    assert torch.equal(read_run(header.folder).target, expected)
    (smaller,) = small_runs(paired, small, 6, ["ale"])
    assert smaller.width == 6


def test_without_paired_data_there_is_nothing_to_copy(tmp_path):
    with pytest.raises(FileNotFoundError, match="no paired data below"):
        small_runs(tmp_path, tmp_path / "small", 12, ["ale"])
