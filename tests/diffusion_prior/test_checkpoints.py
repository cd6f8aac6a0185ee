import dataclasses
import json
import shutil

import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from PIL import Image
from references import layout_a_forward
from safetensors.torch import load_file, save_file
from svd_folders import tiny_unet, tiny_vae, write_svd_folder
from tiny_prior import random_clip, randomise, tiny_prior
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

from diffusion_prior import checkpoints
from diffusion_prior.checkpoints import (
    attention_heads,
    load_prior,
    read_prior,
    resolve,
    resolve_folder,
    save_prior,
)
from diffusion_prior.sampling_config import SamplingConfig
from diffusion_prior.types import ConditionClip

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


def test_a_file_that_cannot_be_written_is_an_error_of_the_operating_system(tmp_path):
    with pytest.raises(OSError, match=r"nowhere/file.safetensors: .*No such file"):
        checkpoints.save_file({"a": torch.ones(1)}, tmp_path / "nowhere/file.safetensors")


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


@pytest.mark.parametrize("part", ["vae", "unet", "image_encoder"])
def test_a_lacking_part_is_named(folder, part):
    shutil.rmtree(folder / part)
    with pytest.raises(FileNotFoundError, match=f"lacks {part}/: it needs vae/, unet/, image_encoder/, std/"):
        load_prior(str(folder), "cpu")


def test_a_folder_of_ours_without_std_decodes_as_the_vae_alone_would_and_says_so(folder, caplog):
    shutil.rmtree(folder / "std")
    with caplog.at_level("WARNING"):
        prior = load_prior(str(folder), "cpu", torch.float32)
    assert "has no std/: frames are decoded as the VAE alone would" in caplog.text
    for name, tensor in prior.vae.decoder.state_dict().items():
        assert torch.equal(prior.std.decoder.state_dict()[name], tensor)
    assert not prior.std.blend.weight.any()


def test_an_empty_std_folder_is_named(folder):
    (folder / "std" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="lacks std/"):
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


def test_what_lacks_is_named_by_its_file(folder):
    (folder / "vae" / "config.json").unlink()
    shutil.rmtree(folder / "image_encoder")
    with pytest.raises(FileNotFoundError, match=r"lacks vae/config\.json, image_encoder/: it needs"):
        load_prior(str(folder), "cpu")


def test_a_prior_of_ours_without_its_settings_is_told_from_stable_video_diffusion(tmp_path):
    save_prior(tiny_prior(), tmp_path)
    (tmp_path / "prior_config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no prior_config\.json, so that it was read as Stable Video"):
        load_prior(str(tmp_path), "cpu")


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


def test_a_plain_svd_pipeline_loads_with_the_papers_settings_and_an_untrained_std(tmp_path):
    write_svd_folder(tmp_path)
    prior = load_prior(str(tmp_path), "cpu", torch.float32)
    assert prior.unet.layout == "B"
    assert (prior.config.num_frames, prior.config.max_guidance, prior.config.sigma_max) == (25, 3.0, 44.0)
    assert (prior.config.frame_height, prior.config.frame_width, prior.latent_scale) == (512, 512, 0.18215)
    latents = torch.randn(3, 4, 8, 12, generator=seeded())
    with torch.no_grad():
        stock = tiny_vae().eval().decode(latents.contiguous(memory_format=torch.channels_last), num_frames=3).sample
    torch.testing.assert_close(prior.decode(latents, random_clip()), ((stock + 1) / 2).clamp(0, 1))


def test_a_plain_svd_pipeline_needs_its_scheduler(tmp_path):
    write_svd_folder(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    with pytest.raises(FileNotFoundError, match="lacks scheduler/"):
        load_prior(str(tmp_path), "cpu")


def test_weights_that_predict_noise_are_refused(tmp_path):
    write_svd_folder(tmp_path)
    EulerDiscreteScheduler(prediction_type="epsilon").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(ValueError, match=r"must have prediction_type 'v_prediction'.*got 'epsilon'"):
        load_prior(str(tmp_path), "cpu")


def unet_inputs():
    generator = seeded()
    sample = torch.randn(2, 3, 8, 4, 6, generator=generator)
    return sample, torch.randn(2, generator=generator), torch.randn(2, 3, 1, 16, generator=generator)


@torch.no_grad()
def test_a_loaded_unet_of_layout_b_is_diffusers_own_on_the_same_weights(tmp_path):
    write_svd_folder(tmp_path)
    ours = load_prior(str(tmp_path), "cpu", torch.float32).unet
    stock = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "unet").eval()
    sample, level, embeddings = unet_inputs()
    micro = torch.tensor([[6.0, 127.0, 0.02]] * 2)
    wanted = stock(sample, level, encoder_hidden_states=embeddings[:, 0], added_time_ids=micro).sample
    given = ours(sample, level, embeddings[:, :1].expand(-1, 3, -1, -1), micro)
    torch.testing.assert_close(given, wanted, rtol=1e-4, atol=1e-4 * wanted.std().item())


