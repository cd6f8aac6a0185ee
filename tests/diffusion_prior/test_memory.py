import dataclasses

import pytest
import torch
from tiny_prior import random_clip, randomise, tiny_prior
from torch import nn

from diffusion_prior import memory, prior as prior_module
from diffusion_prior.accounting import cost_of, weight_bytes
from diffusion_prior.full_size import full_size_prior
from diffusion_prior.memory import (
    CONTEXT_BYTES,
    GIB,
    PRESETS,
    MemoryPreset,
    OutOfDeviceMemory,
    choose_preset,
    estimate_memory,
    estimate_presets,
    explain_exhaustion,
    is_exhaustion,
)
from diffusion_prior.published import LAYOUT_A_FRAMES, LAYOUT_A_SIZE


def seeded():
    return torch.Generator().manual_seed(0)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def test_flops_of_matrix_products_convolutions_and_attention_by_hand():
    assert cost_of(lambda: meta(3, 5) @ meta(5, 7)).flops == 2 * 3 * 5 * 7
    # 4 x 6 pixels, 8 channels out, each from 3 x 3 x 2 numbers
    convolution = cost_of(lambda: nn.functional.conv2d(meta(1, 2, 4, 6), meta(8, 2, 3, 3), padding=1))
    assert convolution.flops == 2 * (4 * 6) * 8 * (3 * 3 * 2)
    # scores: 2 heads x 10 x 12 x 16 products; then the same for the values
    query, key = meta(1, 2, 10, 16), meta(1, 2, 12, 16)
    attention = cost_of(lambda: nn.functional.scaled_dot_product_attention(query, key, key))
    assert attention.flops == 2 * 2 * (2 * 10 * 12 * 16)


def test_live_bytes_by_hand():
    given = meta(1000)

    def chain():
        first = given + 1  # 4,000 bytes
        second = first * 2  # 8,000 together
        third = first + second  # 12,000
        del first, second  # 4,000
        return third + 1  # 8,000

    assert cost_of(chain).peak_bytes == 12_000


def test_a_view_or_an_operation_in_place_costs_nothing():
    given = meta(1000)
    assert cost_of(lambda: given.view(10, 100).add_(1)).peak_bytes == 0


def test_weights_count_in_their_own_precision():
    layer = nn.Linear(3, 4)  # 16 numbers
    assert weight_bytes([layer]) == 64
    assert weight_bytes([layer.half()]) == 32


def test_thriftier_presets_need_less_and_every_estimate_holds_weights_and_context():
    prior = tiny_prior(num_frames=12)
    peaks = [estimate.peak for estimate in estimate_presets(prior, 12, 64, 64, PRESETS.values())]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < peaks[0]
    assert peaks[0] > weight_bytes(prior.modules.values()) + CONTEXT_BYTES


def test_estimates_run_nothing_and_leave_the_prior_as_it_was():
    prior, clip = tiny_prior(), random_clip()
    before = prior.enhance(clip, seeded()).rgb
    text = str(estimate_memory(prior, 3, 16, 24, PRESETS["8gb"]))
    assert text.endswith(")")
    assert "GiB (encode" in text
    assert torch.equal(prior.enhance(clip, seeded()).rgb, before)


def test_the_first_preset_that_fits_is_chosen_and_the_thriftiest_where_none_does():
    prior, clip = tiny_prior(num_frames=11), (11, 32, 32)
    whole = estimate_memory(prior, *clip, PRESETS["all"])
    assert choose_preset(prior, *clip, whole.peak) == ("all", whole)
    assert choose_preset(prior, *clip, whole.peak - 1)[0] == "24gb"
    assert choose_preset(prior, *clip, 1)[0] == "8gb"


def test_presets_estimated_together_are_estimated_as_each_alone(monkeypatch):
    prior, presets = tiny_prior(num_frames=6), [PRESETS["all"], MemoryPreset(offload=True, decode_frames=3)]
    together = list(estimate_presets(prior, 6, 16, 24, presets))
    for preset, estimate in zip(presets, together):
        monkeypatch.setattr(memory, "_COUNTED", {})
        assert estimate_memory(prior, 6, 16, 24, preset) == estimate
    assert together[0] != together[1]


def test_networks_of_one_make_are_counted_once(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, "_COUNTED", {})
    monkeypatch.setattr(memory, "_meta_call", lambda module, *given: calls.append(module) or cost_of(lambda: None))
    for seed in range(2):
        estimate_memory(tiny_prior(seed), 3, 16, 24, PRESETS["all"])
        assert len(calls) == 4
    for others in (
        [tiny_prior().to(dtype=torch.float16), 3, 16, 24],
        [tiny_prior(unet={"num_attention_heads": (2, 2)}), 3, 16, 24],
        [tiny_prior(num_frames=4), 3, 16, 24],
        [tiny_prior(), 3, 16, 32],
    ):
        calls.clear()
        estimate_memory(*others, PRESETS["all"])
        assert calls


