"""The native kernels as other compilers and architectures build them, and the wheel where there is no compiler."""

from __future__ import annotations

import importlib.metadata
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from nerfstudio_enhancer.rasterize import compile_flags, fuzz, native_library

ROOT = Path(__file__).parents[2]
ARM64_COMPILER, ARM64_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MISSING_FOR_ARM64 = [name for name in (ARM64_COMPILER, ARM64_EMULATOR) if not shutil.which(name)]
X86 = ["baseline", "avx2", "avx512"]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("linux-x86_64", X86),
        ("x86_64-linux-gnu", X86),
        ("win-amd64", X86),
        ("macosx-13.0-x86_64", X86),
        ("linux-aarch64", ["baseline"]),
        ("aarch64-linux-gnu", ["baseline"]),
        ("macosx-11.0-arm64", ["baseline"]),
        ("macosx-10.9-universal2", ["baseline"]),  # one command line compiles for both of its architectures
        ("linux-riscv64", ["baseline"]),
    ],
)
def test_only_x86_64_gets_flags_and_macros_of_x86_64(target, names):
    assert list(compile_flags.variants(target)) == names
    assert compile_flags.variants(target)["baseline"] == []
    assert bool(compile_flags.shared_defines(target)) == (len(names) > 1)
    for name in names:
        assert ("NSE_TABLE", f"nse_kernels_{name}") in compile_flags.variant_defines(name, target)


def test_another_compiler_stands_in_for_one_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = ["clang++", "-pthread", "-Wall"]
    assert compile_flags.present(missing) == missing  # whose error names it
    for name in ("g++", "gcc"):
        (tmp_path / name).touch(mode=0o755)
    assert compile_flags.present(missing) == ["g++", "-pthread", "-Wall"]
    assert compile_flags.present(["gcc", "-O2"]) == ["gcc", "-O2"]


def test_no_flag_lets_a_compiler_assume_that_numbers_are_finite():
    flags = [*compile_flags.COMMON_FLAGS, *compile_flags.RELEASE_FLAGS, *compile_flags.KERNEL_FLAGS]
    assert not {"-ffast-math", "-Ofast", "-ffinite-math-only", "-march=native"} & set(flags)


@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler",
    [
        pytest.param(name, marks=pytest.mark.skipif(not shutil.which(name), reason=f"{name} is not installed"))
        for name in ("g++", "clang++")
    ],
)
def test_each_compiler_builds_kernels_that_pass_the_fuzz_test(compiler, tmp_path):
    driver = fuzz.build_driver(tmp_path, compiler)
    names = fuzz.runnable_instruction_sets(driver)
    assert names == native_library.available_instruction_sets()
    for name in names:
        assert "1000 calls" in fuzz.run_driver(driver, calls=1000, seed=5, isa=name)


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING_FOR_ARM64), reason=f"not installed: {', '.join(MISSING_FOR_ARM64)}")
def test_arm64_computes_what_this_machine_computes(tmp_path):
    for folder in ("arm64", "here"):
        (tmp_path / folder).mkdir()
    arm64 = fuzz.build_driver(tmp_path / "arm64", ARM64_COMPILER, static=True)
    here = fuzz.build_driver(tmp_path / "here", fuzz.find_compiler(), portable=True)
    emulator = [ARM64_EMULATOR]
    assert fuzz.runnable_instruction_sets(arm64, emulator) == ["baseline"]
    assert "no violation" in fuzz.run_driver(arm64, calls=1500, seed=9, isa="baseline", emulator=emulator)
    actual = fuzz.driver_outputs(arm64, calls=500, seed=11, isa="baseline", emulator=emulator)
    expected = fuzz.driver_outputs(here, calls=500, seed=11, isa="baseline")
    assert [array.size for array in actual] == [array.size for array in expected]
    errors = np.array(
        [
            np.abs(x - y).max() / max(np.abs(y).max(), 1e-6)  # relative to the largest entry, as in test_rasterize.py
            for x, y in zip(actual, expected)
            if y.size
        ]
    )
    # arm64 fuses multiplications and additions. Measured over 3,000 calls: median 4e-7, 99 % below 1.1e-4; the largest,
    # 8e-3, is a splat at the jump of alpha at 1/255. Without fusing (-ffp-contract=off) no bit differed.
    assert np.median(errors) < 2e-6
    assert np.quantile(errors, 0.99) < 3e-4
    assert errors.max() < 5e-2


def test_a_driver_for_another_architecture_does_not_run_here(tmp_path):
    driver = tmp_path / "driver"
    driver.write_bytes(b"\x7fELF of something else")
    driver.chmod(0o755)
    assert fuzz.runnable_instruction_sets(driver) == []


