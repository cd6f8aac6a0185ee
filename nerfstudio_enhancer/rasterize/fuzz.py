"""Builds and runs the fuzz driver of the native kernels: `python -m nerfstudio_enhancer.rasterize.fuzz --calls 1000000`.

It draws random scenes with zero, huge and needle-like scales, splats on and behind the camera plane, NaN and infinity,
empty scenes, images of one pixel and of odd sizes, and checks what must hold for every input (native/fuzz.cpp).

For another architecture: `--compiler aarch64-linux-gnu-g++ --emulator qemu-aarch64`.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from nerfstudio_enhancer.rasterize.compile_flags import (
    COMMON_FLAGS,
    KERNEL_FLAGS,
    RELEASE_FLAGS,
    shared_defines,
    variant_defines,
    variants,
)
from nerfstudio_enhancer.rasterize.native_library import INSTRUCTION_SETS

NATIVE = Path(__file__).with_name("native")
# The driver draws the same inputs on every architecture, whether or not it has a fused multiply-add.
DRIVER_FLAGS = ["-ffp-contract=off"]
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
    emulator: str | None = None
    """What runs programs of the compiler's architecture where this machine cannot, such as qemu-aarch64. With sanitizers,
    which cannot be linked statically, it must find that architecture's libraries: `qemu-aarch64 -L /usr/aarch64-linux-gnu`."""


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


def compiler_target(compiler: str) -> str:
    """The platform that `compiler` compiles for: x86_64-linux-gnu, aarch64-linux-gnu, ...

    Raises:
        RuntimeError: the compiler reports an error.
    """
    return _compile([compiler, "-dumpmachine"]).strip()


def build_driver(
    folder: Path, compiler: str, sanitizers: Sequence[str] = (), portable: bool = False, static: bool = False
) -> Path:
    """Compile the kernels and the driver into `folder`, as setup.py does.

    Args:
        folder: where the object files and the driver go.
        compiler: C++ compiler, also one for another architecture.
        sanitizers: see `Fuzz`; with them nothing is optimised and every buffer has exactly the size asked for.
        portable: build only the kernels that every architecture has.
        static: link all libraries into the driver, so that an emulator needs none of the other architecture.

    Raises:
        RuntimeError: the compiler reports an error.
    """
    target = "any" if portable else compiler_target(compiler)
    checks = [f"-fsanitize={','.join(sanitizers)}", *SANITIZER_FLAGS] if sanitizers else []
    common = [*(["-O0"] if sanitizers else RELEASE_FLAGS), *COMMON_FLAGS, *checks]
    jobs = [(NATIVE / "native.cpp", folder / "native.o", shared_defines(target), common)]
    jobs.append((NATIVE / "fuzz.cpp", folder / "fuzz.o", [], [*common, *DRIVER_FLAGS]))
    for name, flags in variants(target).items():
        options = [*common, *KERNEL_FLAGS, *flags]
        jobs.append((NATIVE / "kernels.cpp", folder / f"{name}.o", variant_defines(name, target), options))
    for source, object_file, defines, options in jobs:
        macros = [f"-D{key}" if value is None else f"-D{key}={value}" for key, value in defines]
        _compile([compiler, *options, *macros, "-c", str(source), "-o", str(object_file)])
    driver = folder / "fuzz"
    link = ["-pthread", *(["-static"] if static else [])]
    _compile([compiler, *common, *(str(job[1]) for job in jobs), *link, "-o", str(driver)])
    return driver


def _compile(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{result.stderr}")
    return result.stdout


def run_driver(driver: Path, calls: int, seed: int, isa: str, emulator: Sequence[str] = ()) -> str:
    """What the driver says after `calls` calls with the kernels `isa`.

    Args:
        driver: what `build_driver` made.
        calls: forward and backward passes.
        seed: of the random inputs.
        isa: one of the instruction sets that the driver was built with.
        emulator: command that runs the driver, where this machine cannot.

    Raises:
        RuntimeError: something that must hold did not, or a sanitizer complained.
    """
    return _run([*emulator, str(driver), str(calls), str(seed), isa]).strip()


def driver_outputs(driver: Path, calls: int, seed: int, isa: str, emulator: Sequence[str] = ()) -> list[np.ndarray]:
    """Images, gradients and SSIM of ordinary random inputs, which depend on `calls` and `seed` alone.

    Args:
        driver: what `build_driver` made.
        calls: forward and backward passes; the arrays of one follow those of the other.
        seed: of the random inputs.
        isa: one of the instruction sets that the driver was built with.
        emulator: command that runs the driver, where this machine cannot.

    Returns:
        Arrays float32, one-dimensional; some are empty.

    Raises:
        RuntimeError: the driver failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "outputs"
        _run([*emulator, str(driver), str(calls), str(seed), isa, str(file)])
        content = file.read_bytes()
    arrays, at = [], 0
    while at < len(content):
        size = int.from_bytes(content[at : at + 8], sys.byteorder)
        arrays.append(np.frombuffer(content, np.float32, size, at + 8))
        at += 8 + 4 * size
    return arrays


def runnable_instruction_sets(driver: Path, emulator: Sequence[str] = ()) -> list[str]:
    """Instruction sets of the driver that run on this machine, or on the emulated one; best first."""
    return [isa for isa in INSTRUCTION_SETS if _succeeds([*emulator, str(driver), "0", "0", isa])]


def _succeeds(command: list[str]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:  # built for another architecture
        return False


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"the fuzz driver ended with status {result.returncode}:\n{result.stdout}{result.stderr}")
    return result.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `Fuzz` from the command line."""
    command = tyro.cli(Fuzz, args=arguments)
    compiler = command.compiler or find_compiler()
    emulator = shlex.split(command.emulator or "")
    with tempfile.TemporaryDirectory() as folder:
        static = bool(emulator) and not command.sanitizers
        driver = build_driver(Path(folder), compiler, command.sanitizers, static=static)
        isas = runnable_instruction_sets(driver, emulator)
        if not isas:
            raise RuntimeError(f"What {compiler} builds does not run here; `--emulator` names what runs it.")
        for number, isa in enumerate(isas):
            calls = command.calls // len(isas) + (number < command.calls % len(isas))
            sys.stdout.write(run_driver(driver, calls, command.seed + number, isa, emulator) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
