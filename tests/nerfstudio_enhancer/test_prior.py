import pytest
from tiny_prior import tiny_prior

from diffusion_prior.checkpoints import save_prior
from diffusion_prior.sampling_config import SamplingConfig
from nerfstudio_enhancer.prior import LazyPrior


def test_a_prior_that_would_repair_nothing_is_refused_before_training(tmp_path):
    save_prior(tiny_prior(), tmp_path / "prior")
    LazyPrior(str(tmp_path / "prior"), "cpu").find()
    with pytest.raises(ValueError, match="`diffusion` must be True for a prior without coarse repair"):
        LazyPrior(str(tmp_path / "prior"), "cpu", SamplingConfig(diffusion=False)).find()