@torch.no_grad()
def test_a_loaded_unet_of_layout_a_is_the_authors_forward_stated_anew(tmp_path):
    write_svd_folder(tmp_path, "A")
    ours = load_prior(str(tmp_path), "cpu", torch.float32).unet
    assert ours.layout == "A"
    sample, level, embeddings = unet_inputs()
    poses = torch.randn(2, 3, 22, generator=seeded())
    wanted = layout_a_forward(tiny_unet("A"), sample, level, embeddings, poses)
    torch.testing.assert_close(
        ours(sample, level, embeddings, poses), wanted, rtol=1e-3, atol=1e-3 * wanted.std().item()
    )


def test_layout_a_gets_the_settings_that_its_weights_need(tmp_path):
    config = read_prior(write_svd_folder(tmp_path, "A")).config
    assert (config.num_frames, config.frame_height, config.frame_width) == (26, 512, 960)
    assert config.misread_quaternions
    assert not config.subtract_one_from_fps
    assert not config.unconditional_micro
    assert not config.halved_clip_input


def test_a_pose_conditioned_prior_enhances_and_stays_itself_when_saved(tmp_path):
    prior = load_prior(str(write_svd_folder(tmp_path / "authors", "A")), "cpu", torch.float32)
    save_prior(prior, tmp_path / "ours")
    again = load_prior(str(tmp_path / "ours"), "cpu", torch.float32)
    assert again.config == prior.config
    assert again.unet.layout == "A"
    clip = dataclasses.replace(random_clip(), camera_to_world=torch.eye(4)[:3].repeat(3, 1, 1), fov_x_rad=1.0)
    again.sampling.steps = 1
    assert again.enhance(clip, seeded()).rgb.shape == clip.rgb.shape


@pytest.mark.parametrize("layout", ["A", "B"])
@pytest.mark.parametrize("named", ["checkpoint-80000", "checkpoint-80000/unet"])
def test_a_lone_unet_takes_the_other_parts_from_the_prior_behind_the_at_sign(tmp_path, layout, named):
    base = write_svd_folder(tmp_path / "svd")
    tiny_unet(layout, seed=7).save_pretrained(tmp_path / "checkpoint-80000" / "unet")
    prior = load_prior(f"{tmp_path / named}@{base}", "cpu", torch.float32)
    assert prior.unet.layout == layout
    assert torch.equal(prior.unet.conv_in.weight, tiny_unet(layout, seed=7).conv_in.weight)
    assert torch.equal(prior.vae.encoder.conv_in.weight, tiny_vae().encoder.conv_in.weight)


def test_a_lone_unet_without_a_base_asks_the_hub_for_svd(tmp_path, monkeypatch):
    import huggingface_hub

    base, asked = write_svd_folder(tmp_path / "svd"), []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: asked.append(name) or str(base))
    tiny_unet().save_pretrained(tmp_path / "checkpoint-5" / "unet")
    assert read_prior(*dataclasses.astuple(resolve(str(tmp_path / "checkpoint-5")))).unet.layout == "B"
    assert asked[0] == "stabilityai/stable-video-diffusion-img2vid-xt"


def test_a_base_for_a_prior_that_is_complete_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="is no folder of a UNet alone"):
        load_prior(f"{folder}@{folder}", "cpu")


def test_half_precision_variants_and_shards_are_read(tmp_path):
    write_svd_folder(tmp_path, variant="fp16")
    tiny_unet().save_pretrained(tmp_path / "sharded", max_shard_size="500KB")
    assert len(list((tmp_path / "sharded").glob("*-of-*.safetensors"))) > 1
    shutil.rmtree(tmp_path / "unet")
    (tmp_path / "sharded").rename(tmp_path / "unet")
    prior = load_prior(str(tmp_path), "cpu", torch.float32)
    assert torch.equal(prior.unet.conv_out.weight, tiny_unet().conv_out.weight)


