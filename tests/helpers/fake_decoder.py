"""A decoder session in numpy, with faults to plant: one layer, one head, cache [B,1,C,H] updated in place."""

from __future__ import annotations

import numpy as np

from engines.bundle.manifest import ComponentSpec, TensorSpec
from engines.bundle.tensors import check_binding

H = 8


def spec(cache: str = "float32") -> ComponentSpec:
    def caches(side: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"{side}.0.{part}", cache, ("B", 1, "C", H)) for part in ("key", "value"))

    inputs = (
        TensorSpec("inputs_embeds", "float32", ("B", "S", H)),
        TensorSpec("position_ids", "int64", (3, "B", "S")),
        TensorSpec("write_indices", "int64", ("B",)),
    )
    outputs = (TensorSpec("hidden_states", "float32", ("B", "S", H)),)
    return ComponentSpec(
        graph="fake/model.onnx",
        twin=None,
        golden="fake/golden.safetensors",
        inputs=inputs + caches("past_key_values"),
        outputs=outputs + caches("present"),
    )


class Buffer:
    def __init__(self, shape, dtype):
        self.array = np.zeros(shape, dtype)
        self.shape, self.dtype = self.array.shape, dtype

    def write(self, array):
        assert array.shape == self.shape and array.dtype == self.dtype
        self.array[...] = array

    def read(self):
        return self.array


class FakeDecoder:
    """`fault(step, cache_key, cache_value, state)` may spoil things; `step` counts calls of one token."""

    capacity_tokens = prefill_tokens = None

    def __init__(self, fault: str = "", cache: str = "float32"):
        self.spec, self.fault = spec(cache), fault
        self.weights = np.random.default_rng(0).standard_normal((3, H, H)).astype(np.float32) / 3

    def buffer(self, shape, dtype):
        return Buffer(shape, dtype)

    def bind(self, tensors):
        check_binding(self.spec, tensors)
        return lambda: self.step({name: buffer.array for name, buffer in tensors.items()})

    def close(self):
        pass

    def step(self, t):
        x, position, write = t["inputs_embeds"], t["position_ids"][0], t["write_indices"]
        key_cache, value_cache = t["past_key_values.0.key"], t["past_key_values.0.value"]
        (rows, tokens, _), capacity = x.shape, key_cache.shape[2]
        if self.fault == "every row at the first row's index":
            write = np.full_like(write, write[0])
        turned = (
            x
            * np.cos(position + (self.fault == "position off at step 5" and tokens == 1 and write[0] == 5))[
                ..., None
            ]
        )
        query, key, value = turned @ self.weights[0], turned @ self.weights[1], x @ self.weights[2]
        if self.fault == "second row gets the first row's value":
            value = np.repeat(value[:1], rows, 0)
        for b in range(rows):
            end = (
                write[b]
                + tokens
                - (self.fault == "last slot of the capacity not written" and write[b] + tokens == capacity)
            )
            key_cache[b, 0, write[b] : end] = key[b, : end - write[b]]
            value_cache[b, 0, write[b] : end] = value[b, : end - write[b]]
            if self.fault == "one slot too many is written" and end < capacity:
                value_cache[b, 0, end] = 0
            if self.fault == "an old slot is overwritten" and tokens == 1 and write[b] > 2:
                key_cache[b, 0, 1] += 1e-6
            visible = np.arange(capacity) <= write[b] + np.arange(tokens)[:, None]
            if self.fault == "one slot too many is read":
                visible = np.arange(capacity) <= write[b] + np.arange(tokens)[:, None] + 1
            if self.fault == "the token does not see itself" and tokens == 1 and write[b]:
                visible = np.arange(capacity) < write[b]
            if self.fault == "a long prompt forgets its first token" and tokens > 12:
                visible[12:, 0] = False
            scores = np.where(visible, query[b] @ key_cache[b, 0].astype(np.float32).T, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            t["hidden_states"][b] = (
                weights / weights.sum(-1, keepdims=True) @ value_cache[b, 0].astype(np.float32) + x[b]
            )


FAULTS = (
    "every row at the first row's index",
    "position off at step 5",
    "second row gets the first row's value",
    "last slot of the capacity not written",
    "one slot too many is written",
    "an old slot is overwritten",
    "one slot too many is read",
    "the token does not see itself",
)
LONG_FAULT = "a long prompt forgets its first token"  # one of more than 12 tokens
