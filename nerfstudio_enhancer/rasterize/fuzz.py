"""Builds and runs the fuzz driver of the native kernels: `python -m nerfstudio_enhancer.rasterize.fuzz --calls 1000000`.

It draws random scenes with zero, huge and needle-like scales, splats on and behind the camera plane, NaN and infinity,
empty scenes, images of one pixel and of odd sizes, and checks what must hold for every input (native/fuzz.cpp).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from nerfstudio_enhancer.rasterize.compile_flags import (
    COMMON_FLAGS,
    KERNEL_FLAGS,
    SHARED_DEFINES,
    VARIANTS,
    variant_defines,
)
from nerfstudio_enhancer.rasterize.native_library import available_instruction_sets

NATIVE = Path(__file__).with_name("native")
SANITIZER_FLAGS = ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-DNSE_EXACT_BUFFERS"]


@dataclass(frozen=True)
class Fuzz:
    """Call the native rasteriser with random and extreme inputs, and check what must hold."""

    calls: int = 10_000
    """Calls in total, shared by the instruction sets that run here. Each is a forward and a backward pass."""
    seed: int = 0
    """Of the random inputs."""
    sanitizers: tuple[str, ...] = ()
    """What GCC and Clang know as -fsanitize: address, undefined, thread. They make it about 10 times slower."""
    compiler: str | None = None
    """C++ compiler; else `$CXX`, g++, clang++ or c++, whichever is found first."""


def find_compiler() -> str:
    """The C++ compiler of this machine.

    Raises:
        FileNotFoundError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name):
            return name
    raise FileNotFoundError("No C++ compiler was found: install g++ or clang++, or name one in $CXX.")


def missing_sanitizer(name: str, compiler: str) -> str | None:
    """Why `compiler` cannot build with `-fsanitize=name`, or None if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cpp"
        source.write_text("int main() { return 0; }\n")
        command = [compiler, f"-fsanitize={name}", str(source), "-o", str(source.with_suffix(""))]
        built = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if built.returncode == 0 else built.stderr.strip()


def build_driver(folder: Path, compiler: str, sanitizers: Sequence[str] = ()) -> Path:
    """Compile the kernels and the driver into `folder`; with sanitizers, every buffer has exactly the size asked for.

    Raises:
        RuntimeError: the compiler reports an error.
    """
    checks = [f"-fsanitize={','.join(sanitizers)}", *SANITIZER_FLAGS] if sanitizers else []
    common = ["-O0" if sanitizers else "-O2", *COMMON_FLAGS, *checks]
    jobs = [(NATIVE / "native.cpp", folder / "native.o", SHARED_DEFINES, common)]
    jobs.append((NATIVE / "fuzz.cpp", folder / "fuzz.o", [], common))
    for name, flags in VARIANTS.items():
        options = [*common, *KERNEL_FLAGS, *flags]
        jobs.append((NATIVE / "kernels.cpp", folder / f"{name}.o", variant_defines(name), options))
    for source, target, defines, options in jobs:
        macros = [f"-D{key}" if value is None else f"-D{key}={value}" for key, value in defines]
        _compile([compiler, *options, *macros, "-c", str(source), "-o", str(target)])
    driver = folder / "fuzz"
    _compile([compiler, *common, *(str(job[1]) for job in jobs), "-pthread", "-o", str(driver)])
    return driver


def _compile(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{result.stderr}")


def run_driver(driver: Path, calls: int, seed: int, isa: str) -> str:
    """What the driver says after `calls` calls with the kernels `isa`.

    Raises:
        RuntimeError: something that must hold did not, or a sanitizer complained.
    """
    result = subprocess.run([str(driver), str(calls), str(seed), isa], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the fuzz driver ended with status {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `Fuzz` from the command line."""
    command = tyro.cli(Fuzz, args=arguments)
    compiler = command.compiler or find_compiler()
    isas = available_instruction_sets()
    with tempfile.TemporaryDirectory() as folder:
        driver = build_driver(Path(folder), compiler, command.sanitizers)
        for number, isa in enumerate(isas):
            calls = command.calls // len(isas) + (number < command.calls % len(isas))
            sys.stdout.write(run_driver(driver, calls, command.seed + number, isa) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
