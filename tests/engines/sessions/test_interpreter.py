"""The interpreter session obeys the protocol, evaluates the network that was compiled, and shows it."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from onnx import helper

from engines.bundle.manifest import TensorSpec
from engines.bundle.reader import Bundle
from engines.errors import InputError, ParityError, UsageError
from engines.interpreter import Network, describe_network, network_hash
from engines.runtime.kv_cache import cache_buffers
from engines.sessions import check_backend, open_session
from engines.sessions.interpreter import describe_component, parsed_component
from engines.tensorrt import build, plan
from tests.helpers.decoder_bundle import DIM, HIDDEN, KV, write_decoder_bundle
from tests.helpers.parsed_network import parsed
from tests.helpers.sealed import edit_sealed
from tests.helpers.tiny_bundle import model_from_nodes

trt = pytest.importorskip("tensorrt_rtx")
TARGET, CAPACITY = "rtx-3090", 32


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(write_decoder_bundle(tmp_path / "bundle"))


def built(bundle, **options):
    return build.build_plans(bundle, [TARGET], components=["base_ar"], capacity_tokens=CAPACITY, **options)[0]


def bound(session, *, rows=2, tokens=3):
    """(buffers of a decoder step, the step)."""
    caches = cache_buffers(session, rows=rows, capacity_tokens=session.capacity_tokens)
    shapes = {"inputs_embeds": (rows, tokens, HIDDEN), "hidden_states": (rows, tokens, HIDDEN)}
    buffers = caches | {name: session.buffer(shape, "float32") for name, shape in shapes.items()}
    buffers |= {
        "position_ids": session.buffer((3, rows, tokens), "int64"),
        "write_indices": session.buffer((rows,), "int64"),
    }
    buffers["inputs_embeds"].write(
        np.random.default_rng(0).standard_normal((rows, tokens, HIDDEN)).astype(np.float32)
    )
    return buffers, session.bind(buffers)


@pytest.mark.parametrize(
    "backend, cache", [(f"interpreter:{TARGET}", "bfloat16"), (f"interpreter-fp32:{TARGET}", "float32")]
)
def test_a_step_writes_its_slots_in_place_and_its_outputs(bundle, backend, cache):
    session = open_session(bundle, "base_ar", backend=backend)
    assert session.capacity_tokens == 2048 and {t.dtype for t in session.spec.inputs[3:]} == {cache}
    buffers, step = bound(session)
    key = buffers["past_key_values.0.key"]
    poison = np.full(key.shape, 1e4, ml_dtypes.bfloat16 if cache == "bfloat16" else np.float32)
    key.write(poison)
    buffers["write_indices"].write(np.array([4, 0]))
    memory = key.array
    step()
    changed = (key.read() != poison.astype(np.float32)).all((1, 3))
    assert (
        key.array is memory
        and np.flatnonzero(changed[0]).tolist() == [4, 5, 6]
        and np.flatnonzero(changed[1]).tolist() == [0, 1, 2]
    )
    in_bf16 = key.read().astype(ml_dtypes.bfloat16).astype(np.float32)
    assert (key.read() == in_bf16).all() == (cache == "bfloat16")
    assert np.isfinite(buffers["hidden_states"].read()).all() and buffers["hidden_states"].read().any()


def test_wrong_shapes_foreign_buffers_and_closed_sessions_are_refused(bundle):
    session = open_session(bundle, "base_ar", backend=f"interpreter:{TARGET}")
    buffers, step = bound(session)
    smaller = cache_buffers(session, rows=2, capacity_tokens=CAPACITY)
    with pytest.raises(
        InputError, match=rf"expected \(-1, {KV}, 2048, {DIM}\), got \(2, {KV}, {CAPACITY}, {DIM}\)"
    ):
        session.bind(buffers | smaller)
    with pytest.raises(InputError, match="write_indices: missing"):
        session.bind({name: b for name, b in buffers.items() if name != "write_indices"})
    with pytest.raises(InputError, match="expected ArrayBuffer, got ndarray"):
        session.bind(buffers | {"write_indices": np.zeros(2, np.int64)})
    with pytest.raises(InputError, match="expected a contiguous float32"):
        buffers["inputs_embeds"].write(np.zeros((2, 3, HIDDEN)))
    session.close()
    with pytest.raises(InputError, match="closed"):
        step()
    with pytest.raises(UsageError, match="interpreter-fp32:TARGET"):
        check_backend("interpreter:")


def test_the_network_read_is_the_one_that_was_compiled(bundle):
    seen = []
    result = built(bundle, look=lambda component, parsed: seen.append((component, network_hash(parsed))))
    assert seen == [("base_ar", result.spec.network)]
    network, prefill = parsed_component(bundle, "base_ar", target=TARGET)
    assert network_hash(network) == result.spec.network and prefill == CAPACITY
    record = bundle.path / f"plans/{TARGET}/build.json"
    edit_sealed(record, lambda contents: contents["components"]["base_ar"].update(network="0" * 64))
    with pytest.raises(InputError, match="compiled from another network"):
        open_session(bundle, "base_ar", backend=f"interpreter:{TARGET}")


def test_a_look_that_raises_stops_the_build_and_leaves_no_plan(bundle):
    def look(component, parsed):
        raise ParityError("no", where="here", fix="none")

    with pytest.raises(ParityError):
        built(bundle, look=look)
    assert not list(bundle.path.glob("plans/*/*.plan*"))


def test_a_network_that_cannot_be_read_is_built_all_the_same(bundle, monkeypatch):
    monkeypatch.setattr("engines.interpreter.parsed.ATTRIBUTES", {})
    assert built(bundle).spec.network is None
    with pytest.raises(InputError, match="cannot be interpreted"):
        open_session(bundle, "base_ar", backend=f"interpreter:{TARGET}")


def small(*, alpha=0.1, weight=1.0, order=("x", "h"), middle="h", name="n"):
    nodes = [
        helper.make_node("LeakyRelu", ["x"], [middle], alpha=alpha, name=name),
        helper.make_node("Sub", [middle if part == "h" else part for part in order], ["d"]),
        helper.make_node("Mul", ["d", "w"], ["y"]),
    ]
    io = [[TensorSpec(part, "float32", ("N", 3))] for part in ("x", "y")]
    return network_hash(
        parsed(trt, model_from_nodes(nodes, *io, {"w": np.array([[1, weight, 2]], np.float32)}))
    )


def test_the_hash_is_of_what_the_network_computes():
    first = small()
    assert first == small(middle="another", name="m") == small(), "names decide nothing"
    others = {small(alpha=0.2), small(weight=1.0000001), small(order=("h", "x"))}
    assert len(others | {first}) == 4


def test_the_description_shows_layers_attributes_and_what_is_fused(bundle):
    network = parsed_component(bundle, "base_ar", target=TARGET)[0]
    data = json.loads(json.dumps(describe_network(network)))
    assert (
        data["inputs"]["past_key_values.0.key"] == f"BF16[*,{KV},2048,{DIM}]"
        and data["kinds"]["KV_CACHE_UPDATE"] == 2
    )
    assert data["fused"] == [
        {
            "kind": "attention",
            "layer": data["fused"][0]["layer"],
            "kernels": "one",
            "mask": True,
            "causal": "NONE",
            "lengths": False,
        }
    ]
    update = next(layer for layer in data["layers"] if layer["kind"] == "KV_CACHE_UPDATE")
    assert update["attributes"]["cache_mode"] == "LINEAR" and update["inputs"][0].startswith(
        "past_key_values.0."
    )
    shown = describe_component(bundle, "base_ar", target=TARGET)
    assert shown["plan"] is None and shown["layers"] == data["layers"]
    built(bundle)
    assert describe_component(bundle, "base_ar", target=TARGET)["plan"] == "this network"
    assert len(data["layers"]) == sum(data["kinds"].values()) and data["sha256"] == network_hash(network)


def test_plans_without_a_recorded_network_are_still_read(bundle):
    result = built(bundle)
    record = plan.read_build(bundle, TARGET)
    old = replace(record, components={"base_ar": replace(result.spec, network=None)})
    path = bundle.path / f"plans/{TARGET}/build.json"
    path.write_text(build.json_from_record(old))
    edit_sealed(path, lambda data: data["components"]["base_ar"].pop("network"))
    assert plan.read_build(bundle, TARGET).components["base_ar"].network is None
    assert open_session(bundle, "base_ar", backend=f"interpreter:{TARGET}").capacity_tokens == CAPACITY


def test_constants_are_kept_only_where_there_is_room(bundle, monkeypatch):
    network = parsed_component(bundle, "base_ar", target=TARGET)[0]
    feeds = {
        t.name: np.zeros([2 if n < 0 else n for n in t.shape], np.int64 if t.kind == "INT64" else np.float32)
        for t in network.inputs
    }
    feeds["inputs_embeds"] += np.linspace(0, 1, HIDDEN, dtype=np.float32)

    def run(evaluator):
        return evaluator.run({name: array.copy() for name, array in feeds.items()})["hidden_states"]

    kept = Network(network)
    assert kept._early and run(kept).any()
    monkeypatch.setattr("engines.interpreter.evaluate.KEEP_BYTES", 0)
    lean = Network(network)
    assert not lean._early
    np.testing.assert_array_equal(run(lean), run(kept))