def test_the_command_shares_the_calls_among_the_instruction_sets_that_run(tmp_path, monkeypatch, capsys):
    driver = tmp_path / "driver"
    driver.write_text('#!/bin/sh\n[ $3 = avx512 ] && exit 2\necho "$1 calls, seed $2, $3"\n')
    driver.chmod(0o755)
    built = {}
    monkeypatch.setattr(
        fuzz, "build_driver", lambda folder, compiler, sanitizers, static: built.update(s=static) or driver
    )
    fuzz.main(["--calls", "5", "--seed", "7", "--compiler", "c++"])
    assert capsys.readouterr().out.splitlines() == ["3 calls, seed 7, avx2", "2 calls, seed 8, baseline"]
    assert not built["s"]
    fuzz.main(["--calls", "5", "--compiler", "c++", "--emulator", "env -u NOTHING"])
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert built["s"]
    driver.write_text("#!/bin/sh\nexit 2\n")
    with pytest.raises(RuntimeError, match=r"c\+\+ builds does not run here"):
        fuzz.main(["--calls", "5", "--compiler", "c++"])


def test_the_outputs_are_read_array_by_array(tmp_path):
    driver = tmp_path / "driver"
    driver.write_text(
        f"#!{sys.executable}\n"
        "import struct, sys\n"
        "calls, seed, isa, file = sys.argv[1:]\n"
        "open(file, 'wb').write(struct.pack('=q2fqqf', 2, float(calls), float(seed), 0, 1, 0.5))\n"
    )
    driver.chmod(0o755)
    arrays = fuzz.driver_outputs(driver, calls=3, seed=4, isa="baseline")
    assert [array.tolist() for array in arrays] == [[3.0, 4.0], [], [0.5]]


def setuptools_is_too_old() -> bool:
    """`pyproject.toml` asks for 77, and nothing may be downloaded here."""
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0]) < 77
    except importlib.metadata.PackageNotFoundError:
        return True


NEEDS_SETUPTOOLS = pytest.mark.skipif(setuptools_is_too_old(), reason="setuptools 77 or newer is not installed")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what a wheel is made of, without weights and without what was compiled before."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("bundled", "lpips_alexnet", "__pycache__", "*.so")
    for name in ("nerfstudio_enhancer", "method_configs", "diffusion_prior"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    return copy


RENDER = """
import torch
from nerfstudio_enhancer.rasterize import backend_name, native_library, rasterization
means = torch.tensor([[0.0, 0.0, 2.0]], requires_grad=True)
camera = torch.eye(4)[None], torch.tensor([[[16.0, 0.0, 8.5], [0.0, 16.0, 8.5], [0.0, 0.0, 1.0]]])
splat = torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.full((1, 3), 0.25), torch.tensor([0.5]), torch.ones(1, 1)
image, alpha, _ = rasterization(means, *splat, *camera, 16, 16)
image.sum().backward()
print(native_library.__file__)
print(backend_name())
print(f"{alpha[0, 8, 8, 0].item():.4f}", bool(means.grad.isfinite().all()))
"""


@pytest.mark.slow
@NEEDS_SETUPTOOLS
def test_a_wheel_brings_the_kernels_to_where_no_compiler_is(sources, tmp_path):
    wheels, site, empty = tmp_path / "wheels", tmp_path / "site", tmp_path / "empty"
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    wheels.mkdir()
    subprocess.run([sys.executable, "-c", build, str(wheels)], cwd=sources, check=True, capture_output=True)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    shutil.rmtree(sources)
    empty.mkdir()
    environment = {"PATH": str(empty), "PYTHONPATH": str(site), "HOME": str(empty)}
    result = subprocess.run(
        [sys.executable, "-c", RENDER], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    path, backend, values = result.stdout.splitlines()
    assert Path(path).is_relative_to(site)
    assert backend == f"native ({native_library.available_instruction_sets()[0]})"
    assert values == "0.5000 True"


@NEEDS_SETUPTOOLS
def test_without_a_compiler_the_build_warns_and_goes_on(sources):
    (sources / "no_programs").mkdir()
    environment = {
        **os.environ,
        "CC": "/nonexistent/cc",
        "CXX": "/nonexistent/c++",
        "PATH": str(sources / "no_programs"),
    }
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=sources,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "_native" in result.stderr
    assert "failed" in result.stderr
    assert not list(sources.rglob("*.so"))


def test_a_library_that_does_not_load_is_said_and_left(tmp_path, monkeypatch):
    broken = tmp_path / "_native.so"
    broken.write_bytes(b"of another machine")
    monkeypatch.setattr(native_library, "LIBRARY_PATH", broken)
    native_library.load_library.cache_clear()
    with pytest.warns(UserWarning, match=r"cannot be loaded here .*_native.so"):
        assert native_library.load_library() is None
    assert native_library.available_instruction_sets() == []  # and no second warning
    monkeypatch.undo()
    native_library.load_library.cache_clear()
    assert native_library.load_library() is not None


def test_the_flags_are_read_without_the_package():
    # setup.py runs before anything is installed
    assert runpy.run_path(compile_flags.__file__)["variants"]("linux-aarch64") == {"baseline": []}
