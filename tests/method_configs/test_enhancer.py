"""What nerfstudio knows of our methods, and how they differ."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from nerfstudio.configs.method_configs import all_descriptions, all_methods

from diffusion_prior.checkpoints import BUNDLED
from method_configs.enhancer import enhancer_method, enhancer_svd_method
from nerfstudio_enhancer.trajectory import plan_trajectories

SVD = "3dgs-enhancer-svd"


def is_settings(value) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def flat(settings, prefix: str = "") -> dict[str, object]:
    """Every setting by its dotted name."""
    found = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        name = prefix + field.name
        found |= flat(value, f"{name}.") if is_settings(value) else {name: value}
    return found


def ring(views: int) -> torch.Tensor:
    """OpenGL cameras on a circle around the origin, looking at it [k 3 4]."""
    poses = []
    for angle in torch.arange(views) * 2 * math.pi / views:
        back = torch.tensor([math.cos(angle), math.sin(angle), 0.0])
        up = torch.tensor([0.0, 0.0, 1.0])
        poses.append(torch.stack([torch.linalg.cross(up, back), up, back, 3 * back], dim=1))
    return torch.stack(poses)


def test_nerfstudio_knows_both_methods():
    assert all_methods["3dgs-enhancer"].method_name == "3dgs-enhancer"
    assert all_methods[SVD].method_name == SVD
    assert "Stable Video Diffusion" in all_descriptions[SVD]


def test_the_full_size_method_is_the_other_but_for_its_prior_its_rounds_and_the_length_of_its_paths():
    small, large = flat(enhancer_method.config), flat(enhancer_svd_method.config)
    assert small.keys() == large.keys()
    enhance = "pipeline.model.enhance"
    assert {name: large[name] for name in small if small[name] != large[name]} == {
        "method_name": SVD,
        f"{enhance}.prior": "stabilityai/stable-video-diffusion-img2vid-xt",
        f"{enhance}.rounds": 2,
        f"{enhance}.whole_paths": True,
        f"{enhance}.repair_share": 0.0,
        # 25 frames of a clip, of which two are references
        f"{enhance}.trajectory.min_frames": 23,
        f"{enhance}.trajectory.max_frames": 23,
        # 12 paths of 23
        f"{enhance}.trajectory.max_total_frames": 276,
    }


@pytest.mark.parametrize("method", [enhancer_method, enhancer_svd_method])
def test_the_splats_train_on_after_every_round_at_least_as_long_as_between_two(method):
    model = copy.deepcopy(method.config.pipeline.model)
    steps = method.config.schedule_iterations
    model.fit_to(steps)
    rounds = model.enhance
    last = rounds.start + (rounds.rounds - 1) * rounds.every
    assert rounds.start > 0
    assert last + rounds.every <= steps


@pytest.mark.parametrize(("references", "paths"), [(3, 3), (12, 12)])
def test_every_path_at_full_size_is_one_clip_of_25_frames(references, paths):
    config = enhancer_svd_method.config.pipeline.model.enhance.trajectory
    planned = plan_trajectories(ring(references), config, torch.Generator())
    assert [len(path.camera_to_world) for path in planned] == [25] * paths


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has time for longer paths")
@pytest.mark.parametrize(("references", "paths"), [(3, 3), (6, 6), (9, 9), (20, 20), (40, 20)])
def test_every_path_on_a_cpu_is_one_window_of_the_bundled_prior(references, paths):
    window = json.loads((BUNDLED / "prior_config.json").read_text())["num_frames"]
    config = enhancer_method.config.pipeline.model.enhance.trajectory
    planned = plan_trajectories(ring(references), config, torch.Generator())
    lengths = [len(path.camera_to_world) for path in planned]
    assert len(lengths) == paths
    assert max(lengths) <= window
    assert max(lengths) == window or references > 3


def test_more_references_than_fit_leave_whole_clips():
    config = enhancer_svd_method.config.pipeline.model.enhance.trajectory
    planned = plan_trajectories(ring(20), config, torch.Generator())
    assert [len(path.camera_to_world) for path in planned] == [25] * 12
