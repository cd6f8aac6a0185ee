import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch.testing import assert_close

from nerfstudio_enhancer.enhance_step import EnhanceConfig
from nerfstudio_enhancer.enhanced_views import META_FILE, SHOWN_ALPHA, VIEWS_FILE, EnhancedViews, EnhancedViewStore
from nerfstudio_enhancer.random_state import step_generator
from nerfstudio_enhancer.rounds import take_up_schedule


def clip(count: int = 2, value: float = 0.5, height: int = 4, width: int = 6) -> EnhancedViews:
    return EnhancedViews(
        rgb=torch.full((count, height, width, 3), value).half(),
        pixel_confidence=torch.ones(count, height, width, 1).half(),
        image_confidence=torch.arange(1, count + 1).float(),
        need=torch.ones(count),
        camera_to_world=torch.eye(4)[:3].expand(count, 3, 4).clone(),
        intrinsics=torch.tensor([5.0, 6.0, 3.0, 2.0]).expand(count, 4).clone(),
    )


def test_draws_depend_on_the_generator_alone() -> None:
    store = EnhancedViewStore()
    store.add(20, [clip(3), clip(2, height=8)])
    first = [store.draw(step_generator(0, step, "batch"))[1]["image_confidence"] for step in range(20)]
    again = [store.draw(step_generator(0, step, "batch"))[1]["image_confidence"] for step in range(20)]
    assert first == again
    assert len(set(first)) > 1


def test_opacity_is_kept_where_there_is_one(tmp_path: Path) -> None:
    alpha = torch.rand(2, 4, 6, 1).half()
    for step, views in ((20, dataclasses.replace(clip(), alpha=alpha)), (30, clip())):
        store, again = EnhancedViewStore(), EnhancedViewStore()
        store.add(step, [views])
        store.save_round(tmp_path / str(step), step, {})
        again.load_rounds(tmp_path / str(step), step)
        batches = [kept.draw(step_generator(0, 0, "batch"))[1] for kept in (store, again)]
        assert [SHOWN_ALPHA in batch for batch in batches] == [views.alpha is not None] * 2
    assert_close(again.rounds[30][0].rgb, clip().rgb)


def test_views_are_drawn_in_proportion_to_their_need() -> None:
    store = EnhancedViewStore()
    assert store.mean_need == 0
    needs = torch.tensor([0.0, 0.25, 0.75])
    store.add(20, [dataclasses.replace(clip(3), need=needs)])
    assert store.mean_need == pytest.approx(1 / 3)
    # image_confidence tells the three apart: 1, 2, 3
    drawn = [store.draw(step_generator(0, step, "batch"))[1]["image_confidence"] for step in range(400)]
    assert drawn.count(1.0) == 0
    assert drawn.count(3.0) / len(drawn) == pytest.approx(0.75, abs=0.07)  # three standard deviations


def test_a_round_that_hardly_anyone_needs_is_not_trained_on() -> None:
    store = EnhancedViewStore()
    for need, share in ((0.25, 0.25), (0.0625, 0.0625), (0.03125, 0.0), (0.0, 0.0)):
        store.add(20, [dataclasses.replace(clip(2), need=torch.full((2,), need))])
        assert store.share == share


def test_a_store_of_views_that_nobody_needs_cannot_be_drawn_from() -> None:
    store = EnhancedViewStore()
    store.add(20, [dataclasses.replace(clip(2), need=torch.zeros(2))])
    assert store.mean_need == 0
    with pytest.raises(ValueError, match="No enhanced view to draw"):
        store.draw(step_generator(0, 0, "batch"))


def test_every_view_is_drawn_with_its_own_camera() -> None:
    store = EnhancedViewStore()
    store.add(20, [clip(1, 0.25), clip(1, 0.75, height=8)])
    seen = set()
    for step in range(40):
        camera, batch = store.draw(step_generator(0, step, "batch"))
        assert batch["image"].shape[:2] == (camera.height.item(), camera.width.item())
        assert camera.fx.item() == 5.0
        seen.add(round(float(batch["image"].mean()), 2))
    assert seen == {0.25, 0.75}


def test_a_saved_round_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = EnhancedViewStore()
    store.add(20, [clip(3, 0.3), clip(2, 0.7)])
    store.save_round(tmp_path, step=20, settings={"ratio": 0.5})
    other = EnhancedViewStore()
    assert other.load_rounds(tmp_path, up_to_step=20) == [20]
    for saved, loaded in zip(store.rounds[20], other.rounds[20], strict=True):
        for name in EnhancedViews.__dataclass_fields__:
            before, after = getattr(saved, name), getattr(loaded, name)
            assert after is None if before is None else torch.equal(before, after)


