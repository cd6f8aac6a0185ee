"""The fuzz driver of the native kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

Where a compiler lacks a sanitizer, the test's name says so, and the test states that the compiler really cannot link it.
"""

from __future__ import annotations

import pytest

from nerfstudio_enhancer.rasterize import fuzz
from nerfstudio_enhancer.rasterize.native_library import available_instruction_sets

COMPILER = fuzz.find_compiler()
GROUPS = {"address-undefined": ("address", "undefined"), "thread": ("thread",)}


def group_is_missing(name: str) -> bool:
    return any(fuzz.missing_sanitizer(part, COMPILER) for part in GROUPS[name])


MISSING = [name for name in GROUPS if group_is_missing(name)]
PRESENT = [name for name in GROUPS if name not in MISSING]


@pytest.fixture(scope="module")
def drivers(tmp_path_factory):
    """Built drivers by group of sanitizers."""
    built = {}

    def driver(group: str):
        if group not in built:
            built[group] = fuzz.build_driver(tmp_path_factory.mktemp("driver"), COMPILER, GROUPS[group])
        return built[group]

    return driver


@pytest.mark.slow
@pytest.mark.parametrize("isa", available_instruction_sets())
@pytest.mark.parametrize("group", PRESENT)
def test_no_call_makes_a_sanitizer_complain(group, isa, drivers):
    assert "no violation" in fuzz.run_driver(drivers(group), calls=150, seed=7, isa=isa)


@pytest.mark.parametrize("group", MISSING or ["none"])
def test_sanitizers_that_were_left_out_cannot_be_linked_here(group):
    assert (group == "none") == (not MISSING)
    assert group == "none" or group_is_missing(group)


def test_a_violation_ends_the_driver_with_its_message(tmp_path):
    driver = tmp_path / "driver"
    driver.write_text("#!/bin/sh\necho violation in call 3: opacity outside\nexit 1\n")
    driver.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"status 1:\nviolation in call 3"):
        fuzz.run_driver(driver, calls=5, seed=0, isa="baseline")


def test_a_sanitizer_that_no_compiler_knows_is_missing():
    assert "nonsense" in (fuzz.missing_sanitizer("nonsense", COMPILER) or "")


def test_without_a_compiler_the_user_is_told(monkeypatch):
    monkeypatch.setattr(fuzz.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"install g\+\+ or clang\+\+"):
        fuzz.find_compiler()


def test_a_compiler_that_fails_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match="failed"):
        fuzz.build_driver(tmp_path, "false")
