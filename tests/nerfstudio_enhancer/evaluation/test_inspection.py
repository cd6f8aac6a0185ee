import shutil

import pytest
from safetensors.torch import load_file, save_file
from svd_folders import tiny_unet, write_svd_folder

from nerfstudio_enhancer.cli import main
from nerfstudio_enhancer.evaluation.inspection import inspect_prior

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


def test_the_bundled_prior_is_whole(capsys):
    main(["inspect-prior"])
    text = capsys.readouterr().out
    assert "layout B" in text
    assert "float16" in text
    assert "FAULT" not in text
    parts = [line.split()[0] for line in text.splitlines()[2:7]]
    assert parts == ["vae", "unet", "image_encoder", "std", "coarse"]


@pytest.mark.parametrize(("layout", "frames"), [("A", "26, of 960 x 512 pixels"), ("B", "25, of 512 x 512 pixels")])
def test_layout_sizes_precision_frames_and_resolution_are_printed(tmp_path, layout, frames):
    report = inspect_prior(str(write_svd_folder(tmp_path, layout)))
    assert report.faults == ()
    assert f"layout {layout}: " in report.text
    assert f"frames of a clip: {frames}" in report.text
    count = sum(parameter.numel() for parameter in tiny_unet(layout).parameters())
    (line,) = [line for line in report.text.splitlines() if line.startswith("unet ")]
    assert line.split()[1:4] == [f"{count:,}", str(len(tiny_unet(layout).state_dict())), "float32"]
    assert "std/ is missing, which is no fault" in report.text


def test_everything_that_is_wrong_is_named_at_once_and_the_command_ends_with_status_1(tmp_path, capsys):
    write_svd_folder(tmp_path)
    shutil.rmtree(tmp_path / "image_encoder")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    tensors = load_file(tmp_path / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(SystemExit, match="1"):
        main(["inspect-prior", str(tmp_path)])
    text = capsys.readouterr().out
    assert "FAULT missing: image_encoder/" in text
    assert "FAULT vae/" in text
    assert "broken or cut short" in text
    assert "missing: conv_in.weight (32, 8, 3, 3)" in text


def test_parts_that_do_not_fit_each_other_are_a_fault(tmp_path):
    write_svd_folder(tmp_path)
    tiny_unet(out_channels=6).save_pretrained(tmp_path / "unet")
    report = inspect_prior(str(tmp_path))
    assert len(report.faults) == 1
    assert "UNet out_channels is 6" in report.faults[0]


def test_a_lone_unet_is_shown_with_where_the_rest_comes_from(tmp_path):
    base = write_svd_folder(tmp_path / "svd")
    tiny_unet("A").save_pretrained(tmp_path / "checkpoint-7" / "unet")
    report = inspect_prior(f"{tmp_path / 'checkpoint-7'}@{base}")
    assert report.faults == ()
    assert f"UNet of {tmp_path / 'checkpoint-7' / 'unet'}, all else of {base}" in report.text
    assert "layout A" in report.text


def test_odd_attention_heads_are_noted(tmp_path):
    write_svd_folder(tmp_path)
    tiny_unet(num_attention_heads=(2, 2)).save_pretrained(tmp_path / "unet")
    report = inspect_prior(str(tmp_path))
    assert report.faults == ()
    assert "note: attention heads [2, 2] are [16, 32] channels wide" in report.text
