"""A decoder of noise in OpenVINO's operators, in the form that OpenVINO GenAI loads, and its decode steps."""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from reference.config import DecoderConfig
from tests.peers import Steps


def openvino_steps(config: DecoderConfig, bits: int, kind: str, *, rows: list[int], filled: int) -> Steps:
    """One new position of a stateful OpenVINO model, whose state grows with each."""
    import openvino

    model, stored = openvino_model(config, bits)
    if bits == 32 and kind == "bf16":
        stored //= 2  # it converts the weights while it loads them
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": kind}
    hints["INFERENCE_NUM_THREADS"] = str(os.cpu_count())
    compiled = openvino.Core().compile_model(model, "CPU", hints)

    def step_of(count: int) -> Callable[[], None]:
        request, seen = compiled.create_infer_request(), 0

        def run(tokens: int = 1) -> None:
            nonlocal seen
            positions = np.arange(seen, seen + tokens, dtype=np.float32)
            request.infer(
                {
                    "inputs_embeds": np.ones((count, tokens, config.hidden_size), np.float32),
                    "attention_mask": np.zeros((count, 1, tokens, seen + tokens), np.float32),
                    "position_ids": np.tile(positions, (count, 1)),
                    "beam_idx": np.arange(count, dtype=np.int32),
                }
            )
            seen += tokens

        run(filled)
        return run

    return {count: (step_of(count), stored) for count in rows}


def openvino_model(config: DecoderConfig, bits: int):
    """(model, bytes of its weights): the decoder in OpenVINO's operators."""
    import openvino
    from openvino import opset13 as op

    rng, stored = np.random.default_rng(0), [0]
    size, heads, kv, dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim

    def constant(values: np.ndarray):
        stored[0] += values.nbytes
        return op.constant(values)

    def weight(rows: int, features: int):
        """[rows, features] in float32, or integers times scales."""
        if bits == 32:
            return constant(rng.standard_normal((rows, features), dtype=np.float32) / features**0.5)
        block = 128 if bits == 4 else features
        shape = [rows, features // block, block] if bits == 4 else [rows, features]
        kind = openvino.Type.i4 if bits == 4 else openvino.Type.i8
        codes = openvino.Tensor(kind, openvino.Shape(shape))
        codes.data[...] = rng.integers(-128, 128, codes.data.shape, dtype=np.int8).view(codes.data.dtype)
        stored[0] += codes.byte_size
        scales = constant(np.full([*shape[:-1], 1], 0.5 / 2 ** (bits - 1) / features**0.5, np.float16))
        wide = op.multiply(op.convert(op.constant(codes), "f16"), scales)
        return op.convert(op.reshape(wide, [rows, features], False) if bits == 4 else wide, "f32")

    def linear(x, rows: int, features: int, *, bias: bool = False):
        made = op.matmul(x, weight(rows, features), False, True)
        return op.add(made, constant(np.zeros((1, 1, rows), np.float32))) if bias else made

    def norm(x):
        mean = op.reduce_mean(op.power(x, np.float32(2)), [-1], True)
        root = op.sqrt(op.add(mean, np.float32(config.rms_norm_eps)))
        scaled = op.multiply(op.divide(np.float32(1), root), x)
        return op.multiply(scaled, constant(np.ones((1, 1, size), np.float32)))

    def turned(x):
        """Rotary embedding of x [B, h, S, D] in halves."""
        first, second = op.split(x, 3, 2).outputs()
        other = op.concat([op.multiply(second, np.float32(-1)), first], 3)
        return op.add(op.multiply(x, cos), op.multiply(other, sin))

    def split(x, count: int):
        return op.transpose(op.reshape(x, [0, 0, count, dim], True), [0, 2, 1, 3])

    def cached(new, name: str):
        """(the whole cache [B, h, n, D], the node that keeps it) after `new` [B, KV, S, D]."""
        shape = op.concat([batch, np.array([kv, 0, dim], np.int64)], 0)
        empty, open_shape = op.broadcast(np.float32(0), shape), openvino.PartialShape([-1, kv, -1, dim])
        past = op.read_value(empty, name, openvino.Type.f32, open_shape)
        whole = op.concat([op.gather(past, rows_of, np.int64(0)), new], 2)
        copies = np.array([1, 1, heads // kv, 1, 1], np.int64)
        shared = op.broadcast(op.unsqueeze(whole, [2]), copies, broadcast_spec="BIDIRECTIONAL")
        return op.reshape(shared, [0, heads, -1, dim], True), op.assign(whole, name)

    inputs = {
        "inputs_embeds": op.parameter([-1, -1, size], np.float32),
        "attention_mask": op.parameter([-1, 1, -1, -1], np.float32),
        "position_ids": op.parameter([-1, -1], np.float32),
        "beam_idx": op.parameter([-1], np.int32),
    }
    for name, node in inputs.items():
        node.friendly_name = name
        node.output(0).tensor.set_names({name})
    x, mask, positions, rows_of = inputs.values()
    batch = op.gather(op.shape_of(x, "i64"), np.array([0]), np.int64(0))
    frequencies = (1 / config.rope_theta ** (np.arange(0, dim, 2) / dim)).astype(np.float32)
    half = op.multiply(op.unsqueeze(positions, [1, 3]), frequencies.reshape(1, 1, 1, -1))
    angles = op.concat([half, half], 3)
    cos, sin, kept = op.cos(angles), op.sin(angles), []
    for layer in range(config.num_layers):
        normed = norm(x)
        query, key, value = (
            split(linear(normed, count * dim, size, bias=True), count) for count in (heads, kv, kv)
        )
        (keys, keep_key), (values, keep_value) = cached(turned(key), f"k{layer}"), cached(value, f"v{layer}")
        kept += [keep_key, keep_value]
        seen = op.scaled_dot_product_attention(turned(query), keys, values, mask)
        seen = op.reshape(op.transpose(seen, [0, 2, 1, 3]), [0, 0, size], True)
        x = op.add(x, linear(seen, size, size))
        normed = norm(x)
        gate, up = (linear(normed, config.intermediate_size, size) for _ in range(2))
        x = op.add(x, linear(op.multiply(op.swish(gate), up), size, config.intermediate_size))
    model = openvino.Model([op.result(norm(x))], kept, list(inputs.values()), "decoder")
    return model, stored[0]
