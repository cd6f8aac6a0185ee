"""What the prior is shown of a single render, and what becomes of its answer."""

from types import SimpleNamespace

import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from walls import DISTANCE, SIZE, cameras, wall

from diffusion_prior.types import EnhancedClip
from nerfstudio_enhancer import render_repair, warping
from nerfstudio_enhancer.enhance_step import EnhanceConfig, References
from nerfstudio_enhancer.names import REPAIRED
from nerfstudio_enhancer.render_repair import RenderRepair, RepairableOutputs
from nerfstudio_enhancer.rendering import RenderedClip


class Brightening:
    """A prior that adds 0.2 everywhere and remembers what it was shown."""

    def __init__(self):
        self.clips = []

    def enhance(self, clip, generator):
        self.clips.append(clip)
        return EnhancedClip(rgb=clip.rgb + 0.2)


def grey_splats(monkeypatch) -> list[Cameras]:
    """Splats that show the wall in grey; the cameras that were rendered are kept."""
    rendered = []

    def render_clip(model, cameras):
        rendered.append(cameras)
        shape = (cameras.shape[0], int(cameras.height[0]), int(cameras.width[0]))
        return RenderedClip(
            rgb=torch.full((*shape, 3), 0.5),
            alpha=torch.ones(*shape, 1),
            depth=torch.full((*shape, 1), DISTANCE),
            scale_map=torch.ones(*shape, 3),
        )

    monkeypatch.setattr(render_repair, "render_clip", render_clip)
    monkeypatch.setattr(warping, "render_clip", render_clip)
    return rendered


def splats(step: int = 0) -> SimpleNamespace:
    return SimpleNamespace(learnt_cameras=lambda cameras: cameras, device="cpu", seed=0, step=step)


def references(*x: float) -> References:
    return References(list(wall(*x).photographs), cameras(*x))


def test_a_render_is_shown_between_its_two_nearest_references_and_takes_a_share_of_the_answer(monkeypatch):
    grey_splats(monkeypatch)
    prior, given = Brightening(), references(0.0, 1.0, 5.0)
    repaired = RenderRepair(EnhanceConfig(repair_share=0.25), lambda: given, prior)(splats(), cameras(0.9))
    torch.testing.assert_close(repaired, torch.full((SIZE, SIZE, 3), 0.5 + 0.25 * 0.2))
    (clip,) = prior.clips
    nearest, second = (given.photographs[index].permute(2, 0, 1) for index in (1, 0))
    assert torch.equal(clip.rgb[[0, 2]], torch.stack([nearest, second]))
    assert clip.warped is not None
    assert clip.warped[1, 3].max() > 0.9  # of the nearest reference


def test_a_camera_keeps_its_intrinsics_and_references_are_brought_to_its_size(monkeypatch):
    rendered = grey_splats(monkeypatch)
    camera = Cameras(cameras(0.5).camera_to_worlds, fx=30.0, fy=40.0, cx=7.0, cy=9.0, width=16, height=24)
    repair = RenderRepair(EnhanceConfig(warp_references=False), lambda: references(0.0, 1.0), Brightening())
    assert repair(splats(), camera).shape == (24, 16, 3)
    (three,) = rendered
    assert torch.cat([three.fx, three.fy, three.cx, three.cy], dim=-1).tolist() == [
        [16, 24, 8, 12],  # references are 8 x 8 pixels, with a focal length of 8
        [30, 40, 7, 9],
        [16, 24, 8, 12],
    ]


def test_a_single_reference_stands_at_both_ends(monkeypatch):
    grey_splats(monkeypatch)
    prior = Brightening()
    RenderRepair(EnhanceConfig(), lambda: references(0.0), prior)(splats(), cameras(0.5))
    assert torch.equal(prior.clips[0].rgb[0], prior.clips[0].rgb[2])


def test_references_are_read_once_and_their_depth_is_rendered_anew_after_training(monkeypatch):
    rendered, read = grey_splats(monkeypatch), []

    def reading():
        read.append(1)
        return references(0.0, 1.0)

    repair = RenderRepair(EnhanceConfig(), reading, Brightening())
    for step, renders in ((0, 3), (0, 1), (1, 3)):  # a clip, and both references where their depth is not known
        rendered.clear()
        repair(splats(step), cameras(0.5))
        assert len(rendered) == renders
    assert len(read) == 1


@pytest.mark.parametrize("offered", [True, False])
def test_outputs_are_repaired_when_it_is_asked_for_and_once(offered):
    asked = []

    def repair():
        asked.append(1)
        return torch.ones(1, 1, 3)

    outputs = RepairableOutputs({"rgb": torch.zeros(1, 1, 3)}, repair, offered)
    assert set(outputs) == ({"rgb", REPAIRED} if offered else {"rgb"})
    assert torch.equal(outputs["rgb"], torch.zeros(1, 1, 3))
    assert not asked
    if offered:
        assert torch.equal(outputs[REPAIRED], torch.ones(1, 1, 3))
    assert torch.equal(outputs.repaired, torch.ones(1, 1, 3))
    assert len(asked) == 1
