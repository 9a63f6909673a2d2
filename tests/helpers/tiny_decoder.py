"""A decoder of one attention layer whose new keys and values are its inputs: its cache can be read."""

from __future__ import annotations

from dataclasses import replace

from onnx import helper

from engines.bundle.manifest import CacheSpec, TensorSpec
from engines.runtime.kv_cache import cache_buffers
from tests.helpers.tiny_bundle import MODEL, model_from_nodes, write_component, write_manifest

KV_HEADS, SIZE = 2, 8
CACHE = ("B", KV_HEADS, "C", SIZE)


def boundary(*, inputs_embeds="float32"):
    """Inputs and outputs of the decoder, as in the manifest; `mask` stands for positions."""
    inputs = [
        TensorSpec("inputs_embeds", inputs_embeds, ("B", KV_HEADS, "S", SIZE)),
        TensorSpec("write_indices", "int64", ("B",)),
        TensorSpec("mask", "bool", ("B", 1, "S", "C")),
        TensorSpec("past_key_values.0.key", "float32", CACHE),
        TensorSpec("past_key_values.0.value", "float32", CACHE),
    ]
    outputs = [
        TensorSpec("hidden_states", "float32", ("B", KV_HEADS, "S", SIZE)),
        TensorSpec("present.0.key", "float32", CACHE),
        TensorSpec("present.0.value", "float32", CACHE),
    ]
    return inputs, outputs


def write_decoder_bundle(root, *, manifest_boundary=None):
    """A bundle with this decoder as `base_ar`; `manifest_boundary` lets the manifest say something else."""
    inputs, outputs = boundary()
    nodes = [
        helper.make_node(
            "TensorScatter",
            [f"past_key_values.0.{part}", "inputs_embeds", "write_indices"],
            [f"present.0.{part}"],
            axis=-2,
            mode="linear",
        )
        for part in ("key", "value")
    ]
    nodes.append(
        helper.make_node(
            "Attention", ["inputs_embeds", "present.0.key", "present.0.value", "mask"], ["hidden_states"]
        )
    )
    spec = write_component(
        root, "base_ar", model_from_nodes(nodes, inputs, outputs), *(manifest_boundary or (inputs, outputs))
    )
    write_manifest(
        root, {"base_ar": spec}, model=replace(MODEL, cache={"base_ar": CacheSpec(1, KV_HEADS, SIZE)})
    )
    return root


def decoder_buffers(session, *, tokens=1, capacity=16, rows=2):
    """A buffer for every input and output of a session of this decoder; the caches are bound in place."""
    shapes = {
        "inputs_embeds": (rows, KV_HEADS, tokens, SIZE),
        "write_indices": (rows,),
        "mask": (rows, 1, tokens, capacity),
    }
    buffers = {
        t.name: session.buffer(shapes[t.name], t.dtype) for t in session.spec.inputs if t.name in shapes
    }
    buffers["hidden_states"] = session.buffer(shapes["inputs_embeds"], "float32")
    return buffers | cache_buffers(session, rows=rows, capacity_tokens=capacity)