def test_rounds_after_the_checkpoint_are_not_read(tmp_path: Path) -> None:
    store = EnhancedViewStore()
    store.add(20, [clip()])
    store.save_round(tmp_path, step=20, settings={})
    assert EnhancedViewStore().load_rounds(tmp_path, up_to_step=19) == []


def test_a_new_round_replaces_the_one_before() -> None:
    store = EnhancedViewStore(keep_rounds=1)
    store.add(20, [clip(5)])
    store.add(30, [clip(2, 0.9)])
    assert store.num_views == 2
    assert_close(store.draw(step_generator(0, 0, "batch"))[1]["image"], torch.full((4, 6, 3), 0.9), rtol=0, atol=1e-3)


def test_a_save_that_fails_leaves_the_older_round_and_no_litter(tmp_path: Path, monkeypatch) -> None:
    store = EnhancedViewStore()
    store.add(20, [clip(2, 0.3)])
    store.save_round(tmp_path, step=20, settings={})

    def full_disk(*_args, **_kwargs):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    store.add(20, [clip(2, 0.9)])
    with pytest.raises(OSError, match="No space left"):
        store.save_round(tmp_path, step=20, settings={})
    assert [path.name for path in tmp_path.iterdir()] == ["round-step-000000020"]
    other = EnhancedViewStore()
    other.load_rounds(tmp_path, up_to_step=20)
    assert float(other.rounds[20][0].rgb.mean()) == pytest.approx(0.3, abs=1e-3)


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions bind everyone but root, as whom tests may run."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


NOBODY = 65534


def test_a_folder_that_may_not_be_written_to_is_named_and_keeps_its_rounds(tmp_path: Path) -> None:
    store = EnhancedViewStore()
    store.add(20, [clip(2, 0.3)])
    store.save_round(tmp_path, step=20, settings={})
    for folder in (tmp_path, *tmp_path.parents):
        if folder.name.startswith("pytest-"):
            folder.chmod(0o755)
    tmp_path.chmod(0o555)
    store.add(40, [clip(2, 0.9)])
    with ordinary_user(), pytest.raises(PermissionError, match="Permission denied"):
        store.save_round(tmp_path, step=40, settings={})
    assert EnhancedViewStore().load_rounds(tmp_path, up_to_step=40) == [20]


def test_a_round_cut_off_while_it_was_written_is_ignored(tmp_path: Path) -> None:
    (tmp_path / ".partial-round-step-000000020").mkdir()
    assert EnhancedViewStore().load_rounds(tmp_path, up_to_step=100) == []


@pytest.mark.parametrize("damaged", [VIEWS_FILE, META_FILE])
def test_damaged_views_are_named_with_the_way_out(tmp_path: Path, damaged: str) -> None:
    store = EnhancedViewStore()
    store.add(20, [clip()])
    folder = store.save_round(tmp_path, step=20, settings={})
    (folder / damaged).write_bytes(b"{")
    with pytest.raises(ValueError, match="Delete that folder"):
        EnhancedViewStore().load_rounds(tmp_path, up_to_step=100)


def test_views_of_another_format_version_are_refused(tmp_path: Path) -> None:
    store = EnhancedViewStore()
    store.add(20, [clip()])
    folder = store.save_round(tmp_path, step=20, settings={})
    meta = (folder / META_FILE).read_text().replace('"format_version": 2', '"format_version": 99')
    (folder / META_FILE).write_text(meta)
    with pytest.raises(ValueError, match="format version 99"):
        EnhancedViewStore().load_rounds(tmp_path, up_to_step=100)


def test_an_empty_store_cannot_be_drawn_from() -> None:
    with pytest.raises(ValueError, match="run a round first"):
        EnhancedViewStore().draw(step_generator(0, 0, "batch"))


def test_a_round_without_views_is_refused() -> None:
    with pytest.raises(ValueError, match="made no view"):
        EnhancedViewStore().add(0, [])


@pytest.mark.parametrize(("begin", "schedule"), [(1200, (1000, 500)), (1700, (1000, 500)), (900, (None, None))])
def test_a_resumed_run_keeps_the_schedule_that_its_newest_round_was_made_by(tmp_path: Path, begin, schedule) -> None:
    store = EnhancedViewStore()
    for step in (1000, 1500):
        store.add(step, [clip(2, 0.3)])
        store.save_round(tmp_path / "run/enhanced_views", step, settings={"start": 1000, "every": 500})
    options = SimpleNamespace(load_dir=tmp_path / "run/nerfstudio_models", load_checkpoint=None)
    trainer: Any = SimpleNamespace(base_dir=tmp_path / "resumed", config=options)
    config = EnhanceConfig()
    take_up_schedule(config, trainer, begin)
    assert (config.start, config.every) == schedule
    asked = EnhanceConfig(start=300, every=20)
    take_up_schedule(asked, trainer, begin)
    assert (asked.start, asked.every) == (300, 20)
