import pytest
import torch
from svd_folders import write_svd_folder
from tiny_prior import random_clip

from diffusion_prior import prior as prior_module
from diffusion_prior.fitting import fit_clip
from diffusion_prior.memory import PRESETS, OutOfDeviceMemory, estimate_memory
from diffusion_prior.runner import plan_memory, prepare_prior
from diffusion_prior.sampling_config import SamplingConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_svd_folder(tmp_path_factory.mktemp("svd")))


def test_on_a_cpu_all_of_the_memory_is_used_and_nothing_is_said(folder):
    said = []
    prior = prepare_prior(folder, CPU, SamplingConfig(precision="fp32"), random_clip(), said.append)
    assert prior.preset == PRESETS["all"]
    assert said == []


def test_a_preset_is_followed_and_the_estimate_told_before_anything_runs(folder):
    said = []
    sampling = SamplingConfig(memory="8gb", steps=1, frame_size=(16, 16), precision="fp32")
    prior = prepare_prior(folder, CPU, sampling, random_clip(3, 30, 60), said.append)
    assert prior.preset == PRESETS["8gb"]
    (line,) = said
    # the shorter side of 30 goes to 16, the longer one of 60 to 32
    assert "for 3 frames of 32 x 16 (memory preset 8gb)." in line
    assert prior.enhance(random_clip(3, 30, 60), torch.Generator().manual_seed(0)).rgb.shape == (3, 3, 30, 60)


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_precision_asked_for_is_that_of_the_networks(folder, precision, dtype):
    prior = prepare_prior(folder, CPU, SamplingConfig(precision=precision), random_clip(), print)
    assert prior.unet.dtype == prior.std.dtype == dtype


def test_on_a_gpu_the_first_preset_that_fits_into_what_is_free_is_taken(folder, monkeypatch):
    # a GPU that is too small for anything, without one: nothing is moved there
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 8 << 30))
    monkeypatch.setattr(prior_module.VideoPrior, "to", lambda self, device=None, dtype=None: self)
    said = []
    prior = prepare_prior(folder, torch.device("cuda"), SamplingConfig(precision="fp32"), random_clip(), said.append)
    assert prior.preset == PRESETS["8gb"]
    assert "That may not be enough" in said[0]


def test_weights_that_do_not_fit_are_explained(folder, monkeypatch):
    real = prior_module.VideoPrior.to

    def too_small(self, device=None, dtype=None):
        if str(device) == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return real(self, device, dtype)

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 8 << 30))
    monkeypatch.setattr(prior_module.VideoPrior, "to", too_small)
    sampling = SamplingConfig(memory="24gb", frame_size=(16, 16), precision="fp32")
    # the shorter side of 30 goes to 16, the longer one of 60 to 32: what is asked of the networks is what is told
    with pytest.raises(OutOfDeviceMemory, match=r"3 frames of 32 x 16 .*sampling\.memory 8gb") as caught:
        prepare_prior(folder, torch.device("cuda"), sampling, random_clip(3, 30, 60), lambda line: None)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_the_preset_is_chosen_anew_for_larger_clips(folder, monkeypatch):
    free = [1 << 40]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 1 << 40))
    monkeypatch.setattr(prior_module.VideoPrior, "to", lambda self, device=None, dtype=None: self)
    gpu, said = torch.device("cuda"), []
    small, large = random_clip(3, 32, 32), random_clip(9, 128, 128)
    prior = prepare_prior(folder, gpu, SamplingConfig(precision="fp32"), small, said.append)
    assert prior.preset == PRESETS["80gb"]
    free[0] = estimate_memory(prior, *fitted_size(prior, small), PRESETS["80gb"]).peak
    plan_memory(prior, gpu, small, said.append)
    assert prior.preset == PRESETS["80gb"]
    plan_memory(prior, gpu, large, said.append)
    assert prior.preset != PRESETS["80gb"]
    assert len(said) == 3


def fitted_size(prior, clip):
    fitted = fit_clip(clip, prior.fit, prior.frame_size).clip
    return fitted.num_frames, *fitted.rgb.shape[-2:]
