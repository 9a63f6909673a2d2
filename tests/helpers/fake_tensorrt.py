"""A TensorRT engine without a device: it computes in numpy, on memory whose addresses it is given."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import numpy as np

from engines.bundle.manifest import ComponentSpec
from tests.helpers.decoder_bundle import decoder_io

SPEC = ComponentSpec("base_ar/model.onnx", None, "base_ar/golden.safetensors", *map(tuple, decoder_io()))
STREAM = 7


class Context:
    """Writes `hidden_states = 2 inputs_embeds`, and adds one to each cache slot that is written."""

    def __init__(self, memory):
        self.memory, self.shapes, self.addresses, self.calls = memory, {}, {}, []

    def set_device_memory(self, address, size):
        assert self.memory[address].size >= size

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return stream == STREAM

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name):
        if name == "hidden_states":
            return self.shapes["inputs_embeds"]
        return self.shapes[name.replace("present", "past_key_values")]

    def array(self, name, shape, dtype):
        return np.frombuffer(
            (ctypes.c_char * (int(np.prod(shape)) * np.dtype(dtype).itemsize)).from_address(
                self.addresses[name]
            ),
            dtype,
        ).reshape(shape)

    def execute_async_v3(self, stream):
        self.calls.append(self.profile)
        shape = self.shapes["inputs_embeds"]
        self.array("hidden_states", shape, "f4")[...] = 2 * self.array("inputs_embeds", shape, "f4")
        for part in ("key", "value"):
            assert self.addresses[f"present.0.{part}"] == self.addresses[f"past_key_values.0.{part}"], (
                "a cache was moved"
            )
            cache = self.array(f"present.0.{part}", self.shapes[f"past_key_values.0.{part}"], "u2")
            for row, index in enumerate(self.array("write_indices", shape[:1], "i8")):
                cache[row, :, index : index + shape[1]] = 0x3F80  # 1.0 in bfloat16
        return stream == STREAM


class Engine:
    num_optimization_profiles, device_memory_size_v2 = 2, 1024

    def __init__(self, memory, names=None):
        self.memory, self.contexts = memory, []
        self.names = names or [t.name for t in SPEC.inputs + SPEC.outputs]
        self.num_io_tensors = len(self.names)

    def get_tensor_name(self, i):
        return self.names[i]

    def create_execution_context(self, strategy):
        assert strategy == "by the user"
        self.contexts.append(Context(self.memory))
        return self.contexts[-1]


TRT = SimpleNamespace(ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="by the user"))
