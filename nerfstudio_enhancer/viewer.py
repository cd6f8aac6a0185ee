"""What the viewer's control panel offers beside nerfstudio's own elements."""

from __future__ import annotations

from nerfstudio.viewer.viewer_elements import ViewerButton, ViewerSlider
from torch import nn


class EnhancerControls(nn.Module):
    """A button that asks for a round, and the share of enhanced views.

    It holds no parameters: it is a module only because the viewer looks for its elements in modules.
    """

    def __init__(self, ratio: float) -> None:
        super().__init__()
        self.run_round = ViewerButton("Run a round now", cb_hook=self._ask)
        self.enhanced_share = ViewerSlider("Share of enhanced views", ratio, 0.0, 1.0, 0.05)
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
