"""A parsed network described for people and hashed: what TensorRT sees, and if two networks are equal."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

from .constants import Constant
from .parsed import Layer, Parsed, Tensor

NAMES = ("name", "metadata")  # attributes that do not affect the arithmetic
UNSEEN = "other fusions are decided during the build, and a plan cannot be opened without its device"


def describe_network(parsed: Parsed) -> dict:
    """What `inspect` shows of a network.

    Its inputs and outputs, the number of layers of each kind, the layers with their attributes, the fusions
    that the network itself announces, and its SHA-256.
    """
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
    """The fusions that the network announces: attention as one kernel, weights dequantised inside a
    multiplication.

    An attention is one kernel unless it is `decomposable`: "TensorRT will try to use a single fused kernel"
    (NvInfer.h, IAttention). Dequantised weights that only a matrix multiplication reads, perhaps reshaped on
    the way, may be read in their stored form.
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
                    "weights": _signature(layer.input(0)),
                    "scales": _signature(layer.input(1)),
                }
            )
    return found


def network_hash(parsed: Parsed) -> str:
    """The SHA-256 of everything that decides what a network computes.

    That is the kinds, attributes, types, shapes and connections of its layers, and the bytes of its
    constants. Two parses of one file have the same hash: the parser's names differ, so tensors are numbered
    in order instead.
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
                digest.update(value.data.data)  # without a copy
    digest.update(json.dumps([[t.name, numbers[t.name]] for t in parsed.outputs]).encode())
    return digest.hexdigest()


def _description(layer: Layer) -> dict:
    return {
        "kind": layer.kind,
        "name": layer.name,
        "inputs": [t and f"{t.name}: {_signature(t)}" for t in layer.inputs],
        "outputs": [f"{t.name}: {_signature(t)}" for t in layer.outputs],
        "attributes": {key: _shown(value) for key, value in layer.attributes.items() if key not in NAMES},
    }


def _shown(attribute: object) -> object:
    if isinstance(attribute, Constant):
        return f"{attribute.count} x {attribute.kind}"
    return list(attribute) if isinstance(attribute, tuple) else attribute


def _signature(tensor: Tensor) -> str:
    return f"{tensor.kind}[{','.join('*' if size < 0 else str(size) for size in tensor.shape)}]"