@pytest.mark.parametrize(
    "preset",
    [MemoryPreset(offload=True), MemoryPreset(slices=True), MemoryPreset(offload=True, slices=True)],
)
def test_offloading_and_slicing_change_no_result(preset):
    plain, thrifty = tiny_prior(max_guidance=2.0), tiny_prior(max_guidance=2.0).use_memory_preset(preset)
    for prior in (plain, thrifty):
        randomise(prior.unet, std=0.05)
    clip = random_clip(5, 16, 24)
    torch.testing.assert_close(
        thrifty.enhance(clip, seeded()).rgb, plain.enhance(clip, seeded()).rgb, rtol=1e-4, atol=2e-3
    )


def test_with_offloading_one_network_at_a_time_is_moved_in_and_out(monkeypatch):
    prior = tiny_prior().use_memory_preset(MemoryPreset(offload=True))
    names = {id(module): name for name, module in prior.modules.items()}
    moves = []
    real = nn.Module.to

    def watching(module, *args, **kwargs):
        if id(module) in names:
            moves.append(names[id(module)])
        return real(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", watching)
    prior.enhance(random_clip(), seeded())
    assert moves == ["vae", "vae", "image_encoder", "image_encoder", "unet", "unet", "std", "std"]


def test_chunked_and_tiled_decoding_equals_decoding_at_once_where_nothing_looks_across():
    whole = tiny_prior(num_frames=9)
    thrifty = tiny_prior(num_frames=9).use_memory_preset(MemoryPreset(decode_frames=5, decode_tile_px=16))
    clip = random_clip(9, 32, 48)
    latents = torch.randn(9, 4, 8, 12, generator=seeded())
    for prior in (whole, thrifty):
        # no norms over the picture, no neighbours: a decoder of this kind has no seams at all
        prior.std.forward = lambda latents, condition: torch.tanh(condition[:, :, :3])
    torch.testing.assert_close(thrifty.decode(latents, clip), whole.decode(latents, clip))


def test_chunked_decoding_hands_the_decoder_no_more_frames_than_it_may_have():
    prior, sizes = tiny_prior(num_frames=9).use_memory_preset(MemoryPreset(decode_frames=4, decode_tile_px=16)), []
    real = prior.std.forward

    def watching(latents, condition):
        sizes.append((latents.shape[1], *condition.shape[-2:]))
        return real(latents, condition)

    prior.std.forward = watching
    prior.enhance(random_clip(9, 32, 48), seeded())
    assert {size[0] for size in sizes} == {4}
    assert {size[1:] for size in sizes} == {(16, 16)}


def test_running_out_of_memory_says_what_was_needed_and_what_to_do(monkeypatch):
    def exhausted(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(prior_module, "denoise", exhausted)
    with pytest.raises(OutOfDeviceMemory, match=r"enhance 3 frames of 24 x 16 .* GiB .*sampling.memory 8gb") as caught:
        tiny_prior().enhance(random_clip(3, 16, 24), seeded())
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    ],
)
def test_libraries_that_get_no_memory_say_so_in_words_that_are_known(message):
    assert is_exhaustion(RuntimeError(message))


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "mat1 and mat2 shapes cannot be multiplied (2x3 and 2x3)",
    ],
)
def test_errors_that_are_not_about_the_gpus_memory_stay_what_they_are(message):
    error = RuntimeError(message)
    with pytest.raises(RuntimeError) as caught, explain_exhaustion(tiny_prior(), random_clip()):
        raise error
    assert caught.value is error


def test_in_half_precision_a_vae_that_overflows_stays_in_single_precision():
    upcast = tiny_prior(vae={"force_upcast": True}).to(dtype=torch.float16)
    assert (upcast.vae.dtype, upcast.unet.dtype) == (torch.float32, torch.float16)
    assert tiny_prior(vae={"force_upcast": False}).to(dtype=torch.float16).vae.dtype == torch.float16


def test_presets_are_named_after_cards_and_only_give_up_more():
    assert list(PRESETS) == ["all", "80gb", "24gb", "16gb", "12gb", "8gb"]
    assert dataclasses.asdict(PRESETS["80gb"]) == dataclasses.asdict(MemoryPreset())


def test_the_papers_largest_clip_fits_the_cards_that_presets_are_named_after():
    cards = {"16gb": 16, "12gb": 12}
    presets = [PRESETS[card] for card in cards]
    estimates = estimate_presets(full_size_prior("A"), LAYOUT_A_FRAMES, *LAYOUT_A_SIZE, presets)
    for size, estimate in zip(cards.values(), estimates, strict=True):
        assert size / 2 < estimate.peak / GIB <= size  # it is not named after a card twice as large
