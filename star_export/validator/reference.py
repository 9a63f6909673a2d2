"""The reference of a bundle, made again from its checkpoint, and from the bundle what was calibrated.

Rounding to nearest follows from the checkpoint, in mixed precision with the formats of the layers. What a
calibration chose does not, so the codes that it chose, and the norms that it folded scales into, are read
from the bundle. A bundle under suspicion is no witness of its own weights: the golden tensors are, which were
recorded with them. A reference that does not reproduce the golden tensors proves nothing and is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from engines.bundle.manifest import TensorSpec, component_of
from engines.bundle.reader import Bundle
from engines.bundle.tensors import PAST, PRESENT
from engines.errors import InputError
from reference.containers import LazyTensor
from reference.weights import named_tensors, resolve_checkpoint

from ..choice import formats_of
from ..components import COMPONENTS, Part, boundary
from ..golden.cases import Case, Tensors, recorded_cases
from ..golden.compare import compare, verdict
from ..golden.intermediate import intermediate_tensors
from ..golden.oracle import lazy_image_table, streamed_star
from ..golden.run_case import written_slots
from ..golden.tolerances import compute_type, tolerances_of
from ..graph.formats import INT8, Encoded
from ..graph.precisions import DECODERS, PRECISIONS, Precision, mixed
from ..graph.quantize import CODES, StoredTensor
from ..graph.repeat import layer_of
from ..graph.wrappers import TABLE, FoldedStar

CALIBRATED = (*DECODERS, "image_head")
NORM = "layernorm.weight"  # how the names of the norms end that a calibration folds scales into


def reference_star(bundle: Bundle, names: list[str], source: str) -> FoldedStar:
    """The reference with the weights of the checkpoint `source`, rounded as `bundle` stores them; what was
    calibrated of the graphs `names` is the bundle's own.

    It reads weights only while it runs. Raises CheckpointError, and InputError for a file that has changed.
    """
    files = resolve_checkpoint(source)
    config = files.config()
    tensors = named_tensors(files, config)
    tensors = dict(tensors) | {TABLE: lazy_image_table(config, tensors)}
    if bundle.manifest.calibration:
        for name in names:
            if component_of(name) in CALIBRATED:
                tensors |= stored_weights(bundle, name, tensors)
    precision = precision_of(bundle, tensors)
    return streamed_star(config, tensors, precision, rope_bf16=bundle.manifest.model.rope_bf16)


def precision_of(bundle: Bundle, weights: Mapping[str, LazyTensor]) -> Precision:
    """The precision of a bundle, in mixed precision with the format of each of the `weights` by its name."""
    formats = formats_of(bundle)
    if formats is None:
        return PRECISIONS[bundle.manifest.precision]
    wide = tuple(f"{layer}." for layer in formats.wide())
    return mixed({weight: INT8 for weight in weights if weight.startswith(wide)})


def stored_weights(bundle: Bundle, name: str, checkpoint: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The quantised weights and the layers' norms of a graph, as `bundle` stores them, read when they are
    loaded. Names and shapes are those of the `checkpoint`. Raises InputError for a file that has changed."""
    path = bundle.graph(name)
    model, found = ir.load(path), dict[str, LazyTensor]()
    for node in model.graph:
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if codes is not None and (weight := str(codes.name).removesuffix(CODES)) in checkpoint:
            shape, encoded = tuple(checkpoint[weight].shape), partial(_encoded, node)
            read = partial(_decoded, node)
            found[weight] = StoredTensor(weight, shape, torch.float32, path, read, encoded)
    for weight, value in model.graph.initializers.items():
        if weight.endswith(NORM) and layer_of(weight) is not None:
            shape = tuple(checkpoint[weight].shape)
            found[weight] = LazyTensor(weight, shape, torch.float32, path, partial(_numbers, value))
    return found


def _encoded(dequantize: ir.Node) -> Encoded:
    """What a `DequantizeLinear` of a stored graph decodes, row by row (`graph/quantize.py`)."""
    stored, steps = dequantize.inputs[:2]
    inner, whole = steps.producer() if steps is not None else None, None
    if inner is not None:
        steps, whole = inner.inputs[0], _numbers(inner.inputs[1])
    codes, scales = _array(stored), _array(steps)
    if dequantize.attributes["axis"].value == ("block_size" not in dequantize.attributes):  # transposed
        codes, scales = codes.T, scales.T
    integers = codes.dtype in (np.int8, ml_dtypes.int4)
    bits = np.ascontiguousarray(codes.astype(np.int8) if integers else codes.view(np.int8))
    rows = len(bits)
    sizes = torch.from_numpy(scales.reshape(rows, -1).astype(np.float32))
    return Encoded(
        torch.from_numpy(bits.reshape(rows, -1)), sizes, ir.DataType.from_numpy(codes.dtype), whole
    )


