from pathlib import Path

import numpy as np
import pytest
import torch
from nerfstudio.cameras.cameras import Cameras
from nerfstudio.data.dataparsers.base_dataparser import DataparserOutputs

from nerfstudio_enhancer.pairs.sparse_splats import fits, last_reference_before, reference_names, thinned
from nerfstudio_enhancer.scene.capture import Frame


def test_a_view_lies_between_the_references_around_it_in_capture_order():
    references = [Path("IMG_2.png"), Path("IMG_9.png"), Path("IMG_10.png"), Path("IMG_30.png")]
    assert last_reference_before(Path("IMG_5.png"), references) == 0
    assert last_reference_before(Path("IMG_29.png"), references) == 2
    # numbers count by value: 10 comes after 9
    assert last_reference_before(Path("IMG_9b.png"), references) == 1


def test_views_outside_the_references_count_to_the_nearest_pair():
    references = [Path("b.png"), Path("d.png"), Path("f.png")]
    assert last_reference_before(Path("a.png"), references) == 0
    assert last_reference_before(Path("g.png"), references) == 1


def frame(number, width, height):
    return Frame(Path(f"{number}.png"), f"{number}.png", np.eye(4), width, height, 10.0, 10.0, 4.0, 3.0, ())


def test_references_are_spread_over_the_photographs_of_the_commonest_shape():
    turned = {0, 3}
    frames = [frame(i, 6, 8) if i in turned else frame(i, 8, 6) for i in range(8)]
    # alike: 1 2 4 5 6 7; at 0, 2.5 -> 2 (halves to even) and 5 of these
    assert reference_names(frames, 3) == ["1.png", "4.png", "7.png"]
    with pytest.raises(ValueError, match="of which there are 6; 6 references are too many"):
        reference_names(frames, 6)


def test_a_picture_of_nearly_the_same_shape_is_resized_and_another_left_out():
    assert fits((240, 320), (240, 320))
    assert fits((240, 324), (240, 320))  # 1.25 % wider
    assert not fits((240, 330), (240, 320))  # 3.1 % wider
    assert not fits((320, 240), (240, 320))


@pytest.mark.parametrize(("most", "kept"), [(3, [0, 2, 4]), (2, [0, 4]), (9, [0, 1, 2, 3, 4]), (1, [0])])
def test_thinned_views_are_spread_evenly_with_both_ends(most, kept):
    poses = torch.eye(4)[:3].repeat(5, 1, 1)
    poses[:, 0, 3] = torch.arange(5.0)
    outputs = DataparserOutputs(
        image_filenames=[Path(f"{i}.png") for i in range(5)],
        cameras=Cameras(poses, fx=10.0, fy=10.0, cx=4.0, cy=3.0, width=8, height=6),
    )
    some = thinned(outputs, most)
    assert [int(path.stem) for path in some.image_filenames] == kept
    assert some.cameras.camera_to_worlds[:, 0, 3].tolist() == kept
