"""What the prior is told of a rendered clip."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from walls import DISTANCE, SIZE, cameras, wall

from diffusion_prior.types import EnhancedClip
from nerfstudio_enhancer.contact_sheet import write_round_pictures
from nerfstudio_enhancer.enhance_step import (
    EnhanceConfig,
    References,
    condition_clip,
    enhance_step,
    reference_frame,
    view_need,
)
from nerfstudio_enhancer.enhanced_views import EnhancedViewStore
from nerfstudio_enhancer.rendering import RenderedClip
from nerfstudio_enhancer.warping import WarpSources


def rendered(frames: int) -> RenderedClip:
    """A grey render of the wall."""
    shape = (frames, SIZE, SIZE)
    return RenderedClip(
        rgb=torch.full((*shape, 3), 0.5),
        alpha=torch.ones(*shape, 1),
        depth=torch.full((*shape, 1), DISTANCE),
        scale_map=torch.ones(*shape, 3),
    )


def ends(sources: WarpSources) -> tuple[torch.Tensor, torch.Tensor]:
    """Two references as the first and the last frame of a clip."""
    references = References(sources.photographs, sources.cameras, sources.usable)
    return reference_frame(references, 0, rendered(3)), reference_frame(references, 1, rendered(3))


def test_a_clip_shows_its_references_at_its_ends_and_warped_into_the_frames_between():
    sources = wall(0.0, 1.0)
    first, last = (photograph.permute(2, 0, 1) for photograph in sources.photographs)
    clip = condition_clip(rendered(3), ends(sources), cameras(0.0, 0.25, 1.0), sources)
    assert torch.equal(clip.rgb[[0, 2]], torch.stack([first, last]))
    assert clip.warped is not None
    # the ends are warped onto themselves alone
    assert torch.equal(clip.warped[0], torch.cat([first, torch.ones(1, SIZE, SIZE), torch.zeros(4, SIZE, SIZE)]))
    assert torch.equal(clip.warped[2, :3], last)
    # 0.25 is one pixel on the wall: the frame sees the first reference one pixel further left, and its nearest is the first
    torch.testing.assert_close(clip.warped[1, :3, :, :-1], first[:, :, 1:])


def test_without_sources_nothing_is_warped():
    sources = wall(0.0, 1.0)
    clip = condition_clip(rendered(3), ends(sources), cameras(0.0, 0.25, 1.0))
    assert clip.warped is None


def test_what_a_mask_leaves_out_of_a_reference_is_a_hole_at_the_end_and_seen_nowhere_else():
    sources = wall(0.0, 1.0)
    usable = torch.ones(SIZE, SIZE, 1)
    usable[:, :4] = 0
    masked = dataclasses.replace(sources, usable=[usable, torch.ones(SIZE, SIZE, 1)])
    clip = condition_clip(rendered(3), ends(masked), cameras(0.0, 0.0, 1.0), masked)
    assert torch.equal(clip.alpha[0, 0], usable[..., 0])
    assert torch.equal(clip.alpha[2], torch.ones(1, SIZE, SIZE))
    assert clip.warped is not None
    assert torch.equal(clip.warped[0, 3], usable[..., 0])
    # the frame between stands on the masked reference: there it sees the right half alone. The other one, a metre to the
    # right, is 4 pixels further: of the left half it shows nothing either
    assert torch.equal(clip.warped[1, 3] > 0.5, usable[..., 0] > 0)
    first = sources.photographs[0].permute(2, 0, 1)
    torch.testing.assert_close(clip.warped[1, :3, :, 4:], first[:, :, 4:])


def test_where_references_are_transparent_only_what_splats_show_is_needed():
    sources = wall(0.0, 1.0)
    clip = condition_clip(rendered(3), ends(sources), cameras(0.0, 0.25, 1.0), sources)
    assert clip.warped is not None
    clip.alpha[:, :, :2] = 0  # nothing is shown in the upper quarter,
    clip.warped[:, 3, :2] = 0  # where nothing is seen either,
    clip.warped[:, 3, 2:] = 0.5  # nor half of the rest
    torch.testing.assert_close(view_need(clip, (0.0, 1.0)), torch.full((3,), 0.25 + 0.75 * 0.5))
    torch.testing.assert_close(view_need(clip, (0.0, 1.0), transparent=True), torch.full((3,), 0.5))


def test_a_view_is_needed_by_what_no_reference_sees_of_it():
    sources = wall(0.0, 1.0)
    clip = condition_clip(rendered(3), ends(sources), cameras(0.0, 0.25, 1.0), sources)
    assert clip.warped is not None
    shares = torch.tensor([0.0, 0.5, 1.0])  # unseen
    clip.warped[:, 3] = (1 - shares)[:, None, None]
    assert view_need(clip, (0.25, 0.75)).tolist() == [0.0, 0.5, 1.0]
    assert view_need(clip, (0.0, 0.5)).tolist() == [0.0, 1.0, 1.0]
    assert view_need(clip, (0.0, 0.0)).tolist() == [1.0, 1.0, 1.0]


def test_faultless_frames_that_nobody_gave_are_asked_for():
    references = References(list(wall(0.0, 1.0).photographs), cameras(0.0, 1.0))
    with pytest.raises(ValueError, match="needs `faultless`"):
        enhance_step(None, references, EnhanceConfig(feed="faultless"), None, torch.Generator())


def splats_that_show_the_wall(monkeypatch) -> SimpleNamespace:
    """A model whose renders are grey and as deep as the wall."""
    for module in ("enhance_step", "warping"):
        monkeypatch.setattr(f"nerfstudio_enhancer.{module}.render_clip", lambda _, seen: rendered(seen.shape[0]))
    return SimpleNamespace(device="cpu")


def test_a_prior_that_makes_noise_is_not_believed_where_nothing_is_seen_either(monkeypatch):
    class Noise:
        def enhance(self, clip, generator):
            return EnhancedClip(torch.rand(clip.rgb.shape, generator=generator))

    model = splats_that_show_the_wall(monkeypatch)
    sources = wall(0.0, 0.5, 1.0, 9.0)  # between the last two lies much that neither sees
    references = References([torch.full_like(photograph, 0.5) for photograph in sources.photographs], sources.cameras)

    def share(**settings) -> float:
        clips = enhance_step(model, references, EnhanceConfig(**settings), Noise(), torch.Generator().manual_seed(0))
        store = EnhancedViewStore()
        store.add(1, [clip.views for clip in clips])
        return store.share

    assert share() == 0.0
    assert share(reference_agreement=False) > 0.1


@pytest.mark.parametrize("whole", [False, True])
def test_what_of_a_path_no_view_is_needed_of_is_not_repaired(monkeypatch, tmp_path: Path, whole: bool):
    shown_clips = []

    class Darker:
        def enhance(self, clip, generator):
            shown_clips.append(clip)
            return EnhancedClip(clip.rgb / 2)

    model = splats_that_show_the_wall(monkeypatch)
    config = EnhanceConfig(whole_paths=whole, unseen_range=(0.4, 0.8))
    # neighbours that see all of what lies between them, and one that looks at another part of the wall
    for places, ends_of_fed in (((0.0, 0.5, 1.0), []), ((0.0, 0.5, 1.0, 9.0), [(1.0, 9.0)])):
        sources = wall(*places)
        references = References(list(sources.photographs), sources.cameras)
        shown_clips.clear()
        clips = enhance_step(model, references, config, Darker(), torch.Generator().manual_seed(0))
        assert sum(bool(clip.fed) for clip in clips) == len(shown_clips) == len(ends_of_fed)
        for clip in clips:
            needed = clip.views.need > 0
            fed = torch.zeros_like(needed)
            fed[clip.fed.start : clip.fed.stop] = True
            assert torch.equal(fed, needed.any().expand_as(fed) if whole else needed)  # they lie next to each other
            assert (clip.frame_difference is None) == (len(clip.fed) < 2)
            told = torch.where(fed, 0.25, 0.5)[:, None, None, None]
            assert torch.equal(clip.views.rgb, told.expand_as(clip.views.rgb).half())
        for told, (first, last) in zip(shown_clips, ends_of_fed):
            (clip,) = (clip for clip in clips if clip.fed)
            assert told.num_frames == len(clip.fed) + 2
            assert whole or len(clip.fed) < clip.views.num_views
            for frame, place in ((0, first), (-1, last)):
                photograph = sources.photographs[places.index(place)]
                assert torch.equal(told.rgb[frame], photograph.permute(2, 0, 1))
            x = told.camera_to_world[1:-1, 0, 3]
            torch.testing.assert_close(x, clip.views.camera_to_world[clip.fed.start : clip.fed.stop, 0, 3])
        folder = tmp_path / str(len(places))
        folder.mkdir()
        write_round_pictures(folder, clips)
        assert len(list(folder.rglob("clip-*.png"))) == sum(len(clip.fed) for clip in clips)
        assert (folder / "contact_sheet.png").exists() == bool(ends_of_fed)


def test_every_view_is_repaired_where_all_are_needed(monkeypatch):
    class Same:
        def enhance(self, clip, generator):
            return EnhancedClip(clip.rgb)

    sources = wall(0.0, 0.5, 1.0)
    references = References(list(sources.photographs), sources.cameras)
    everything = EnhanceConfig(unseen_range=(0.0, 0.0))
    model = splats_that_show_the_wall(monkeypatch)
    clips = enhance_step(model, references, everything, Same(), torch.Generator().manual_seed(0))
    assert all(len(clip.fed) == clip.views.num_views for clip in clips)
