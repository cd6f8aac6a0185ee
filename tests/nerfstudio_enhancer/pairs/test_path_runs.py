import math

import pytest
import torch
from scenes import tiny_scene, write_nerfstudio_folder
from torch.testing import assert_close

from diffusion_prior.data.clips import find_gaps
from diffusion_prior.data.pairs import read_run
from nerfstudio_enhancer.pairs.make_pairs import MakePairs, make_pairs, missing_kinds, plan_trainings
from nerfstudio_enhancer.pairs.path_runs import Damage, World, degrade

NONE = Damage(dropped=0.0, holes=0, hole_share=0.0, jitter=0.0, inflation=1.0, floaters=0.0)


def splats(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "means": torch.randn(count, 3, generator=generator),
        "scales": torch.full((count, 3), math.log(0.1)),
        "opacities": torch.zeros(count, 1),
    }


def damaged(count: int = 400, **changes) -> dict[str, torch.Tensor]:
    damage = Damage(**{**vars(NONE), **changes})
    return degrade(splats(count), torch.tensor([[0.0, 0.0, 9.0]]), torch.Generator().manual_seed(1), damage)


# ---------------------------------------------------------------------------------------------------- worlds


def test_a_pose_comes_back_from_another_world() -> None:
    turn = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    worlds = [
        World(torch.cat([turn[i], torch.tensor([[1.0], [2.0], [3.0 * i]], dtype=torch.float64)], dim=1), 0.5 + i)
        for i in range(2)
    ]
    poses = torch.eye(4, dtype=torch.float64)[None, :3] + torch.tensor([0, 0, 0, 0.3], dtype=torch.float64)
    assert_close(worlds[0].poses_from(worlds[1], worlds[1].poses_from(worlds[0], poses)), poses)


def test_a_pose_by_hand() -> None:
    # From x -> 2 x to x -> 3 (x + (1, 0, 0)): the place (4, 0, 0) was (2, 0, 0), and is 3 (3, 0, 0); it looks the same way.
    identity = torch.eye(4, dtype=torch.float64)[:3]
    shifted = identity.clone()
    shifted[0, 3] = 1
    pose = identity.clone()[None]
    pose[0, 0, 3] = 4
    expected = identity.clone()[None]
    expected[0, 0, 3] = 9
    assert_close(World(shifted, 3.0).poses_from(World(identity, 2.0), pose), expected)


# ---------------------------------------------------------------------------------------------------- damage


def test_no_damage_changes_nothing() -> None:
    for name, value in damaged().items():
        assert torch.equal(value, splats(400)[name])


def test_a_share_is_dropped() -> None:
    assert len(damaged(2000, dropped=0.5)["means"]) == pytest.approx(1000, abs=100)


def test_holes_take_splats_that_lie_together() -> None:
    left = damaged(1000, holes=1, hole_share=0.2)["means"]
    everything = splats(1000)["means"]
    lost = everything[(everything[:, None] != left[None]).any(-1).all(1)]
    assert len(lost) == pytest.approx(180, abs=20)
    assert lost.std(0).mean() < 0.7 * everything.std(0).mean()


def test_splats_shift_by_multiples_of_their_size() -> None:
    shift = damaged(2000, jitter=2.0)["means"] - splats(2000)["means"]
    assert float(shift.std()) == pytest.approx(0.2, rel=0.05)


def test_half_of_the_splats_grow_by_no_more_than_the_factor() -> None:
    growth = (damaged(2000, inflation=3.0)["scales"] - splats(2000)["scales"]).exp()[:, 0]
    assert float((growth > 1).float().mean()) == pytest.approx(0.5, abs=0.05)
    assert float(growth.min()) >= 1.0
    assert 2.8 < float(growth.max()) <= 3.0001


def test_floaters_hang_between_splats_and_camera() -> None:
    made = damaged(1000, floaters=0.1)
    assert len(made["means"]) == len(made["opacities"]) == 1100
    heights = made["means"][1000:, 2]
    assert (heights > made["means"][:1000, 2].min() + 0.3).all()  # at least 35 % of the way to z = 9
    assert float(heights.mean()) > 4


def test_something_is_always_left() -> None:
    assert len(damaged(5, dropped=1.0)["means"]) == 1


def test_damage_is_drawn_by_the_generator_alone() -> None:
    first, second, other = (Damage.drawn(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert first == second != other


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_path_runs_are_made_beside_the_photographs_and_read_as_clips(tmp_path) -> None:
    write_nerfstudio_folder(tmp_path / "tiny", tiny_scene(num_images=9, width=64, height=48))
    settings = MakePairs(
        tmp_path / "pairs", (tmp_path / "tiny",), views=(3,), steps=(4,), size=64, paths=True, whole_steps=5, jobs=1
    )
    (training,) = plan_trainings(settings)
    assert missing_kinds(training, 4) == ["photographs", "paths", "degraded"]
    make_pairs(settings)
    assert missing_kinds(training, 4) == []
    folder = tmp_path / "pairs" / "tiny"
    runs = {kind: read_run(folder / f"k03_s0_n4_{kind}") for kind in ("paths", "degraded")}
    assert torch.equal(runs["paths"].target, runs["degraded"].target)
    assert not torch.equal(runs["paths"].render, runs["degraded"].render)
    assert (runs["paths"].before != runs["paths"].after).any()
    assert (runs["paths"].before == runs["paths"].after).any()  # the loops around each reference
    # splats of 5 steps on every photograph show much the same as those of 4 steps on three: the worlds fit together
    for run in runs.values():
        assert (run.render.float() - run.target.float()).abs().mean() < 40
    kinds = {gap.header.settings.get("kind") for gap in find_gaps(tmp_path / "pairs")}
    assert kinds == {None, "paths", "degraded"}
    make_pairs(MakePairs(tmp_path / "pairs", verify=True))
