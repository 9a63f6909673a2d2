"""The device table is complete and consistent, and its names are the only valid ones."""

import sys

import pytest

from engines.errors import UsageError
from engines.targets import TARGETS, host_platform, sm_from_capability, target_from_name


def test_every_row_is_named_by_its_key_and_has_sane_figures():
    for name, target in TARGETS.items():
        assert (
            target.name == name
            and target.builder in ("tensorrt_rtx", "tensorrt")
            and target.dialect in ("modern", "classic")
        )
        assert 8e9 <= target.memory_bytes <= 256e9 and 60e9 <= target.bandwidth_bytes_per_s <= 10e12, name
        assert set(target.precisions) <= {"fp16", "bf16", "int8", "int4", "fp8", "nvfp4"} and target.platforms


def test_the_builder_that_needs_no_gpu_has_exactly_the_architectures_it_can_build():
    trt = pytest.importorskip("tensorrt_rtx")
    known = {name for name in trt.ComputeCapability.__members__ if name.startswith("SM")}
    assert {f"SM{t.sm[3:]}" for t in TARGETS.values() if t.builder == "tensorrt_rtx"} == known
    assert not {f"SM{t.sm[3:]}" for t in TARGETS.values() if t.builder == "tensorrt"} & known


def test_bf16_needs_ampere_and_the_dialect_follows_the_version():
    for target in TARGETS.values():
        assert ("bf16" in target.precisions) == (target.compute_capability >= (8, 0)), target.name
        if target.builder == "tensorrt":  # TensorScatter is read from 10.15 on
            version = tuple(int(part) for part in target.tensorrt.split("."))
            assert (target.dialect == "modern") == (version >= (10, 15)), target.name


def test_fp8_needs_ada_and_nvfp4_blackwell_and_the_modern_dialect():
    for target in TARGETS.values():
        assert ("fp8" in target.precisions) == (target.compute_capability >= (8, 9)), target.name
        blackwell = target.compute_capability >= (11, 0) and target.dialect == "modern"
        assert ("nvfp4" in target.precisions) == blackwell, target.name


def test_an_unknown_name_lists_the_valid_ones():
    assert target_from_name("rtx-4090").sm == "sm_89" and sm_from_capability((12, 0)) == "sm_120"
    with pytest.raises(UsageError) as error:
        target_from_name("rtx4090")
    assert "rtx-4090" in str(error.value) and "'rtx4090'" in str(error.value)


def test_the_host_is_named_in_the_tables_words(monkeypatch):
    for system, machine, name in (
        ("linux", "x86_64", "linux-x86_64"),
        ("win32", "AMD64", "windows-x86_64"),
        ("linux", "aarch64", "linux-aarch64"),
        ("darwin", "arm64", "darwin-aarch64"),
    ):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr("platform.machine", lambda machine=machine: machine)
        assert host_platform() == name
