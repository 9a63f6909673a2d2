"""The kernels compile with nvcc for every architecture that needs them, without spilling registers."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from tests.helpers.emulated import HERE, SOURCES

ARCHITECTURES = ("sm_87", "sm_89", "sm_110", "sm_120")  # Orin, RTX 40, Thor, RTX 50
SPILL_LIMIT_BYTES = 64  # in the one kernel with 255 registers; nothing that a loop over keys would notice


@pytest.fixture(scope="module")
def nvcc() -> str:
    found = shutil.which("nvcc")
    if not found:
        pytest.skip("no nvcc on this machine: the kernels' compilation was not checked")
    return found


@pytest.fixture(scope="module")
def known(nvcc: str) -> set[str]:
    return set(
        subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    )


def compiled(nvcc: str, source, architecture: str, out, *, kind: str = "-cubin") -> str:
    flags = [
        "-std=c++17",
        "-O3",
        f"-arch={architecture}",
        f"-I{SOURCES}",
        "-Xptxas",
        "-v",
        "-Werror",
        "all-warnings",
        kind,
    ]
    result = subprocess.run([nvcc, *flags, str(source), "-o", str(out)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_kernels_compile_for(nvcc: str, known: set[str], tmp_path, architecture: str) -> None:
    if architecture not in known:
        pytest.skip(f"this nvcc does not know {architecture}")
    log = compiled(nvcc, HERE / "some_kernels.cu", architecture, tmp_path / "some.cubin")
    assert len(re.findall(r"Compiling entry function .* for '(sm_\d+)'", log)) == 6
    spills = [int(size) for size in re.findall(r"(\d+) bytes spill stores", log)]
    assert len(spills) == 6 and max(spills) <= SPILL_LIMIT_BYTES, log


def test_every_kernel_and_the_launcher_compile_for_one_architecture(nvcc: str, tmp_path) -> None:
    log = compiled(nvcc, SOURCES / "kv_attention.cu", "sm_87", tmp_path / "all.o", kind="-c")
    kernels = (
        2 * 2 * (2 * (1 + 3) + 1)
    )  # types, head dims; for both caches a write and three to attend, and a merge
    assert len(re.findall(r"Compiling entry function", log)) == kernels
