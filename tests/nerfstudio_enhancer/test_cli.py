import shlex
import subprocess
import sys

import pytest

from nerfstudio_enhancer import cli
from nerfstudio_enhancer.cli import main


def test_help_names_every_command_in_sentences(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for sentence in (
        "Compare methods over scenes, numbers of reference views and seeds.",
        "Make paired data for training the prior.",
        "Measure the rasteriser of this machine.",
        "Show what a prior's folder holds",
    ):
        assert sentence in text


def test_help_is_quick_since_it_imports_nothing_heavy():
    code = "import sys; import nerfstudio_enhancer.cli; print([m for m in ('torch', 'diffusers', 'gsplat') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flags_reach_the_commands(monkeypatch):
    seen = []
    monkeypatch.setattr("nerfstudio_enhancer.evaluation.benchmark.run_benchmark", seen.append)
    monkeypatch.setattr("nerfstudio_enhancer.pairs.make_pairs.make_pairs", seen.append)
    main(
        shlex.split(
            "benchmark --data a b --views 3 6 --methods geometry oracle --seeds 0 1 --preset quick --output out"
        )
    )
    main(
        shlex.split("make-pairs --data a --output out --views 3 --steps 300 700 --minutes 2.5 --max-frames 8 --jobs 2")
    )
    benchmark, pairs = seen
    assert [path.name for path in benchmark.data] == ["a", "b"]
    assert (benchmark.views, benchmark.methods, benchmark.seeds) == ((3, 6), ("geometry", "oracle"), (0, 1))
    assert (pairs.steps, pairs.minutes, pairs.max_frames, pairs.jobs) == ((300, 700), 2.5, 8, 2)


def test_a_prior_is_timed_by_its_name(capsys):
    main(shlex.split("time-prior bundled --frames 3 --height 32 --width 48 --steps 1 --repeats 1 --precision fp32"))
    text = capsys.readouterr().out
    assert "48 x 32, torch.float32, memory preset all" in text
    assert "s a clip of 3 frames" in text


def test_an_error_that_the_user_can_mend_is_one_line_with_status_1(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["benchmark", "--data", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().err == f"ns-enhancer: there is no scene at {tmp_path / 'nowhere'}.\n"


def test_an_interrupted_command_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", interrupted)
    with pytest.raises(SystemExit, match="130"):
        main(["make-pairs", "--output", str(tmp_path)])
    assert "repeating the command goes on" in capsys.readouterr().err


def test_inspecting_a_folder_that_is_no_prior_ends_with_status_1(tmp_path, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["inspect-prior", str(tmp_path)])
    assert "FAULT missing: unet/" in capsys.readouterr().out