def test_the_hub_is_asked_for_half_precision_first_and_for_whole_files_of_what_has_none(folder, monkeypatch):
    import huggingface_hub

    asked = []
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    parts = ("unet", "image_encoder", "std")
    contents = {path: path.read_bytes() for part in parts for path in (folder / part).glob("*.safetensors")}
    for path in contents:
        path.unlink()

    def hub(repository, allow_patterns):
        asked.append(set(allow_patterns))
        if len(asked) == 2:
            for path, content in contents.items():
                path.write_bytes(content)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert load_prior("owner/prior", "cpu").config.patch_size == 2
    assert asked[0] == {"*.json", "*/*.json", "*/*.fp16.safetensors", "diffusion_pytorch_model*.fp16.safetensors"}
    assert asked[1] == {f"{part}/*.safetensors" for part in parts}


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_a_hub_repository_of_a_unet_alone_is_fetched_whole_and_nothing_else(tmp_path, monkeypatch, variant):
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    remote, cache, base = tmp_path / "remote", tmp_path / "cache", tmp_path / "base"
    write_svd_folder(base)
    tiny_unet().save_pretrained(remote)
    (remote / WEIGHTS).rename(remote / f"diffusion_pytorch_model{variant}.safetensors")
    (remote / "svd_xt.safetensors").write_bytes(b"the same once more, in another layout")
    cache.mkdir()

    def hub(repository, allow_patterns):
        names = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copy(remote / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    folders = checkpoints.resolve(f"someone/unet@{base}")
    assert (folders.folder, folders.unet) == (base, cache)
    assert {path.name for path in cache.iterdir()} == {"config.json", f"diffusion_pytorch_model{variant}.safetensors"}


def test_attention_heads_are_those_of_the_config_even_where_they_are_odd(tmp_path, caplog):
    write_svd_folder(tmp_path)
    tiny_unet(num_attention_heads=(2, 2)).save_pretrained(tmp_path / "unet")
    with caplog.at_level("WARNING"):
        unet = read_prior(tmp_path).unet
    assert tuple(unet.config["num_attention_heads"]) == (2, 2)
    assert "attention heads [2, 2] are [16, 32] channels wide" in caplog.text


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        ({"num_attention_heads": [5, 10, 10, 20], "_diffusers_version": "0.30.0"}, [5, 10, 10, 20]),
        ({"_diffusers_version": "0.26.3"}, (5, 10, 10, 20)),
        ({"_diffusers_version": "0.24.0.dev0"}, (5, 10, 10, 20)),
        ({"_diffusers_version": "0.27.0"}, (5, 10, 20, 20)),
        ({"_diffusers_version": "1.0.0"}, (5, 10, 20, 20)),
    ],
)
def test_heads_that_no_config_names_are_the_default_of_the_release_that_wrote_it(tmp_path, config, heads):
    assert attention_heads(config, tmp_path) == heads


def test_heads_that_nothing_tells_are_asked_for(tmp_path):
    with pytest.raises(ValueError, match=r"no tensor tells: add `num_attention_heads`.*\[5, 10, 20, 20\]"):
        attention_heads({}, tmp_path)


def test_another_number_of_heads_gives_other_pictures_from_equal_tensors():
    # the trap itself: nothing but the result tells
    one, other = tiny_unet(num_attention_heads=(2, 4)), tiny_unet(num_attention_heads=(2, 2))
    assert {n: t.shape for n, t in one.state_dict().items()} == {n: t.shape for n, t in other.state_dict().items()}
    for unet in (one, other):
        randomise(unet.mid_block, std=0.5)  # so that attention attends
    sample, level, embeddings = unet_inputs()
    micro = torch.tensor([[6.0, 127.0, 0.02]] * 2)
    with torch.no_grad():
        results = [unet(sample, level, embeddings[:, 0], micro).sample for unet in (one, other)]
    assert not torch.allclose(*results, rtol=1e-2)


def test_a_folder_of_svd_samples_what_diffusers_own_pipeline_samples(tmp_path):
    # 224 px: what the pipeline squeezes pictures to, whatever its encoder takes
    folder = write_svd_folder(tmp_path, encoder_px=224)
    pipeline = StableVideoDiffusionPipeline(
        AutoencoderKLTemporalDecoder.from_pretrained(folder / "vae"),
        CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder"),
        UNetSpatioTemporalConditionModel.from_pretrained(folder / "unet"),
        EulerDiscreteScheduler.from_pretrained(folder / "scheduler"),
        CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    prior = load_prior(str(folder), "cpu", torch.float32)
    prior.config = dataclasses.replace(prior.config, noise_augmentation=0.0, colour_correction=False, max_guidance=2.5)
    prior.sampling = SamplingConfig(steps=3)
    # One colour, which looks the same however it is squeezed; the pipeline is shown one picture for all frames.
    frames, height, width = 4, 16, 24
    colour = (51, 128, 179)
    shown = (torch.tensor(colour) / 255)[:, None, None].expand(3, height, width)
    ones = torch.ones(frames, 1, height, width)
    clip = ConditionClip(rgb=shown.repeat(frames, 1, 1, 1), alpha=ones, disparity=ones)
    ours = prior.sample(clip, torch.Generator().manual_seed(5))
    noise = torch.randn(frames, 4, height // 2, width // 2, generator=torch.Generator().manual_seed(5))
    theirs = pipeline(
        Image.new("RGB", (width, height), colour),
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=3,
        min_guidance_scale=1.0,
        max_guidance_scale=2.5,
        fps=7,
        motion_bucket_id=127,
        noise_aug_strength=0.0,
        latents=noise[None],
        output_type="pt",
    ).frames[0]
    assert float(theirs.std()) > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
