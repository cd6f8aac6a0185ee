import dataclasses
import json

import pytest
import torch

from diffusion_prior.data import pairs
from diffusion_prior.data.pairs import (
    PairRun,
    find_runs,
    read_header,
    read_rows,
    read_run,
    run_folder,
    verify_run,
    write_run,
)


def tiny_run(num_frames: int = 4, num_views: int = 3, height: int = 6, width: int = 8) -> PairRun:
    generator = torch.Generator().manual_seed(0)

    def picture(count: int, channels: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, channels, height, width), generator=generator, dtype=torch.uint8)

    return PairRun(
        scene="beer",
        num_views=num_views,
        seed=7,
        steps=300,
        render=picture(num_frames, 3),
        alpha=picture(num_frames, 1),
        disparity=picture(num_frames, 1),
        warped=picture(num_frames, 8),
        target=picture(num_frames, 3),
        references=picture(num_views, 3),
        reference_disparity=picture(num_views, 1),
        before=torch.tensor([0, 0, 1, 1])[:num_frames],
        after=torch.tensor([1, 1, 2, 2])[:num_frames],
        camera_to_world=torch.eye(4)[:3].repeat(num_frames, 1, 1),
        reference_camera_to_world=torch.eye(4)[:3].repeat(num_views, 1, 1),
        intrinsics=torch.tensor([[10.0, 10.0, 4.0, 3.0]]).repeat(num_frames, 1),
        settings={"dropout": 0.3},
    )


def test_a_run_reads_back_as_it_was_written(tmp_path):
    written = tiny_run()
    write_run(tmp_path / "beer" / "k03_s7_n300", written)
    read = read_run(tmp_path / "beer" / "k03_s7_n300")
    for name in (f.name for f in dataclasses.fields(PairRun)):
        expected, value = getattr(written, name), getattr(read, name)
        assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


def test_header_tells_size_and_neighbours_without_pictures(tmp_path):
    write_run(tmp_path / "run", tiny_run())
    header = read_header(tmp_path / "run")
    assert (header.scene, header.num_frames, header.height, header.width) == ("beer", 4, 6, 8)
    assert header.before.tolist() == [0, 0, 1, 1]
    assert header.settings == {"dropout": 0.3}


def test_chosen_rows_come_in_the_order_asked_for(tmp_path):
    run = tiny_run()
    write_run(tmp_path / "run", run)
    rows = read_rows(tmp_path / "run", {"render": [3, 0, 3], "references": [2]})
    assert torch.equal(rows["render"], run.render[[3, 0, 3]])
    assert torch.equal(rows["references"], run.references[2:])


def test_folder_name_tells_views_seed_and_steps(tmp_path):
    assert run_folder(tmp_path, "beer", 3, 7, 300) == tmp_path / "beer" / "k03_s7_n300"


def test_an_older_run_is_replaced_whole(tmp_path):
    write_run(tmp_path / "run", tiny_run(num_frames=4))
    write_run(tmp_path / "run", tiny_run(num_frames=2))
    assert read_run(tmp_path / "run").render.shape[0] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_write_that_fails_leaves_the_older_run_and_no_rubbish(tmp_path, monkeypatch):
    write_run(tmp_path / "run", tiny_run(num_frames=4))

    def disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pairs, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_run(tmp_path / "run", tiny_run(num_frames=2))
    assert read_run(tmp_path / "run").render.shape[0] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_runs_are_found_below_their_scenes_and_unfinished_ones_are_not(tmp_path):
    write_run(run_folder(tmp_path, "beer", 3, 0, 300), tiny_run())
    write_run(run_folder(tmp_path, "beer", 3, 0, 900), tiny_run())
    (tmp_path / "beer" / ".k03_s1_n300.partial-12").mkdir()
    (tmp_path / "beer" / ".k03_s1_n300.partial-12" / "meta.json").write_text("{}")
    assert [path.name for path in find_runs(tmp_path)] == ["k03_s0_n300", "k03_s0_n900"]


def test_no_runs_at_all_is_told_with_the_expected_layout(tmp_path):
    with pytest.raises(FileNotFoundError, match="make-pairs"):
        find_runs(tmp_path)


def test_a_whole_run_verifies(tmp_path):
    write_run(tmp_path / "run", tiny_run())
    verify_run(tmp_path / "run")


def test_a_flipped_byte_is_found(tmp_path):
    write_run(tmp_path / "run", tiny_run())
    path = tmp_path / "run" / "frames.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        verify_run(tmp_path / "run")


def test_a_missing_file_is_named(tmp_path):
    write_run(tmp_path / "run", tiny_run())
    (tmp_path / "run" / "frames.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"frames\.safetensors is missing"):
        read_run(tmp_path / "run")


def test_another_version_is_refused(tmp_path):
    write_run(tmp_path / "run", tiny_run())
    path = tmp_path / "run" / "meta.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    with pytest.raises(ValueError, match=r"version 2, .*version 99"):
        read_run(tmp_path / "run")


def test_an_array_too_few_is_named(tmp_path):
    write_run(tmp_path / "run", tiny_run())
    path = tmp_path / "run" / "frames.safetensors"
    arrays = pairs.load_file(path)
    del arrays["alpha"]
    pairs.save_file(arrays, path)
    with pytest.raises(ValueError, match=r"lacks \['alpha'\]"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after": torch.tensor([1, 1, 2, 3])}, "after must index the 3 references, got 1 to 3"),
        ({"before": torch.tensor([0, -1, 1, 1])}, "before must index the 3 references, got -1 to 1"),
        ({"intrinsics": torch.full((4, 4), torch.nan)}, "intrinsics must be finite"),
        ({"num_views": 2}, r"references must be torch.uint8 of shape \(2, 3, 6, 8\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_run(tmp_path / "run", dataclasses.replace(tiny_run(), **change))
    assert not (tmp_path / "run").exists()


def test_pictures_of_another_size_are_refused():
    arrays = {name: getattr(tiny_run(), name) for name in pairs.DTYPES}
    with pytest.raises(ValueError, match=r"target must be torch.uint8 of shape \(4, 3, 6, 8\)"):
        pairs.check_arrays({**arrays, "target": arrays["target"][..., :-1]}, num_views=3)


def test_a_run_without_a_single_pair_is_refused():
    arrays = {name: getattr(tiny_run(), name) for name in pairs.DTYPES}
    per_frame = ("render", "alpha", "disparity", "warped", "target", "before", "after", "camera_to_world", "intrinsics")
    with pytest.raises(ValueError, match="at least one camera"):
        pairs.check_arrays({**arrays, **{name: arrays[name][:0] for name in per_frame}}, num_views=3)
