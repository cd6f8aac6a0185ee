import json
from dataclasses import replace
from pathlib import Path

import pytest

from nerfstudio_enhancer.pairs import make_pairs as make_pairs_module
from nerfstudio_enhancer.pairs.make_pairs import MakePairs, make_pairs, missing_steps, plan_trainings


@pytest.fixture
def scenes(tmp_path):
    """Three scenes of 20, 20 and 5 images, which are never opened."""
    pose = [[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    folders = []
    for name, count in (("garden", 20), ("plush", 20), ("coin", 5)):
        folder = tmp_path / name
        folder.mkdir()
        frames = [{"file_path": f"images/{i:03d}.png", "transform_matrix": pose} for i in range(count)]
        intrinsics = {"w": 32, "h": 24, "fl_x": 30.0, "fl_y": 30.0, "cx": 16.0, "cy": 12.0}
        (folder / "transforms.json").write_text(json.dumps({**intrinsics, "frames": frames}))
        folders.append(folder)
    return tuple(folders)


def test_every_scene_comes_once_before_any_comes_twice(scenes):
    plan = plan_trainings(MakePairs(Path("out"), scenes, views=(3,), seeds=(0, 1)))
    assert sorted(training.scene for training in plan[:3]) == ["coin", "garden", "plush"]
    assert sorted(training.scene for training in plan[3:]) == ["coin", "garden", "plush"]


def test_the_order_depends_on_the_settings_alone(scenes):
    command = MakePairs(Path("out"), scenes, views=(3, 4, 6), seeds=(0, 1))
    assert plan_trainings(command) == plan_trainings(command)


def test_a_scene_takes_part_where_a_frame_is_left_between_neighbours(scenes):
    plan = plan_trainings(MakePairs(Path("out"), scenes, views=(3, 4, 10, 11)))
    # 20 images: 2 * 10 - 1 = 19 fit, 2 * 11 - 1 = 21 do not; 5 images: 2 * 3 - 1 = 5 fit
    assert sorted((training.scene, training.num_views) for training in plan) == [
        ("coin", 3),
        ("garden", 3),
        ("garden", 4),
        ("garden", 10),
        ("plush", 3),
        ("plush", 4),
        ("plush", 10),
    ]


def test_shares_of_plain_trainings_and_random_points_are_drawn_by_seed(scenes):
    plan = plan_trainings(MakePairs(Path("out"), scenes, views=(3,), seeds=tuple(range(100))))
    plain = sum(not training.additions for training in plan)
    random = sum(training.random_points for training in plan)
    # 300 draws: 0.25 and 0.15 with standard deviations of 0.025 and 0.021
    assert 0.15 < plain / 300 < 0.35
    assert 0.07 < random / 300 < 0.23


def test_a_training_stores_a_run_at_every_number_of_steps_up_to_the_one_drawn(scenes):
    plan = plan_trainings(MakePairs(Path("out"), scenes, views=(3,), seeds=tuple(range(30)), steps=(600, 300, 1200)))
    assert {training.steps for training in plan} == {(300,), (300, 600), (300, 600, 1200)}


def test_only_missing_runs_are_made(scenes, tmp_path):
    (training,) = plan_trainings(MakePairs(tmp_path / "out", scenes[:1], views=(3,)))
    training = replace(training, steps=(300, 700))
    assert missing_steps(training) == [300, 700]
    done = tmp_path / "out/garden/k03_s0_n300"
    done.mkdir(parents=True)
    (done / "meta.json").write_text("{}")
    assert missing_steps(training) == [700]


def test_no_training_starts_after_the_time_limit(scenes, tmp_path, capsys):
    make_pairs(MakePairs(tmp_path / "out", scenes, views=(3,), minutes=0.0))
    assert "0 runs stored" in capsys.readouterr().out


def test_failed_trainings_are_reported_after_the_others(scenes, tmp_path, monkeypatch):
    def run(jobs, *_):
        for job in jobs:
            broken = "coin" in job.key
            yield make_pairs_module.JobResult(job.key, None if broken else 2, "no image" if broken else None)

    monkeypatch.setattr(make_pairs_module, "run_jobs", run)
    with pytest.raises(RuntimeError, match="1 of 3 trainings failed; the first: coin k=3 seed=0: no image"):
        make_pairs(MakePairs(tmp_path / "out", scenes, views=(3,)))


def test_bad_commands_are_refused(scenes, tmp_path):
    with pytest.raises(ValueError, match="at least one scene"):
        make_pairs(MakePairs(tmp_path / "out"))
    with pytest.raises(ValueError, match="told apart by folder name"):
        make_pairs(MakePairs(tmp_path / "out", (scenes[0], scenes[0])))
    with pytest.raises(ValueError, match="no scene has enough images"):
        make_pairs(MakePairs(tmp_path / "out", scenes, views=(50,)))
    with pytest.raises(ValueError, match=r"at least 1, got \(0,\)"):
        make_pairs(MakePairs(tmp_path / "out", scenes, steps=(0,)))
    with pytest.raises(FileNotFoundError, match="there is no scene at"):
        make_pairs(MakePairs(tmp_path / "out", (tmp_path / "nowhere",)))
    with pytest.raises(FileNotFoundError, match="no paired data below"):
        make_pairs(MakePairs(tmp_path / "out", verify=True))
