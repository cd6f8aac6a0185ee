import json
import shutil

import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from safetensors.torch import load_file, save_file
from tiny_prior import random_clip, randomise, tiny_prior

from diffusion_prior import checkpoints
from diffusion_prior.checkpoints import load_prior, read_prior, resolve_folder, save_prior

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "prior"
    save_prior(tiny_prior(), path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "prior")


def seeded():
    return torch.Generator().manual_seed(0)


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_saving_and_loading_keeps_every_tensor_setting_and_result(tmp_path):
    prior = tiny_prior(sigma_max=33.0, colour_correction=True)
    for module in (prior.unet, prior.std):
        randomise(module, std=0.05)
    prior.set_latent_scale(0.7)
    save_prior(prior, tmp_path / "prior")
    loaded = load_prior(str(tmp_path / "prior"), "cpu", torch.float32)
    assert loaded.config == prior.config
    assert loaded.latent_scale == 0.7
    for name, module in prior.modules.items():
        state = loaded.modules[name].state_dict()
        assert all(torch.equal(tensor, state[key]) for key, tensor in module.state_dict().items())
    clip = random_clip()
    # the same numbers elsewhere in memory: matrix products differ in the last bit (measured 6e-8), sampling amplifies
    torch.testing.assert_close(loaded.enhance(clip, seeded()).rgb, prior.enhance(clip, seeded()).rgb, atol=2e-3, rtol=0)


def test_the_folder_is_diffusers_layout_and_safetensors_only(folder):
    parts = {"vae", "unet", "image_encoder", "std", "scheduler", "feature_extractor"}
    assert {path.name for path in folder.iterdir()} == parts | {"model_index.json", "prior_config.json"}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.sigma_max == 80.0


def test_saving_in_half_precision_halves_the_files_and_leaves_the_prior_as_it_was(tmp_path):
    prior = tiny_prior()
    save_prior(prior, tmp_path / "full")
    save_prior(prior, tmp_path / "half", torch.float16)
    assert prior.unet.dtype == torch.float32
    sizes = [(tmp_path / name / "unet" / WEIGHTS).stat().st_size for name in ("full", "half")]
    assert 1.8 < sizes[0] / sizes[1] <= 2
    assert read_prior(tmp_path / "half").image_encoder.dtype == torch.float16
    assert load_prior(str(tmp_path / "half"), "cpu", torch.float32).unet.dtype == torch.float32


def test_a_failed_save_leaves_the_old_folder_and_no_debris(folder, monkeypatch):
    before = load_file(folder / "unet" / WEIGHTS)

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_prior(tiny_prior(seed=5), folder)
    monkeypatch.undo()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    after = load_file(folder / "unet" / WEIGHTS)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_saving_over_a_prior_replaces_it_whole(folder):
    (folder / "leftover.json").write_text("{}")
    save_prior(tiny_prior(seed=5), folder)
    assert not (folder / "leftover.json").exists()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.parametrize("name", ["bundeld", "/no/such/folder", "./prior", "a/b/c", ""])
def test_an_unknown_name_says_what_names_there_are(name):
    with pytest.raises(ValueError, match="give `bundled`, an existing folder, or a hub repository"):
        load_prior(name, "cpu")


def test_a_file_is_no_prior(tmp_path):
    (tmp_path / "prior.ckpt").write_text("")
    with pytest.raises(ValueError, match=r"a prior is a folder, but .* is a file"):
        resolve_folder(str(tmp_path / "prior.ckpt"))


def test_a_hub_name_without_network_says_so_and_names_the_way_out(monkeypatch):
    import huggingface_hub

    def offline(repository, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        FileNotFoundError, match=r"'owner/prior' .* no route to host.*`bundled`, which needs no network"
    ):
        load_prior("owner/prior", "cpu")


def test_a_hub_name_loads_what_the_hub_gives_and_asks_for_no_pickle(folder, monkeypatch):
    import huggingface_hub

    asked = {}

    def hub(repository, **kwargs):
        asked.update(kwargs, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert load_prior("owner/prior", "cpu").config.patch_size == 2
    assert asked["repository"] == "owner/prior"
    assert all(pattern.endswith((".json", ".safetensors")) for pattern in asked["allow_patterns"])


def test_a_package_without_bundled_weights_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "BUNDLED", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no bundled prior .* reinstall it"):
        load_prior("bundled", "cpu")


@pytest.mark.parametrize("part", ["vae", "unet", "image_encoder", "std"])
def test_a_lacking_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"lacks {part}/: it needs vae/, unet/, image_encoder/, std/"):
        load_prior(str(folder), "cpu")


def test_weights_in_pickle_files_are_not_read(folder):
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="Only safetensors are read"):
        load_prior(str(folder), "cpu")


