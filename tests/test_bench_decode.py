"""What `bench_decode` says about itself, at sizes of no consequence."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import bench_decode, bench_peers
from tests.peers.llama_cpp import llama_cpp_steps

SMALL = replace(
    bench_decode.few_layers(2).base_ar,
    hidden_size=256,
    intermediate_size=512,
    num_heads=2,
    num_kv_heads=1,
)
WEIGHTS = 2 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 512)  # of the products of two layers


def test_a_peer_that_is_not_installed_is_named_and_left_out(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_peers, "OPTIMUM", tmp_path / "none")
    assert bench_peers.missing() == ["OpenVINO", "ONNX Runtime GenAI", "llama.cpp", "transformers", "optimum"]
    assert [line.split()[0] for line in bench_peers.versions()] == ["onnxruntime", "torch"]
    bench_peers.build_peers("fp32", SMALL, tmp_path)
    found = bench_peers.peer_steps("int4", SMALL, tmp_path, rows=[1], filled=4, capacity=8)
    assert list(found) == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision,bits", [("fp32", 32), ("int8", 8), ("int4", 4)])
def test_bare_products_have_the_weights_of_the_layers(precision: str, bits: int) -> None:
    for rows, (step, stored) in bench_decode.products_steps(SMALL, precision, [1, 2]).items():
        results = step()
        assert stored == WEIGHTS * bits // 8 and len(results) == 14
        assert all(result.shape[:2] == (1, rows) for result in results)


def test_transformers_steps_do_not_grow_their_cache() -> None:
    import torch

    steps = bench_peers.transformers_steps(SMALL, torch.float32, rows=[2], filled=5)
    step, stored = steps[2]
    step()
    step()
    cache = step.__closure__[0].cell_contents
    assert cache.get_seq_length() == 5
    assert stored == 4 * (WEIGHTS + 2 * (256 + 2 * 128) + 5 * 256)  # with biases and norms


def test_the_table_has_the_time_the_limit_and_the_share_of_each(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench_decode, "FLUSHED_BYTES", 1 << 20)
    monkeypatch.setattr(bench_decode, "PAUSE_S", 0)
    calls = {"slow": (lambda: bench_decode.time.sleep(0.01), 1 << 20)}
    bench_decode.print_table(calls, repeats=2)
    *_, line = capsys.readouterr().out.splitlines()
    name, stored, median, fastest, limit, share = line.split()
    assert (name, stored) == ("slow", "1") and float(median) >= float(fastest) >= 10
    assert float(limit) >= 0 and 0 <= float(share) < 1


def test_equal_layers_have_different_noise() -> None:
    """ONNX Runtime would hold equal weights once, and a step would read one layer's."""
    value = SimpleNamespace(shape=(4, 8), metadata_props={}, const_value=None)
    names = [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("gate_proj", "down_proj")]
    graph = SimpleNamespace(initializers=dict.fromkeys(names, value))
    made = [lazy.load() for lazy in bench_decode.noise_of(SimpleNamespace(graph=graph)).values()]
    assert len(made) == 4
    assert not any(a.equal(b) for i, a in enumerate(made) for b in made[:i])


@pytest.mark.parametrize("precision,bits", [("fp32", 32), ("int8", 8.5), ("int4", 4.5)])
def test_llama_cpp_runs_a_file_of_the_small_model(tmp_path: Path, precision: str, bits: float) -> None:
    if not bench_peers.has("llama.cpp"):
        pytest.skip("llama-cpp-python is not installed")
    bench_peers.build_peers(precision, SMALL, tmp_path)
    steps = llama_cpp_steps(tmp_path / f"{precision}.gguf", rows=[1, 2], filled=5, capacity=8)
    for step, stored in steps.values():
        for _ in range(5):  # more than fit, if each stayed
            step()
        dense = 4 * (2 * (256 + 2 * 128) + 5 * 256)  # biases and norms
        assert stored == (WEIGHTS + 256 * 256) * bits / 8 + dense


def test_optimum_steps_run_on_an_export_of_the_small_model(tmp_path: Path) -> None:
    if not bench_peers.has("optimum"):
        pytest.skip("the environment of `make peers` is not there")
    bench_peers.build_peers("fp32", SMALL, tmp_path)
    steps = bench_peers.optimum_steps(SMALL, tmp_path / "optimum", rows=[1, 2], filled=5)
    for step, stored in steps.values():
        step()
        weights = 4 * (WEIGHTS + 2 * (256 + 2 * 128) + 5 * 256 + 256 * 256)  # and the head of 256 tokens
        assert stored == pytest.approx(weights, rel=0.03)  # the graph itself is in the file
