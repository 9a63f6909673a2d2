"""NVRTC compiles the loop's kernels for the architectures of the device table, where NVRTC is installed."""

import pytest

from engines.errors import MissingError
from engines.sessions.device_loop import KERNELS, SOURCE
from engines.tensorrt import device, graphs, nvrtc
from tests.helpers.emulated import ROOT


@pytest.fixture(scope="module")
def version():
    try:
        return nvrtc.nvrtc_version()
    except MissingError as error:
        pytest.skip(f"the loop's compilation was not checked: {error.what}")


@pytest.mark.parametrize("sm", ["sm_80", "sm_87", "sm_89", "sm_90", "sm_120"])
def test_the_loop_compiles_for(version, sm):
    cubin = nvrtc.cubin_from_source(SOURCE, sm)
    assert cubin[:4] == b"\x7fELF" and all(f".text.{name}".encode() in cubin for name in KERNELS)
    assert (b"cudaGraphSetConditional" in cubin) == (version >= nvrtc.WHILE_VERSION)


def test_what_does_not_compile_says_where(version, tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text("__global__ void wrong() { nothing(); }")
    with pytest.raises(RuntimeError, match=r"wrong.cu for sm_80[\s\S]*nothing"):
        nvrtc.cubin_from_source(source, "sm_80")


def test_without_the_library_the_package_is_named(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings.nvrtc")

    def absent():
        raise RuntimeError("Failed to dlopen libnvrtc.so.13")

    monkeypatch.setattr(bindings, "nvrtcVersion", absent)
    with pytest.raises(MissingError, match="libnvrtc.so.13") as error:
        nvrtc.nvrtc_version.__wrapped__()
    assert "nvidia-cuda-nvrtc" in error.value.fix


@pytest.mark.parametrize(
    "compiler, driver, words",
    [
        ((13, 0), "13.0", "per step, or per image with several tokens per step"),
        ((12, 9), "12.3", "per step (the driver is for CUDA 12.3, and WHILE nodes need 12.4)"),
        ((12, 2), "13.0", "per step (NVRTC is of CUDA 12.2, and WHILE nodes need 12.4)"),
        (None, "13.0", "on the host: NVRTC is not installed (here)"),
    ],
)
def test_the_doctor_knows_how_the_loop_runs(monkeypatch, compiler, driver, words):
    def version():
        if compiler is None:
            raise MissingError("NVRTC is not installed", where="here", fix="install it")
        return compiler

    monkeypatch.setattr(nvrtc, "nvrtc_version", version)
    monkeypatch.setattr(device, "driver", lambda: pytest.importorskip("cuda.bindings.driver"))
    monkeypatch.setattr(device, "driver_version", lambda: driver)
    assert words in graphs.loop_facts()


def test_the_source_is_where_the_package_looks_for_it():
    assert ROOT / "engines" / "tensorrt" / "loop.cu" == SOURCE
