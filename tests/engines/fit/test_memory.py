"""What is predicted of a task is what the runtime loads and allocates, and never more than it takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.manifest import CacheSpec
from engines.bundle.reader import Bundle
from engines.fit.memory import DRAW, TASKS, Use, loop_bytes, stage_bytes, task_memory, weight_bytes
from engines.fit.sizes import Geometry, Sizes, sizes_from_bundle
from engines.fit.work import check_build
from engines.runtime.star import Star

MODEL = Geometry(
    name="m",
    hidden_size=64,
    vocab_size=100,
    codebook_size=50,
    image_tokens=16,
    image_size=64,
    max_positions=4096,
    cache={"base_ar": CacheSpec(4, 2, 16), "stacked_ar": CacheSpec(2, 2, 16)},
)
GRAPHS = {
    "vision_encoder": 70_000,
    "vq_encoder": 50_000,
    "vq_decoder": 40_000,
    "base_ar/0": 150_000,
    "base_ar/1": 50_000,
    "stacked_ar": 100_000,
    "text_head": 12_800,
    "image_head": 12_800,
}
FORMATS = {name: {"bf16": size} for name, size in GRAPHS.items()}
SIZES = Sizes(MODEL, "bf16", GRAPHS, FORMATS, {"token_embedding": 12_800, "image_embedding": 0}, 1_000_000)
ON_GPU = Use(rows=2, capacity_tokens=100, prefill_tokens=10, on_cpu=False)
ON_CPU = replace(ON_GPU, on_cpu=True)


def test_the_parts_of_a_component_count_together() -> None:
    assert SIZES.weights["base_ar"] == 200_000 and "base_ar/0" not in SIZES.weights
    assert list(SIZES.weights) == [
        *("vision_encoder", "vq_encoder", "vq_decoder", "base_ar", "stacked_ar", "text_head", "image_head")
    ]
    assert SIZES.weights_bytes == sum(GRAPHS.values()) + 12_800


def test_caches_grow_with_rows_capacity_and_type() -> None:
    one = SIZES.cache_bytes("base_ar", rows=1, capacity_tokens=1)
    assert one == 2 * 4 * 2 * 16 * 2  # key and value, layers, heads, size, bytes
    assert SIZES.cache_bytes("base_ar", rows=4, capacity_tokens=50) == 200 * one
    assert replace(SIZES, precision="fp32").cache_bytes("base_ar", rows=1, capacity_tokens=1) == 2 * one
    assert SIZES.cache_bytes("vq_decoder", rows=1, capacity_tokens=1) == 0


def test_resident_is_the_sum_and_in_turn_the_largest_stage() -> None:
    edit = task_memory(SIZES, "edit", ON_GPU)
    draw = stage_bytes(SIZES, DRAW, ON_GPU)
    others = ("vq_encoder", "vision_encoder", "vq_decoder")  # the host maps tables and holds none
    assert edit.in_turn_bytes == draw and edit.largest == DRAW
    assert edit.resident_bytes == draw + sum(SIZES.weights[name] for name in others)
    small = replace(SIZES, graphs=GRAPHS | {"vision_encoder": 10**9})
    assert task_memory(small, "edit", ON_GPU).largest == ("vision_encoder",)


def test_the_cpu_holds_16_bit_weights_in_float32() -> None:
    names = ("vision_encoder", "base_ar", "text_head")
    assert task_memory(SIZES, "ask", ON_CPU).resident_bytes > 2 * sum(SIZES.weights[n] for n in names)


def test_the_cpu_holds_codes_as_stored_but_those_of_convolutions_in_float32() -> None:
    mixed = {"int4": 70_000, "int8": 20_000, "bf16": 10_000}
    formats = FORMATS | {"base_ar/0": mixed, "base_ar/1": {"int4": 5_000}, "vq_decoder": {"int8": 40_000}}
    sizes = replace(SIZES, precision="int4", formats=formats)
    assert weight_bytes(sizes, "base_ar", on_cpu=True) == 70_000 + 20_000 + 2 * 10_000 + 5_000
    assert weight_bytes(sizes, "vq_decoder", on_cpu=True) == 4 * 40_000
    assert weight_bytes(sizes, "vq_decoder", on_cpu=False) == GRAPHS["vq_decoder"]
    assert weight_bytes(sizes, "token_embedding", on_cpu=True) == 0  # a table, which the host maps


def test_exact_arithmetic_widens_int8_where_no_int4_is() -> None:
    formats = FORMATS | {"base_ar/0": {"int4": 7, "int8": 20}, "base_ar/1": {"int8": 5}}
    sizes = replace(SIZES, precision="int4", formats=formats)
    assert weight_bytes(sizes, "base_ar", on_cpu=True, exact=True) == 7 + 20 + 4 * 5
    assert weight_bytes(sizes, "base_ar", on_cpu=True) == 7 + 20 + 5
    wide = task_memory(sizes, "ask", replace(ON_CPU, exact=True))
    assert wide.resident_bytes == task_memory(sizes, "ask", ON_CPU).resident_bytes + 3 * 5


def test_an_answer_has_one_row_whatever_the_images() -> None:
    answer = TASKS["ask"][-1]
    assert loop_bytes(SIZES, answer, ON_GPU) == loop_bytes(SIZES, answer, replace(ON_GPU, rows=8))


def test_the_tasks_name_the_components_that_the_runtime_loads(mini_bundle: Path) -> None:
    image = np.full((56, 56, 3), 9, np.uint8)
    calls: dict[str, Callable[[Star], object]] = {
        "generate": lambda star: star.generate("a cat"),
        "edit": lambda star: star.edit(image, "a red cat"),
        "ask": lambda star: star.ask(image, "what is it?", max_new_tokens=2),
        "reason": lambda star: star.generate("a cat", reason=True, max_new_tokens=2),
    }
    assert set(calls) == set(TASKS)
    for task, call in calls.items():
        with Star(mini_bundle) as star:
            call(star)
            assert set(star.loaded.open) == {name for stage in TASKS[task] for name in stage}, task


def test_a_loops_buffers_are_counted_to_the_byte_but_for_ids_and_settings(mini_bundle: Path) -> None:
    with Star(mini_bundle, window=1) as star:
        loop = star.image_loop(num_images=2, length=10, tokens=5)
        use = star.loaded.use(rows=4, tokens=14, prompt_tokens=10)
        predicted = loop_bytes(star.loaded.sizes, TASKS["generate"][1], use)
        buffers = {id(b): b.read().nbytes for tensors in loop.tensors for b in tensors.values()}
        caches = [b.read().nbytes for _, cache in loop.decoders for b in cache.values()]
        hidden = 4 * star.model.hidden_size * 4  # of one position in all rows
        prefill = 3 * 10 * hidden  # embeddings, and the hidden states of both decoders
        draws = 2 * 2 * star.model.codebook_size * 4  # logits and noise of both images
        assert predicted == sum(caches) + 3 * hidden + prefill + draws
        wide = star.loaded.use(rows=4, tokens=14, prompt_tokens=10, window_tokens=4)
        more = loop_bytes(star.loaded.sizes, TASKS["generate"][1], wide) - predicted
        assert more == 3 * (3 * hidden + draws)
        assert predicted <= sum(buffers.values()) + prefill


LOADED = """
import re, sys
from engines.fit.memory import weight_bytes
from engines.fit.sizes import sizes_from_bundle
from engines.bundle.reader import Bundle
from engines.sessions import open_session

