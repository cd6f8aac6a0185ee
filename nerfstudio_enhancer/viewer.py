"""What the viewer's control panel offers beside nerfstudio's own elements."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import viser.transforms as vtf
from nerfstudio.viewer.viewer_elements import ViewerButton, ViewerControl, ViewerSlider
from torch import nn

if TYPE_CHECKING:
    from nerfstudio.viewer.viewer import Viewer
    from viser import ClientHandle


class FirstReference(ViewerControl):
    """Lets a browser that connects look out of the first reference; without it, it looks at the scene from far outside."""

    def _setup(self, viewer: Viewer) -> None:
        super()._setup(viewer)
        viewer.viser_server.on_client_connect(self._show)

    def _show(self, client: ClientHandle) -> None:
        # There are no frustums before nerfstudio has drawn the scene.
        frustums = getattr(self.viewer, "camera_handles", {})
        if not frustums:
            return
        first = frustums[min(frustums)]
        # Just in front of the frustum's photograph, which would cover what the splats show.
        ahead = np.array([0.0, 0.0, 1.5 * self.viewer.config.camera_frustum_scale])
        with client.atomic():
            client.camera.position = first.position + vtf.SO3(np.asarray(first.wxyz)).apply(ahead)
            client.camera.wxyz = first.wxyz


class EnhancerControls(nn.Module):
    """A button that asks for a round, the share of enhanced views, and where a browser looks at first.

    It holds no parameters: it is a module only because the viewer looks for its elements in modules.
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.run_round = ViewerButton("Run a round now", cb_hook=self._ask)
        self.enhanced_share = ViewerSlider("Share of enhanced views", ratio, 0.0, 1.0, 0.05)
        self.first_view = FirstReference()
        self._asked = False

    @property
    def ratio(self) -> float:
        """Probability that a batch is an enhanced view."""
        return float(self.enhanced_share.value)

    def take_request(self) -> bool:
        """Whether a round was asked for since the last call."""
        asked, self._asked = self._asked, False
        return asked

    def _ask(self, _button: ViewerButton) -> None:
        self._asked = True
