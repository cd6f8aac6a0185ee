"""More processes, larger networks, more data: what a training must keep to when it outgrows one machine."""

import contextlib
import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from svd_folders import tiny_unet, write_svd_folder
from torch import nn
from torch.utils.data import DataLoader

from diffusion_prior.checkpoints import load_prior, read_prior
from diffusion_prior.data.clips import ClipConfig
from diffusion_prior.data.pairs import find_runs, read_header
from diffusion_prior.full_size import full_size_prior
from diffusion_prior.training import loop, shards, train_ldm
from diffusion_prior.training.config import ScaleConfig, TrainingConfig
from diffusion_prior.training.loop import (
    Losses,
    Progress,
    State,
    agreed_batches,
    load_checkpoint,
    make_accelerator,
    make_optimizer,
)
from diffusion_prior.training.setup import fixed_clips
from diffusion_prior.training.sharding import fit_optimizer
from diffusion_prior.training.shards import PackShards, ShardedClips, list_shards, pack
from diffusion_prior.training.train_ldm import LdmConfig
from diffusion_prior.training.train_std import StdConfig
from diffusion_prior.training.train_vae import VaeConfig
from diffusion_prior.training.trainable import choose_trainable, merge_additions
from diffusion_prior.unet import SpatioTemporalUNet

CLIPS = ClipConfig(num_frames=3, batch_size=1, crop_px=16, size_multiple=8, good_render_probability=0.0)


def ldm(pairs, prior, output, **scale) -> LdmConfig:
    return LdmConfig(
        pairs=pairs,
        output=output,
        prior=prior,
        steps=2,
        log_every=1,
        save_every=1,
        warmup_steps=0,
        precision="fp32",
        validation_clips=1,
        clips=CLIPS,
        scale=ScaleConfig(**scale),
    )


def log(output) -> list[dict]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    # A training killed after it logged a step and before it saved it logs that step again.
    return list({line["step"]: line for line in lines if "loss" in line}.values())


def launch_command(processes: int, pairs, prior, output, *options: str) -> tuple[list[str], dict[str, str]]:
    """The same training by `torchrun` on a CPU, the processes talking through gloo; the command and its environment."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command += ["diffusion_prior.training.train_ldm", "--pairs", str(pairs), "--output", str(output)]
    command += ["--prior", str(prior), "--steps", "2", "--log-every", "1", "--save-every", "1", "--warmup-steps", "0"]
    command += ["--precision", "fp32", "--validation-clips", "1", "--clips.num-frames", "3", "--clips.batch-size", "1"]
    command += ["--clips.crop-px", "16", "--clips.size-multiple", "8", "--clips.good-render-probability", "0.0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [*command, *options], environment


def launch(processes: int, pairs, prior, output, *options: str) -> None:
    """Run such a training to its end."""
    command, environment = launch_command(processes, pairs, prior, output, *options)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def launch_and_kill(processes: int, pairs, prior, output, *options: str) -> None:
    """Kill such a training as soon as its first checkpoint is there."""
    command, environment = launch_command(processes, pairs, prior, output, *options)
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as running:
        deadline = time.monotonic() + 300
        while not (output / "checkpoint.pt").exists() and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    assert (output / "checkpoint.pt").exists()


def weights(output) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint.pt", weights_only=True)["losses"]


def assert_same_training(one, other) -> None:
    """Equal losses, gradients and weights, to what sums in another order leave."""
    for a, b in zip(log(one), log(other), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    # Adam's two steps are up to 5e-4 and 2.5e-4 long whatever the gradient; where that is nearly zero its sign is chance,
    # so the mean is compared. Measured: 2e-7 to 3e-7; 4e-5 where optimiser states met the wrong weights.
    differences = torch.cat([(first[name] - second[name]).abs().flatten() for name in first])
    assert differences.mean() < 2e-6


@pytest.fixture(scope="module")
def together(pairs, tiny_prior, tmp_path_factory):
    """One process that averages two batches a step."""
    output = tmp_path_factory.mktemp("together")
    train_ldm.run(ldm(pairs, tiny_prior, output, batches_per_step=2))
    return output


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_batches(pairs, tiny_prior, together, tmp_path):
    launch(2, pairs, tiny_prior, tmp_path)
    assert_same_training(tmp_path, together)


@pytest.mark.slow
def test_two_processes_that_split_the_network_equal_one_that_has_it_whole(pairs, tiny_prior, together, tmp_path):
    launch(2, pairs, tiny_prior, tmp_path, "--scale.sharding")
    assert_same_training(tmp_path, together)
    # what was split is written whole
    assert load_prior(str(tmp_path / "prior"), "cpu", torch.float32).unet.conv_in.weight.isfinite().all()


@pytest.mark.slow
def test_a_training_of_two_split_processes_goes_on_in_one_whole_as_if_it_had_not_been_killed(
    pairs, tiny_prior, together, tmp_path
):
    launch_and_kill(2, pairs, tiny_prior, tmp_path, "--scale.sharding")
    train_ldm.run(ldm(pairs, tiny_prior, tmp_path))
    assert_same_training(tmp_path, together)


def adam_on_ones(memory_format: torch.memory_format) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    """A convolution's kernels, all 1, and an optimiser that has made no step."""
    kernels = nn.Parameter(torch.ones(2, 3, 2, 2).contiguous(memory_format=memory_format))
    return kernels, torch.optim.AdamW([kernels], lr=0.1, fused=True)