def taken():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

bundle = Bundle.open(sys.argv[1])
bundle.verify()
import onnxruntime
before, names = taken(), ("text_head", "base_ar", "stacked_ar", "image_head", "vq_decoder")
sessions = [open_session(bundle, name) for name in names]
sizes = sizes_from_bundle(bundle)
print(taken() - before, sum(weight_bytes(sizes, name, on_cpu=True) for name in names))
"""


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4", "fp8", "nvfp4"])
def test_loading_takes_at_least_what_a_refusal_demands(bundle_of, precision: str) -> None:
    code = [sys.executable, "-c", LOADED, str(bundle_of(precision))]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    taken, demanded = map(int, done.stdout.split())
    assert demanded > 30e6 and taken >= demanded, f"{taken / demanded:.2f}"


def test_the_sizes_of_a_bundle_are_those_of_its_files(mini_bundle: Path) -> None:
    sizes = sizes_from_bundle(Bundle.open(mini_bundle))
    files = [path for path in mini_bundle.rglob("*") if path.is_file() and path.name != "manifest.json"]
    assert sizes.bundle_bytes == sum(path.stat().st_size for path in files)
    assert sizes.weights_bytes == sum(p.stat().st_size for p in files if p.suffix == ".data")
    assert sizes.model.cache["base_ar"] == CacheSpec(4, 2, 16) and sizes.precision == "fp32"
    assert {name: set(found) for name, found in sizes.formats.items()} == {n: {"fp32"} for n in sizes.graphs}


def test_nothing_to_build_needs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("engines.fit.machine.free_memory", lambda: 0)
    monkeypatch.setattr("engines.fit.machine.free_disk", lambda folder: 0)
    check_build(SIZES, tmp_path, [])