def _decoded(dequantize: ir.Node) -> torch.Tensor:
    return _encoded(dequantize).decode()


def _numbers(value: ir.Value | None) -> torch.Tensor:
    """A constant of a graph in float32."""
    return torch.from_numpy(_array(value).astype(np.float32))


def _array(value: ir.Value | None) -> np.ndarray:
    assert value is not None and value.const_value is not None
    return value.const_value.numpy()


class Reference:
    """The reference's tensors for each case of one graph, once it has given the golden ones."""

    def __init__(self, bundle: Bundle, name: str, star: FoldedStar):
        self.bundle, self.name, self.star = bundle, name, star
        spec = bundle.component(name)
        component = component_of(name)
        stack, held = COMPONENTS[component].stack, None
        if stack:
            stored = ir.load(bundle.graph(name)).graph.initializers
            layers = [layer for weight in stored if (layer := layer_of(weight)) is not None]
            held = range(min(layers), max(layers) + 1)
        self.part = Part(name, component, held)
        wanted = _signature(spec.inputs, spec.outputs)
        got = _signature(*boundary(self.part, star.config, "float32"))
        layers_of = bundle.manifest.model.cache.get(component)
        if stack and layers_of and layers_of.layers != stack.layers(star.config):
            wanted["layers"], got["layers"] = layers_of.layers, stack.layers(star.config)
        if differing := [key for key in wanted.keys() | got.keys() if wanted.get(key) != got.get(key)]:
            key = min(differing)
            raise _other_checkpoint(name, f"{key}: expected {wanted.get(key)}, got {got.get(key)}")
        self.cases = recorded_cases(bundle, name)
        self.compute = compute_type(bundle.manifest.precision, twin=True)
        self._made: dict[str, Tensors] = {}

    def tensors(self, case: str, rounded: Tensors) -> tuple[Tensors, Tensors]:
        """The outputs, and the tensors inside by the names of `graph/modules.py`.

        `rounded` is what a candidate rounded to nvfp4 (`golden/intermediate.py`); without any, the outputs
        are the golden ones. Raises InputError if the reference does not give these.
        """
        recorded = self.cases[case]
        if case not in self._made:
            outputs, self._made[case] = intermediate_tensors(self.part, self.star, recorded.inputs)
            results = compare(
                {name: seen(name, array, recorded) for name, array in outputs.items()},
                {name: seen(name, array, recorded) for name, array in recorded.outputs.items()},
                tolerances=tolerances_of(self.name, self.compute, recorded.noise_in(self.compute)),
            )
            if failing := [result for result in results if not result.passed]:
                first = min(failing, key=lambda result: layer_of(result.tensor) or 0)
                raise self._not_reproduced(f"case {case}: {verdict(first)}")
        if not rounded:
            return recorded.outputs, self._made[case]
        return intermediate_tensors(self.part, self.star, recorded.inputs, rounded)

    def _not_reproduced(self, difference: str) -> InputError:
        """What is to blame: the bundle's weights, if the checkpoint is the one that was exported."""
        calibrated = self.bundle.manifest.calibration and self.part.component in CALIBRATED
        if not calibrated or self._other_constants():
            return _other_checkpoint(self.name, difference)
        return InputError(
            "The calibrated weights of this bundle do not give its golden tensors",
            where=f"{self.name}: {difference}; the weights in {', '.join(self.bundle.weights(self.name))} "
            "are not those that were recorded",
            fix="export the bundle again",
        )

    def _other_constants(self) -> bool:
        """Whether a small constant of the graph that no calibration touches is not the checkpoint's."""
        stored = ir.load(self.bundle.graph(self.name)).graph.initializers
        for name, parameter in self.star.named_parameters():
            value = stored.get(name)
            if value is None or parameter.is_meta or parameter.ndim != 1 or name.endswith(NORM):
                continue
            if not torch.equal(parameter, _numbers(value)):
                return True
        return False


def _signature(*sides: tuple[TensorSpec, ...]) -> dict[str, object]:
    """Input or output -> its shape."""
    return {tensor.name: tensor.shape for side in sides for tensor in side}


def _other_checkpoint(name: str, difference: str) -> InputError:
    return InputError(
        "The checkpoint does not give the golden tensors of this bundle",
        where=f"{name}: {difference}",
        fix="name the checkpoint that the bundle was exported from",
    )


def past(name: str) -> str:
    """The input that output `name` updates, `past_key_values.0.key` of `present.0.key`; "" of any other."""
    return f"{PAST}{name.removeprefix(PRESENT)}" if name.startswith(PRESENT) else ""


def seen(name: str, array: np.ndarray, case: Case) -> np.ndarray:
    """Of a cache the slots that the case writes; all of any other tensor."""
    if past(name) in case.inputs:
        return written_slots(array, case.inputs["write_indices"], case.inputs["inputs_embeds"].shape[1])
    return array
