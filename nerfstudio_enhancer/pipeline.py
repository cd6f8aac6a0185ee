"""Nerfstudio's pipeline, which gives the model what repairs its renders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

import torch
from nerfstudio.pipelines.base_pipeline import VanillaPipeline, VanillaPipelineConfig
from nerfstudio.utils.rich_utils import CONSOLE

from diffusion_prior.kept_memory import keep_freed_memory
from diffusion_prior.waiting_threads import let_waiting_threads_sleep
from nerfstudio_enhancer.prior import LazyPrior
from nerfstudio_enhancer.render_repair import RenderRepair
from nerfstudio_enhancer.rounds import references_of

if TYPE_CHECKING:
    from nerfstudio_enhancer.datamanager import EnhancerDataManager
    from nerfstudio_enhancer.model import EnhancerModel


@dataclass
class EnhancerPipelineConfig(VanillaPipelineConfig):
    """Settings of data and model."""

    _target: type = field(default_factory=lambda: EnhancerPipeline)


class EnhancerPipeline(VanillaPipeline):
    """Data manager and model, and between them the references that the prior is shown at the end."""

    def __init__(
        self,
        config: EnhancerPipelineConfig,
        device: torch.device | str,
        test_mode: Literal["test", "val", "inference"] = "val",
        **kwargs,
    ) -> None:
        let_waiting_threads_sleep()
        keep_freed_memory(device)
        super().__init__(config, cast("str", device), test_mode, **kwargs)  # its commands pass a torch.device too
        model = cast("EnhancerModel", self.model)
        datamanager = cast("EnhancerDataManager", self.datamanager)
        if test_mode != "val":  # splats in training change with every step
            self.fade_haze()
        enhance = model.config.enhance
        if enhance.repair_share == 0 or not enhance.uses_prior:
            return
        prior = LazyPrior(enhance.prior, model.device, enhance.sampling)
        if test_mode != "val":  # a training looks for its prior itself, and does not start without
            try:
                prior.find()
            except (ValueError, FileNotFoundError) as error:
                CONSOLE.log(f"[yellow]No render is repaired: {error}")
                return
        model.repair = RenderRepair(enhance, lambda: references_of(*datamanager.reference_photographs()), prior)
        # In a training the viewer draws from a thread of its own, and takes the splats' lock for plain outputs alone.
        model.offers_repair = test_mode != "val"

    def fade_haze(self) -> None:
        """Let the haze of finished splats fade from now on, where the settings ask for it."""
        model, datamanager = cast("EnhancerModel", self.model), cast("EnhancerDataManager", self.datamanager)
        if model.config.fade_haze:
            model.references = lambda: datamanager.train_dataset.cameras