def test_optimiser_states_of_kernels_in_another_memory_order_meet_the_same_weights():
    gradients = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    plain, adam = adam_on_ones(torch.contiguous_format)
    other, other_adam = adam_on_ones(torch.channels_last)
    plain.grad = gradients[0].clone()
    adam.step()
    with torch.no_grad():
        other.copy_(plain)
    other_adam.load_state_dict(copy.deepcopy(adam.state_dict()))
    fit_optimizer(other_adam)
    for kernels, optimizer in ((plain, adam), (other, other_adam)):
        kernels.grad = torch.empty_like(kernels).copy_(gradients[1])
        optimizer.step()
    torch.testing.assert_close(other, plain)


def state(saved: int | None, players: int = 1) -> State:
    class Some(Losses):
        def forward(self, batch, generator, progress, player):
            raise AssertionError("nothing is computed here")

        @property
        def players(self):
            return {str(i): self for i in range(players)}

    return State(Progress(), Some(), {}, batches_per_step=saved)


def test_the_number_of_batches_is_the_checkpoints_then_the_settings_then_one_per_process(tmp_path):
    config = TrainingConfig(pairs=tmp_path, output=tmp_path)
    asked = dataclasses.replace(config, scale=ScaleConfig(batches_per_step=4))
    assert agreed_batches(state(None), config, 3) == 3
    assert agreed_batches(state(None), asked, 2) == 4
    assert agreed_batches(state(6), config, 2) == 6
    with pytest.raises(ValueError, match="must stay 6, as the checkpoint was trained, got 4"):
        agreed_batches(state(6), asked, 2)
    with pytest.raises(ValueError, match="4 batches cannot be shared evenly by 3"):
        agreed_batches(state(None), asked, 3)
    with pytest.raises(ValueError, match="against a discriminator takes one batch per process"):
        agreed_batches(state(None, players=2), asked, 2)


def names_that_train(prior) -> set[str]:
    return {name for name, parameter in prior.unet.named_parameters() if parameter.requires_grad}


def test_what_trains_is_what_was_chosen(tmp_path):
    folder = write_svd_folder(tmp_path, "A")
    prior = read_prior(folder)
    choose_trainable(prior, ScaleConfig(trainable="temporal"))
    chosen = names_that_train(prior)
    assert any("pose_embedding" in name for name in chosen)
    assert all("temporal_transformer_block" in name or "pose_embedding" in name for name in chosen)
    assert not any(parameter.requires_grad for parameter in prior.image_encoder.parameters())
    choose_trainable(prior, ScaleConfig(trainable="unet"))
    assert names_that_train(prior) == {name for name, _ in prior.unet.named_parameters()}
    choose_trainable(prior, ScaleConfig(trainable="all"))
    assert all(parameter.requires_grad for parameter in prior.image_encoder.parameters())


