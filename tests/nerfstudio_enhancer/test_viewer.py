from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import viser.transforms as vtf

from nerfstudio_enhancer.viewer import EnhancerControls


class Server:
    """Of a viewer; keeps what is to be called for each browser."""

    def on_client_connect(self, callback):
        self.connect = callback


@pytest.fixture
def viewer() -> SimpleNamespace:
    viewer = SimpleNamespace(viser_server=Server(), config=SimpleNamespace(camera_frustum_scale=0.1))
    # as nerfstudio does for every control that it finds in the model
    EnhancerControls(0.5).first_view._setup(viewer)  # pyright: ignore[reportArgumentType]
    return viewer


def browser() -> SimpleNamespace:
    return SimpleNamespace(camera=SimpleNamespace(position=None, wxyz=None), atomic=nullcontext)


def test_a_browser_looks_out_of_the_first_reference_past_its_photograph(viewer):
    turned = vtf.SO3.from_y_radians(np.pi / 2).wxyz  # +z, where an OpenCV camera looks, becomes +x
    there = SimpleNamespace(position=np.array([1.0, 2.0, 3.0]), wxyz=turned)
    viewer.camera_handles = {4: SimpleNamespace(position=np.zeros(3), wxyz=np.array([1.0, 0, 0, 0])), 2: there}
    client = browser()
    viewer.viser_server.connect(client)
    np.testing.assert_allclose(client.camera.position, [1.15, 2.0, 3.0])
    assert client.camera.wxyz is turned


def test_before_the_scene_is_drawn_a_browser_looks_where_nerfstudio_lets_it(viewer):
    client = browser()
    viewer.viser_server.connect(client)
    assert client.camera.position is None
