"""A small bundle for TensorRT, made by hand in milliseconds,
in bf16: a one-layer decoder and a token embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from onnx import TensorProto, helper

from engines.bundle.manifest import CacheSpec, TensorSpec
from tests.helpers.tiny_bundle import MODEL, model_from_nodes, write_component, write_manifest

HIDDEN, HEADS, KV, DIM = 64, 4, 2, 16


def attention_function():
    """`star::KVCacheAttention`, as star_export writes it."""
    nodes = [
        helper.make_node(
            "TensorScatter", [f"past_{x}", x, "write_indices"], [f"present_{x}"], axis=-2, mode="linear"
        )
        for x in ("key", "value")
    ]
    nodes.append(helper.make_node("Attention", ["query", "present_key", "present_value", "mask"], ["output"]))
    inputs = ["query", "key", "value", "past_key", "past_value", "write_indices", "mask"]
    return helper.make_function(
        "star",
        "KVCacheAttention",
        inputs,
        ["output", "present_key", "present_value"],
        nodes,
        [helper.make_opsetid("", 24)],
    )


def decoder_io(cache: str = "bfloat16"):
    """Inputs and outputs of a decoder of one layer."""

    def caches(side):
        return [TensorSpec(f"{side}.0.{part}", cache, ("B", KV, "C", DIM)) for part in ("key", "value")]

    inputs = [
        TensorSpec("inputs_embeds", "float32", ("B", "S", HIDDEN)),
        TensorSpec("position_ids", "int64", (3, "B", "S")),
        TensorSpec("write_indices", "int64", ("B",)),
        *caches("past_key_values"),
    ]
    return inputs, [TensorSpec("hidden_states", "float32", ("B", "S", HIDDEN)), *caches("present")]


def decoder_model(cache: str = "bfloat16", *, swap: bool = False, use_positions: bool = True):
    """The decoder's ONNX model. `swap`: key and value are written into each other's cache."""
    kind = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16}[cache]
    node, inputs, outputs = helper.make_node, *decoder_io(cache)
    nodes = [node("Cast", ["inputs_embeds"], ["x0"], to=kind)]
    if use_positions:  # adds a number that depends on the position
        nodes += [
            node("Gather", ["position_ids", "zero"], ["axis0"], axis=0),
            node("Cast", ["axis0"], ["axis0_float"], to=kind),
            node("Unsqueeze", ["axis0_float", "last"], ["offset"]),
            node("Add", ["x0", "offset"], ["x"]),
        ]
    else:
        nodes += [node("Identity", ["x0"], ["x"])]
    for part, heads in (("query", HEADS), ("key", KV), ("value", KV)):
        nodes += [
            node("Cast", [f"w_{part}"], [f"w_{part}_cast"], to=kind),
            node("MatMul", ["x", f"w_{part}_cast"], [f"{part}_flat"]),
            node("Reshape", [f"{part}_flat", f"split_{heads}"], [f"{part}_split"]),
            node("Transpose", [f"{part}_split"], [part], perm=[0, 2, 1, 3]),
        ]
    pasts, presents = (
        [f"{side}.0.{part}" for part in ("key", "value")] for side in ("past_key_values", "present")
    )
    nodes += [
        node("Shape", ["past_key_values.0.key"], ["capacity_1"], start=2, end=3),
        node("Squeeze", ["capacity_1"], ["capacity"]),
        node("Shape", ["inputs_embeds"], ["tokens_1"], start=1, end=2),
        node("Squeeze", ["tokens_1"], ["tokens"]),
        node("Range", ["zero", "capacity", "one"], ["slots"]),
        node("Range", ["zero", "tokens", "one"], ["steps"]),
        node("Unsqueeze", ["write_indices", "tail"], ["w_b1"]),
        node("Add", ["w_b1", "steps"], ["last_visible"]),
        node("Unsqueeze", ["last_visible", "head_and_slot"], ["last_visible_4"]),
        node("LessOrEqual", ["slots", "last_visible_4"], ["mask"]),
        node(
            "KVCacheAttention",
            ["query", "key", "value", *(pasts[::-1] if swap else pasts), "write_indices", "mask"],
            ["attended", *presents],
            domain="star",
        ),
        node("Transpose", ["attended"], ["attended_t"], perm=[0, 2, 1, 3]),
        node("Reshape", ["attended_t", "join"], ["joined"]),
        node("Add", ["x", "joined"], ["sum"]),
        node("Cast", ["sum"], ["hidden_states"], to=TensorProto.FLOAT),
    ]
    weights = {
        f"w_{part}": random((HIDDEN, heads * DIM))
        for part, heads in (("query", HEADS), ("key", KV), ("value", KV))
    }
    constants = {
        "zero": np.int64(0),
        "one": np.int64(1),
        "last": np.array([-1]),
        "tail": np.array([1]),
        "join": np.array([0, 0, HIDDEN]),
        "head_and_slot": np.array([1, 3]),
        f"split_{HEADS}": np.array([0, 0, HEADS, DIM]),
        f"split_{KV}": np.array([0, 0, KV, DIM]),
    }
    model = model_from_nodes(
        nodes, inputs, outputs, weights | {k: np.asarray(v) for k, v in constants.items()}
    )
    model.functions.append(attention_function())
    model.opset_import.append(helper.make_opsetid("star", 1))
    return model


def random(shape, seed=0):
    return (np.random.default_rng(seed).standard_normal(shape) / 8).astype(np.float32)


def write_decoder_bundle(root: Path, *, precision: str = "bf16", model=None) -> Path:
    """A bundle with `base_ar` (one layer) and `token_embedding` (eight tokens);
    TensorRT builds it in a second."""
    decoder = write_component(root, "base_ar", model or decoder_model(), *decoder_io())
    io = (
        [TensorSpec("input_ids", "int64", ("B", "S"))],
        [TensorSpec("inputs_embeds", "float32", ("B", "S", HIDDEN))],
    )
    gather = model_from_nodes(
        [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])],
        *io,
        {"table": random((8, HIDDEN))},
    )
    embedding = write_component(root, "token_embedding", gather, *io)
    write_manifest(
        root,
        {"base_ar": decoder, "token_embedding": embedding},
        precision=precision,
        model=replace(MODEL, cache={"base_ar": CacheSpec(1, KV, DIM)}),
    )
    return root


def buffers_of(session, *, rows=2, tokens=1, capacity=16):
    """A buffer for every input of `session`, and one for `hidden_states`; caches hold `capacity` slots."""
    return {
        "inputs_embeds": session.buffer((rows, tokens, HIDDEN), "float32"),
        "position_ids": session.buffer((3, rows, tokens), "int64"),
        "write_indices": session.buffer((rows,), "int64"),
        "hidden_states": session.buffer((rows, tokens, HIDDEN), "float32"),
    } | {
        f"past_key_values.0.{p}": session.buffer((rows, KV, capacity, DIM), "bfloat16")
        for p in ("key", "value")
    }
