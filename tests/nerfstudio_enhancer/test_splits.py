import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from nerfstudio_enhancer.scene.capture import Capture, Frame
from nerfstudio_enhancer.scene.photograph_folder import with_photographs_from
from nerfstudio_enhancer.scene.splits import split_views


def capture_of(names, folder=Path("/scene")):
    frames = tuple(Frame(folder / name, name, np.eye(4), 8, 6, 5.0, 5.0, 4.0, 3.0, (0.0,) * 6) for name in names)
    return Capture(folder=folder, frames=frames, camera_model="PINHOLE")


def numbered(count):
    return capture_of([f"images/frame_{index:05d}.png" for index in range(count)])


def test_the_papers_rule_spreads_the_references_first_and_tests_every_eighth_of_the_rest():
    split = split_views(numbered(20), 3, None, 8)
    # round(linspace(0, 19, 3)) = 0, 10 (9.5 to even), 19; the rest 1..9, 11..18: its 1st, 9th and 17th
    assert split.reference == (0, 10, 19)
    assert split.test == (1, 9, 18)


def test_the_mip_nerf_360_rule_holds_out_every_eighth_photograph_first():
    split = split_views(numbered(20), 3, None, 8, "test-first")
    assert split.test == (0, 8, 16)
    # the other 17 are 1..7, 9..15, 17, 18, 19: their 1st, 9th and 17th
    assert split.reference == (1, 10, 19)
    assert sorted(split.reference + split.test + split.unused) == list(range(20))


def test_named_references_keep_the_mip_nerf_360_test_views_and_may_not_be_among_them():
    split = split_views(numbered(20), None, ("frame_00001", "frame_00010"), 8, "test-first")
    assert (split.reference, split.test) == ((1, 10), (0, 8, 16))
    with pytest.raises(ValueError, match=r"every 8th photograph from the first on; got images/frame_00008.png"):
        split_views(numbered(20), None, ("frame_00001", "frame_00008"), 8, "test-first")


@pytest.mark.parametrize("rule", ["references-first", "test-first"])
def test_references_are_chosen_by_number_or_by_name_not_by_both(rule):
    with pytest.raises(ValueError, match="either `num_views` or `reference_views`, not both"):
        split_views(numbered(20), 3, ("frame_00001", "frame_00010"), 8, rule)


def test_all_the_rest_may_be_test_views_whatever_the_capture_lists():
    capture = dataclasses.replace(numbered(6), named_splits={"test": ["frame_00005"]})
    assert split_views(capture, None, ("frame_00000", "frame_00002"), 8).test == (5,)
    assert split_views(capture, None, ("frame_00000", "frame_00002"), 1).test == (1, 3, 4, 5)


@pytest.mark.parametrize("count", [9, 24, 185])
@pytest.mark.parametrize("views", [3, 6])
@pytest.mark.parametrize("rule", ["references-first", "test-first"])
def test_no_rule_lets_a_photograph_be_in_two_groups(count, views, rule):
    split = split_views(numbered(count), views, None, 8, rule)
    assert len(split.reference) == views
    assert sorted(split.reference + split.test + split.unused) == list(range(count))


def test_holding_out_everything_leaves_nothing_to_train_on():
    with pytest.raises(ValueError, match="at least 2 where test views are chosen first, got 1"):
        split_views(numbered(20), 3, None, 1, "test-first")


def test_a_published_split_of_positions_is_followed(tmp_path):
    # ReconFusion's form; positions count in the plain order of the names, where img_10 comes before img_2
    path = tmp_path / "train_test_split_3.json"
    path.write_text(json.dumps({"test_ids": [0, 4], "train_ids": [3, 1]}))
    split = split_views(capture_of(["img_1", "img_2", "img_3", "img_10", "img_11"]), None, None, 8, split_file=path)
    # sorted: img_1 img_10 img_11 img_2 img_3
    assert split.test == (0, 2)
    assert split.reference == (1, 3)
    assert split.unused == (4,)


def test_a_split_of_names_is_followed(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["frame_00003", "frame_00001.png"], "test": ["images/frame_00004.png"]}))
    split = split_views(numbered(6), None, None, 8, split_file=path)
    assert (split.reference, split.test, split.unused) == ((1, 3), (4,), (0, 2, 5))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "cannot be read so"),
        ("{}", r"cannot be read so \(KeyError: 'train_ids'\)"),
        ('{"train_ids": [0, 9], "test_ids": []}', "holds 9, but there are 6 photographs"),
        ('{"train_ids": [0, 1], "test_ids": [1]}', "frame_00001.png both for training and for testing"),
        ('{"train_ids": [0], "test_ids": [1]}', "At least 2 reference views"),
        ('{"train": ["nobody"], "test": []}', "name.s. 'nobody', which is no posed photograph"),
    ],
)
def test_split_files_that_make_no_sense_are_refused(tmp_path, text, match):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        split_views(numbered(6), None, None, 8, split_file=tmp_path / "split.json")


def test_a_split_file_stands_alone_and_must_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        split_views(numbered(6), None, None, 8, split_file=tmp_path / "none.json")
    with pytest.raises(ValueError, match="names the references itself"):
        split_views(numbered(6), 3, None, 8, split_file=tmp_path / "none.json")


def folder_with(tmp_path, *folders):
    for name in folders:
        (tmp_path / name).mkdir()
    return capture_of(["images/a.png", "images/b.png"], tmp_path)


def test_the_named_folder_of_photographs_is_read_and_names_stay(tmp_path):
    capture = with_photographs_from(folder_with(tmp_path, "images", "images_4"), "images_4")
    assert [frame.image for frame in capture.frames] == [tmp_path / "images_4" / name for name in ("a.png", "b.png")]
    assert [frame.name for frame in capture.frames] == ["images/a.png", "images/b.png"]


def test_where_the_originals_are_missing_the_largest_copies_are_read_as_in_dl3dv(tmp_path):
    capture = with_photographs_from(folder_with(tmp_path, "images_8", "images_4"), None)
    assert capture.frames[0].image == tmp_path / "images_4" / "a.png"


def test_where_the_originals_are_there_nothing_changes(tmp_path):
    capture = folder_with(tmp_path, "images", "images_4")
    (tmp_path / "images" / "a.png").touch()
    assert with_photographs_from(capture, None) is capture


def test_a_folder_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder 'images_2' of photographs; it has images, images_4"):
        with_photographs_from(folder_with(tmp_path, "images", "images_4"), "images_2")
