"""A parsed network as data for people, and as one number: what TensorRT sees, and whether two networks are the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from .parsed import Constant, Layer, Parsed, Tensor

NAMES = ("name", "metadata")  # attributes that say nothing of the arithmetic
UNSEEN = "what else is fused is decided while building, and a plan cannot be opened without its device"


def describe_network(parsed: Parsed) -> dict:
    """Boundary, layers with their attributes, how many of each kind, what will be fused where the network says so, and its
    SHA-256."""
    return {
        "inputs": {t.name: _signature(t) for t in parsed.inputs},
        "outputs": {t.name: _signature(t) for t in parsed.outputs},
        "kinds": dict(sorted(Counter(layer.kind for layer in parsed.layers).items())),
        "layers": [_description(layer) for layer in parsed.layers],
        "fused": fusions(parsed),
        "not_seen": UNSEEN,
        "sha256": network_hash(parsed),
    }


def fusions(parsed: Parsed) -> list[dict]:
    """What the compiler will fuse, as far as the network says: attention as one kernel, weights dequantised inside a
    multiplication.

    An attention is one kernel unless `decomposable`: "TensorRT will try to use a single fused kernel" (NvInfer.h, IAttention).
    Weights that are dequantised and go nowhere but to a matrix multiplication, whatever their shape on the way, may be read as
    they are stored.
    """
    readers: dict[str, list[Layer]] = {}
    for layer in parsed.layers:
        for tensor in layer.inputs:
            if tensor is not None:
                readers.setdefault(tensor.name, []).append(layer)
    found = [
        {
            "kind": "attention",
            "layer": layer["name"],
            "kernels": "one, or several" if layer["decomposable"] else "one",
            "mask": layer["mask"] is not None,
            "causal": layer["causal_kind"],
            "lengths": layer["key_value_lengths"] is not None,
        }
        for layer in parsed.layers
        if layer.kind == "ATTENTION_INPUT"
    ]
    for layer in parsed.layers:
        reader = layer
        while reader.kind in ("DEQUANTIZE", "SHUFFLE") and len(readers.get(reader.outputs[0].name, ())) == 1:
            (reader,) = readers[reader.outputs[0].name]
        if layer.kind == "DEQUANTIZE" and reader.kind == "MATRIX_MULTIPLY":
            found.append(
                {
                    "kind": "quantised weights",
                    "layer": reader.name,
                    "weights": _signature(layer.inputs[0]),
                    "scales": _signature(layer.inputs[1]),
                }
            )
    return found


def network_hash(parsed: Parsed) -> str:
    """SHA-256 of all that decides what a network computes: kinds, attributes, types, shapes, connections and every constant's
    bytes.

    Two parses of one file agree: tensors are numbered in order, because the parser counts names up within a process.
    """
    numbers = {tensor.name: tensor.name for tensor in parsed.inputs}
    digest = hashlib.sha256(json.dumps([[t.name, t.kind, t.shape] for t in parsed.inputs]).encode())
    for layer in parsed.layers:
        for tensor in layer.outputs:
            numbers[tensor.name] = f"#{len(numbers)}"
        attributes = {
            key: numbers.get(value, value) if isinstance(value, str) else value
            for key, value in sorted(layer.attributes.items())
            if key not in NAMES and not isinstance(value, Constant)
        }
        row = [
            layer.kind,
            [t and numbers[t.name] for t in layer.inputs],
            [[t.kind, t.shape] for t in layer.outputs],
            attributes,
        ]
        digest.update(json.dumps(row).encode())
        for key, value in sorted(layer.attributes.items()):
            if isinstance(value, Constant):
                digest.update(f"{key} {value.kind} {value.count}".encode())
                digest.update(value.data)
    digest.update(json.dumps([[t.name, numbers[t.name]] for t in parsed.outputs]).encode())
    return digest.hexdigest()


def _description(layer: Layer) -> dict:
    attributes = {
        key: f"{value.count} x {value.kind}"
        if isinstance(value, Constant)
        else list(value)
        if isinstance(value, tuple)
        else value
        for key, value in layer.attributes.items()
        if key not in NAMES
    }
    return {
        "kind": layer.kind,
        "name": layer.name,
        "inputs": [t and f"{t.name}: {_signature(t)}" for t in layer.inputs],
        "outputs": [f"{t.name}: {_signature(t)}" for t in layer.outputs],
        "attributes": attributes,
    }


def _signature(tensor: Tensor) -> str:
    return f"{tensor.kind}[{','.join('*' if size < 0 else str(size) for size in tensor.shape)}]"