def test_low_rank_additions_change_nothing_at_first_train_alone_and_leave_no_trace_once_merged(tmp_path):
    prior = read_prior(write_svd_folder(tmp_path))
    names = set(prior.unet.state_dict())
    sample = torch.randn(1, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    inputs = sample, torch.zeros(1), torch.ones(1, 2, 1, 16), torch.ones(1, 3)
    before = prior.unet(*inputs)
    choose_trainable(prior, ScaleConfig(trainable="lora", lora_rank=2))
    assert all("lora_" in name for name in names_that_train(prior))
    torch.testing.assert_close(prior.unet(*inputs), before)
    with torch.no_grad():
        for name, parameter in prior.unet.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    changed = prior.unet(*inputs)
    assert not torch.allclose(changed, before)
    merge_additions(prior.unet)
    assert set(prior.unet.state_dict()) == names
    torch.testing.assert_close(prior.unet(*inputs), changed, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("trainable", ["temporal", "lora"])
def test_a_partial_training_changes_its_part_and_its_checkpoint_holds_no_more(pairs, tiny_prior, tmp_path, trainable):
    config = ldm(pairs, tiny_prior, tmp_path, trainable=trainable, lora_rank=2, gradient_checkpointing=True)
    train_ldm.run(config)
    marks = {"temporal": "temporal_transformer_block", "lora": "lora_"}
    assert weights(tmp_path)
    assert all(marks[trainable] in name for name in weights(tmp_path))
    before, after = (load_prior(str(folder), "cpu", torch.float16) for folder in (tiny_prior, tmp_path / "prior"))
    state_before, state_after = before.unet.state_dict(), after.unet.state_dict()
    assert state_before.keys() == state_after.keys()
    changed = {name for name in state_before if not torch.equal(state_before[name], state_after[name])}
    expected = "temporal_transformer_block" if trainable == "temporal" else "attn"
    assert changed
    assert all(expected in name for name in changed)


def test_frames_encoded_one_by_one_train_alike(pairs, tiny_prior, together, tmp_path, monkeypatch):
    counts, real = set(), train_ldm.encode_frames

    def watching(vae, rgb, patch_size, at_once=None):
        counts.add(at_once)
        return real(vae, rgb, patch_size, at_once)

    monkeypatch.setattr(train_ldm, "encode_frames", watching)
    train_ldm.run(ldm(pairs, tiny_prior, tmp_path, batches_per_step=2, encode_frames=1))
    assert counts == {1}
    assert_same_training(tmp_path, together)


def test_encoding_a_few_frames_at_once_is_refused_where_the_vae_trains(tmp_path):
    with pytest.raises(ValueError, match="got encode_frames=2"):
        VaeConfig(pairs=tmp_path, output=tmp_path, scale=ScaleConfig(encode_frames=2))


def test_checkpointed_gradients_are_those_of_kept_activations():
    sample = torch.randn(1, 2, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        unet = SpatioTemporalUNet(**{k: v for k, v in tiny_unet().config.items() if not k.startswith("_")}).train()
        unet.load_state_dict(tiny_unet().state_dict())
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(sample, torch.zeros(1), torch.ones(1, 2, 1, 16), torch.ones(1, 3)).square().mean().backward()
        gradients.append({n: p.grad for n, p in unet.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_one_forward_and_backward_of_the_full_size_without_its_memory():
    prior = full_size_prior("A", torch.float32)
    unet = prior.unet.train()
    choose_trainable(prior, ScaleConfig(trainable="temporal", gradient_checkpointing=True))
    meta = {"device": "meta"}
    out = unet(
        torch.empty(1, 26, 8, 64, 120, **meta),
        torch.empty(1, **meta),
        torch.empty(1, 26, 1, 1024, **meta),
        torch.empty(1, 26, 22, **meta),
    )
    assert out.shape == (1, 26, 4, 64, 120)
    out.square().mean().backward()
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) > 200e6
    # attention to a single token needs neither queries nor keys, nor the norm before them
    without = {name for name, parameter in trained.items() if parameter.grad is None}
    assert all("norm2" in name or "attn2.to_q" in name or "attn2.to_k" in name for name in without)
    assert all(p.grad is None for n, p in unet.named_parameters() if n not in trained)


def test_eight_bit_adam_is_used_when_it_is_installed_and_named_when_it_is_not(tmp_path, monkeypatch):
    config = TrainingConfig(pairs=tmp_path, output=tmp_path, scale=ScaleConfig(optimizer="adamw8bit"))
    parameters = [nn.Parameter(torch.ones(2))]
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        make_optimizer(parameters, config)
    stand_in = types.ModuleType("bitsandbytes.optim")
    stand_in.AdamW8bit = torch.optim.AdamW  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", stand_in)
    assert make_optimizer(parameters, config).param_groups[0]["weight_decay"] == config.weight_decay


def test_the_launch_configurations_that_are_shipped_are_accelerates():
    folder = Path(loop.__file__).parent / "accelerate"
    read = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    assert set(read) == {"several_gpus", "several_machines", "fsdp"}
    assert all(config.distributed_type == "MULTI_GPU" for config in read.values())
    assert read["several_machines"].num_machines > 1


def test_accelerates_own_fsdp_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"--scale\.sharding`"):
        make_accelerator(TrainingConfig(pairs=tmp_path, output=tmp_path))


@pytest.fixture(scope="module")
def packed(other_pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    pack(PackShards(pairs=other_pairs, output=folder, runs_per_shard=1))
    return folder


def clips_of(packed, lanes=2, **changes) -> ShardedClips:
    return ShardedClips(ScaleConfig(shards=str(packed), **changes), CLIPS, seed=0, lanes=lanes)


def runs_of(packed, folder) -> list[Path]:
    """What is in shards, unpacked into a folder."""
    runs = []
    for number, address in enumerate(list_shards(str(packed))):
        (folder / str(number)).mkdir()
        runs += shards.unpack(address, folder / str(number))
    return runs


def test_shards_hold_every_run_that_trains_once(other_pairs, packed, tmp_path):
    assert len(list_shards(str(packed))) == 2
    contents = [{file.name: file.read_bytes() for file in run.iterdir()} for run in runs_of(packed, tmp_path)]
    training = [run for run in find_runs(other_pairs) if run.parent.name != "water"]
    wanted = [{file.name: file.read_bytes() for file in run.iterdir()} for run in training]
    assert all(content in wanted for content in contents)
    assert len(contents) == len(wanted) == 2


def test_scenes_that_are_named_for_validation_are_left_out_of_the_shards(other_pairs, tmp_path):
    pack(PackShards(pairs=other_pairs, output=tmp_path / "shards", validation_scenes=("ale",)))
    assert {read_header(run).scene for run in runs_of(tmp_path / "shards", tmp_path)} == {"juice", "water"}


def assert_same_batch(one, other) -> None:
    for name in ("rgb", "target", "camera_to_world", "fov_x_rad"):
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_shards_of_another_packing_are_not_mixed_in(other_pairs, packed):
    with pytest.raises(FileExistsError, match=r"holds \d+ shards already, pairs-000000.tar the first"):
        pack(PackShards(pairs=other_pairs, output=packed))


def test_batches_from_shards_depend_on_their_number_alone(packed):
    clips = clips_of(packed)
    for number in (3, 0, 3, 1):
        assert_same_batch(clips[number], clips_of(packed)[number])
    assert not torch.equal(clips[0].rgb, clips[2].rgb)


def test_lanes_go_through_shards_of_their_own_and_change_them_after_so_many_steps(packed):
    clips = clips_of(packed, steps_per_shard=3)
    first = [clips.address(number) for number in range(0, 6, 2)]
    assert len(set(first)) == 1  # lane 0, steps 0 to 2
    assert clips.address(0) != clips.address(1)  # two lanes, two shards
    assert {clips.address(2 * step) for step in range(30)} == set(clips.addresses)


def unpacked_by(clips) -> set[str]:
    return {path.name for path in clips._folder.iterdir() if path.is_dir()}


def test_no_more_shards_lie_unpacked_than_lanes_are_read_and_none_afterwards(packed):
    clips = clips_of(packed, lanes=1, steps_per_shard=1)
    for number in range(4):
        assert clips[number].rgb.shape[1] == 3
        assert len(unpacked_by(clips)) == 1
    folder = clips._folder
    del clips
    assert not folder.exists()


def test_loader_workers_draw_the_same_batches_and_stream_every_shard_once_together(packed, tmp_path, monkeypatch):
    streamed, real = tmp_path / "streamed", shards.unpack

    def watching(address, folder):
        with streamed.open("a") as file:
            file.write(f"{address}\n")
        return real(address, folder)

    monkeypatch.setattr(shards, "unpack", watching)
    clips = clips_of(packed)
    loader = DataLoader(clips, batch_size=None, sampler=range(8), num_workers=3, multiprocessing_context="fork")
    batches = list(loader)
    assert sorted(streamed.read_text().split()) == clips.addresses  # of two lanes, each read by all three workers
    for number, batch in enumerate(batches):
        assert_same_batch(batch, clips_of(packed)[number])


def test_the_last_worker_that_needed_a_shard_removes_it(packed):
    one = clips_of(packed, lanes=1, steps_per_shard=1)
    other = copy.deepcopy(one)  # as a worker gets it
    assert_same_batch(one[0], other[0])
    first = unpacked_by(one)
    assert len(first) == 1
    one[1]
    assert first < unpacked_by(one)  # the other one may read on
    other[1]
    assert len(unpacked_by(one)) == 1
    assert not first & unpacked_by(one)


def test_a_training_draws_its_clips_from_the_shards_and_not_from_the_pairs(
    pairs, packed, tiny_prior, tmp_path, monkeypatch
):
    seen, real = [], train_ldm.LdmLosses.forward

    def watching(self, batch, *arguments):
        seen.append(batch)
        return real(self, batch, *arguments)

    monkeypatch.setattr(train_ldm.LdmLosses, "forward", watching)
    train_ldm.run(ldm(pairs, tiny_prior, tmp_path, shards=str(packed), batches_per_step=2))
    assert len(seen) == 4  # two lanes of two steps
    for number, batch in enumerate(seen):
        assert_same_batch(batch, clips_of(packed)[number])


def test_beside_shards_the_pairs_may_be_of_validation_scenes_alone(pairs, packed, tiny_prior, tmp_path):
    config = ldm(pairs, tiny_prior, tmp_path, shards=str(packed))
    config = dataclasses.replace(config, validation_scenes=("beer", "coke"), validation_clips=2)
    assert len(fixed_clips(config, 3, 8)) == 2
    with pytest.raises(ValueError, match="leave at least one to train on"):
        fixed_clips(dataclasses.replace(config, scale=ScaleConfig()), 3, 8)


def test_patterns_with_braces_stand_for_many_shards():
    addresses = list_shards("https://host/pairs-{000008..000011}.tar")
    assert addresses == [f"https://host/pairs-{number:06d}.tar" for number in (8, 9, 10, 11)]


def test_a_broken_shard_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"make some with `python -m diffusion_prior.training.shards"):
        list_shards(str(tmp_path))
    (tmp_path / "pairs-000000.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(ValueError, match=r"pairs-000000\.tar cannot be read"):
        clips_of(tmp_path)[0]


def test_a_checkpoint_from_before_batches_were_counted_is_read(pairs, tiny_prior, together):
    content = torch.load(together / "checkpoint.pt", weights_only=True)
    del content["batches_per_step"]
    torch.save(content, together / "old.pt")
    prior = load_prior(str(tiny_prior), "cpu", torch.float32)
    task = train_ldm.LdmTask(ldm(pairs, tiny_prior, together), prior)
    started = loop._start(task.losses, task.config)
    load_checkpoint(together / "old.pt", started)
    assert started.progress.step == 2
    assert started.batches_per_step is None


def test_settings_of_scale_that_cannot_work_are_refused():
    for entry in ("lora_rank", "encode_frames", "batches_per_step", "steps_per_shard"):
        with pytest.raises(ValueError, match=f"{entry} must be at least 1, got 0"):
            ScaleConfig(**{entry: 0})
    with pytest.raises(
        ValueError, match=r"got optimizer=adamw8bit; set `optimizer` to adamw, or train without `sharding`"
    ):
        ScaleConfig(sharding=True, optimizer="adamw8bit")


@pytest.mark.parametrize("kind", [StdConfig, VaeConfig])
@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"trainable": "temporal"}, "trainable='temporal'"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing=True"),
        ({"trainable": "lora", "lora_rank": 4}, "trainable='lora', lora_rank=4"),
    ],
)
def test_settings_of_the_unet_are_refused_where_it_does_not_train(tmp_path, kind, changed, named):
    with pytest.raises(ValueError, match=rf"must stay as they are by default, got {named}; leave them out"):
        kind(pairs=tmp_path, output=tmp_path, scale=ScaleConfig(**changed))
    kind(pairs=tmp_path, output=tmp_path, scale=ScaleConfig(optimizer="adamw8bit", batches_per_step=2))


def test_a_prior_whose_unet_has_no_temporal_blocks_cannot_train_them(tiny_prior):
    prior = read_prior(tiny_prior)
    prior.unet = nn.Linear(2, 2)  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="set `trainable` to all"):
        choose_trainable(prior, ScaleConfig(trainable="temporal"))
