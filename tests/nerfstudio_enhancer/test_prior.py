import pytest
import torch
from tiny_prior import random_clip, tiny_prior

from diffusion_prior import prior as prior_module, runner
from diffusion_prior.checkpoints import save_prior
from diffusion_prior.sampling_config import SamplingConfig
from diffusion_prior.types import EnhancedClip
from nerfstudio_enhancer.prior import LazyPrior


def test_a_prior_that_would_repair_nothing_is_refused_before_training(tmp_path):
    save_prior(tiny_prior(), tmp_path / "prior")
    LazyPrior(str(tmp_path / "prior"), "cpu").find()
    with pytest.raises(ValueError, match="`diffusion` must be True for a prior without coarse repair"):
        LazyPrior(str(tmp_path / "prior"), "cpu", SamplingConfig(diffusion=False)).find()


def test_diffusion_is_left_out_where_a_coarse_repair_does_something_without_it(tmp_path):
    alone = LazyPrior("bundled", "cpu", SamplingConfig(seed=3)).without_diffusion()
    assert alone.sampling == SamplingConfig(seed=3, diffusion=False)
    left_out = LazyPrior("bundled", "cpu", SamplingConfig(coarse=False))
    assert left_out.without_diffusion() is left_out
    save_prior(tiny_prior(), tmp_path / "prior")
    has_none = LazyPrior(str(tmp_path / "prior"), "cpu")
    assert has_none.without_diffusion() is has_none


def test_memory_is_planned_anew_for_a_clip_that_is_larger_than_all_before_it(tmp_path, monkeypatch):
    save_prior(tiny_prior(), tmp_path / "prior")
    planned = []
    monkeypatch.setattr(runner, "plan_memory", lambda prior, device, clip, say: planned.append(clip.num_frames))
    monkeypatch.setattr(prior_module.VideoPrior, "to", lambda self, device=None, dtype=None: self)
    monkeypatch.setattr(prior_module.VideoPrior, "enhance", lambda self, clip, generator: EnhancedClip(clip.rgb))
    prior = LazyPrior(str(tmp_path / "prior"), "cuda")
    for frames in (4, 3, 6, 5, 6, 7):
        prior.enhance(random_clip(frames, 16, 16), torch.Generator())
    assert planned == [4, 6, 7]