@pytest.mark.parametrize("part", ["vae", "unet", "std", "image_encoder"])
def test_every_missing_unexpected_and_misshapen_tensor_is_named(folder, part):
    path = next((folder / part).glob("*.safetensors"))
    names = sorted(load_file(path))

    def change(tensors):
        del tensors[names[0]]
        tensors[names[1]] = torch.zeros(7)
        tensors["stray.weight"] = torch.zeros(2, 3)

    edit_tensors(path, change)
    with pytest.raises(ValueError, match="nothing was loaded") as caught:
        load_prior(str(folder), "cpu")
    message = str(caught.value)
    assert f"missing: {names[0]} (" in message
    assert "unexpected: stray.weight (2, 3)" in message
    assert f"shape: {names[1]} is (7,), config.json asks for (" in message
    assert "3 of " in message


def test_a_part_of_another_size_is_refused(folder, tmp_path):
    save_prior(tiny_prior(vae={"latent_channels": 6}), tmp_path / "other")
    shutil.rmtree(folder / "unet")
    shutil.copytree(tmp_path / "other" / "unet", folder / "unet")
    with pytest.raises(ValueError, match="parts do not fit: UNet out_channels is 6"):
        load_prior(str(folder), "cpu")


def test_a_cut_file_is_called_broken(folder):
    path = folder / "vae" / WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="broken or cut short"):
        load_prior(str(folder), "cpu")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "is no valid JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"patchsize": 2}', r"unknown entries \['patchsize'\]; known are"),
        ('{"patch_size": 0}', "`patch_size` must be at least 1"),
        ('{"patch_size": "two"}', "`patch_size` must be of type int, got 'two'"),
    ],
)
def test_broken_settings_are_named(folder, text, match):
    (folder / "prior_config.json").write_text(text)
    with pytest.raises(ValueError, match=match):
        load_prior(str(folder), "cpu")


def test_a_network_config_that_describes_nothing_is_named(folder):
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "block_out_channels": [32, 32, 32]}))
    with pytest.raises(ValueError, match=r"unet/config.json' describes no network: .*block_out_channels"):
        load_prior(str(folder), "cpu")


def stable_video_diffusion_folder(path):
    """A tiny pipeline folder written by diffusers and transformers alone, without anything of ours."""
    ours = tiny_prior(patch_size=1, extra_condition_channels=0)
    settings = {name: value for name, value in ours.unet.config.items() if not name.startswith(("_", "pose"))}
    unet = UNetSpatioTemporalConditionModel(**settings)
    unet.load_state_dict(ours.unet.state_dict())
    unet.save_pretrained(path / "unet")
    ours.vae.save_pretrained(path / "vae")
    ours.image_encoder.save_pretrained(path / "image_encoder")
    EulerDiscreteScheduler(sigma_min=0.01, sigma_max=44.0).save_pretrained(path / "scheduler")
    return ours


def test_a_plain_svd_pipeline_loads_with_the_papers_settings_and_an_untrained_std(tmp_path):
    ours = stable_video_diffusion_folder(tmp_path)
    prior = load_prior(str(tmp_path), "cpu", torch.float32)
    assert prior.unet.layout == "B"
    assert (prior.config.num_frames, prior.config.max_guidance, prior.config.sigma_max) == (25, 3.0, 44.0)
    clip = random_clip()
    latents = torch.randn(3, 4, 8, 12, generator=seeded())
    with torch.no_grad():
        stock = ours.vae.decode(latents.contiguous(memory_format=torch.channels_last), num_frames=3).sample
    torch.testing.assert_close(prior.decode(latents, clip), ((stock + 1) / 2).clamp(0, 1))


def test_a_plain_svd_pipeline_needs_its_scheduler(tmp_path):
    stable_video_diffusion_folder(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(FileNotFoundError, match="lacks scheduler/"):
        load_prior(str(tmp_path), "cpu")


def test_the_pose_conditioned_layout_is_told_by_its_tensors(tmp_path):
    stable_video_diffusion_folder(tmp_path)

    def add_pose_embedding(tensors):
        width = tensors["time_embedding.linear_1.weight"].shape[0]
        tensors["pose_embedding.linear_1.weight"] = torch.zeros(width, 1056)
        tensors["pose_embedding.linear_1.bias"] = torch.zeros(width)
        tensors["pose_embedding.linear_2.weight"] = torch.zeros(width, width)
        tensors["pose_embedding.linear_2.bias"] = torch.zeros(width)

    edit_tensors(tmp_path / "unet" / WEIGHTS, add_pose_embedding)
    assert read_prior(tmp_path).unet.layout == "A"
