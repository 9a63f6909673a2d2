"""Trace a component on the meta device to an ONNX graph with compute type bfloat16 and empty initializers.

The graph needs shapes, not numbers, so nothing here depends on the size of a checkpoint. An initializer has
the name of its parameter in `reference.model.Star`, and the layout [in, out] where a linear layer multiplies
by it; a value's metadata has the tensor of `Star` that it is (`modules.py`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import logging
import warnings
from collections.abc import Container

import onnx_ir as ir
import torch
from onnxscript import optimizer
from torch import nn
from torch.export import Dim

from engines.bundle.manifest import TensorSpec
from engines.bundle.tensors import shape_from_symbols
from engines.errors import InputError
from reference.config import StarConfig

from ..components import COMPONENTS, Part, boundary
from . import ops, wrappers
from .modules import MODULE, modules_from_scopes
from .quantize import TRANSPOSED

EXAMPLE = {
    "B": 2,
    "S": 5,
    "C": 24,
    "N": 3,
    "P": 24,
    "L": 7,
    "T": 15,
    "Q": 6,
}  # sizes while tracing; all these axes stay dynamic
DTYPES = {"float32": torch.float32, "int64": torch.int64, "bfloat16": torch.bfloat16}
EXACT = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)  # constants that every compute type represents exactly


@functools.lru_cache(maxsize=8 * len(COMPONENTS))
def _traced(part: Part, config: StarConfig, rope_bf16: bool) -> ir.Model:
    return graph_from_part(part, meta_star(config, rope_bf16=rope_bf16))


def traced_graph(part: Part, config: StarConfig, *, rope_bf16: bool) -> ir.Model:
    """Return a graph of `part` that the caller may change.

    It is traced once per process, because every precision starts from the same graph.
    """
    return _traced(part, config, rope_bf16).clone()


def meta_star(config: StarConfig, *, rope_bf16: bool) -> wrappers.FoldedStar:
    """A Star on the meta device that calls our ops and has the adapter's table as one more parameter."""
    with torch.device("meta"):
        star = wrappers.FoldedStar(
            config, rope_bf16=rope_bf16, attention=ops.kv_cache_attention, rotate=ops.rotate
        )
    for parameter in star.parameters():  # buffers keep float32
        parameter.data = parameter.data.to(torch.bfloat16)
    return star.eval()


def graph_from_part(part: Part, star: wrappers.FoldedStar) -> ir.Model:
    """Trace one graph of `star` (from `meta_star`), layer by layer.

    Raises InputError naming the component if the exporter cannot translate an operation.
    """
    name, module = part.name, wrappers.wrapper_of(part, star)
    inputs, outputs = boundary(part, star.config, "bfloat16")
    model = _export(name, module, inputs, outputs)
    _name_initializers(model, module, star)
    _optimize(model)
    _fold_transposes(model, tables={row.table for row in COMPONENTS.values()})
    _check_constants(name, model)
    _name_axes(name, model, inputs, outputs)
    if any(node.op_type == ops.NAME for node in model.graph):
        body = ops.function_body()
        model.functions[body.identifier()] = body
    modules = modules_from_scopes(model, module, star)
    _strip(name, model)
    for value, tensor in modules.items():
        value.metadata_props[MODULE] = tensor
    return model


def _export(
    name: str, module: nn.Module, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> ir.Model:
    dims = _dims(inputs)
    args = tuple(
        torch.empty([_size(d) for d in spec.shape], dtype=DTYPES[spec.dtype], device="meta")
        for spec in inputs
    )
    shapes = [{i: dims[d] for i, d in enumerate(spec.shape) if isinstance(d, str)} for spec in inputs]
    parameters = inspect.signature(module.forward).parameters.values()
    named = sum(parameter.kind != parameter.VAR_POSITIONAL for parameter in parameters)
    dynamic = (*shapes[:named], tuple(shapes[named:])) if named < len(parameters) else tuple(shapes)
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                opset_version=ops.OPSET,
                optimize=False,
                dynamic_shapes=dynamic,
                verbose=False,
                input_names=[s.name for s in inputs],
                output_names=[s.name for s in outputs],
                custom_translation_table=ops.translation_table(),
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise InputError(
            "This component cannot be exported",
            where=f"{name}: opset {ops.OPSET}: {str(cause).splitlines()[0]}",
            fix="use a torch version in the tested range (pyproject.toml)",
        ) from error
    return program.model


def _dims(inputs: tuple[TensorSpec, ...]) -> dict[str, object]:
    images, quads = Dim("images", min=1, max=64), Dim("merged", min=1, max=16384)
    patches, places = Dim("patches", min=2, max=16384), Dim("places", min=2, max=256)
    return {
        "B": Dim("rows", min=1, max=64),
        "S": Dim("positions", min=1, max=32768),
        "C": Dim("capacity", min=1, max=131072),
        "N": images,
        "2N": 2 * images,
        "P": 4 * quads,
        "L": Dim("caption", min=1, max=8192),
        "T": patches,
        "2T": 2 * patches,
        "Q": places,
        "8Q": 8 * places,
    }


def _size(dim: int | str) -> int:
    return dim if isinstance(dim, int) else shape_from_symbols((dim,), EXAMPLE)[0]


@contextlib.contextmanager
def _quiet():
    """Silence torch while it traces: it prints progress, warns about packages that this project does not use,
    and logs tracebacks of what it raises anyway.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(before)


def _name_initializers(model: ir.Model, module: nn.Module, star: wrappers.FoldedStar) -> None:
    """Rename initializers after `Star`'s tensors, and empty those of parameters.

    Buffers take their values from the configuration.
    """
    constants = star.constants()
    names = {id(tensor): name for name, tensor in (*star.named_parameters(), *star.named_buffers())}
    for local, tensor in (*module.named_parameters(), *module.named_buffers()):
        value = model.graph.initializers.get(local)
        if value is None:
            continue
        value.const_value = None
        value.name = names[id(tensor)]
        if value.name in constants:
            value.const_value = ir.tensor(constants[value.name].numpy(), name=value.name)


def _optimize(model: ir.Model) -> None:
    """Fold shape arithmetic. Empty initializers are graph inputs meanwhile, as they hold nothing to fold."""
    empty = [value for value in model.graph.initializers.values() if value.const_value is None]
    for value in empty:
        del model.graph.initializers[value.name]
        model.graph.inputs.append(value)
    optimizer.optimize_ir(model)
    for value in empty:
        model.graph.inputs.remove(value)
        if value.uses():
            model.graph.initializers.add(value)


def _fold_transposes(model: ir.Model, *, tables: Container[str | None]) -> None:
    """Turn `MatMul(x, Transpose(weight))` into `MatMul(x, weight)`, with the weight stored transposed.

    A weight whose rows a table looks up keeps its layout: x [B,K] is multiplied by `Gemm` instead.
    """
    for node in list(model.graph):
        weight = node.inputs[0] if node.op_type == "Transpose" else None
        if (
            weight is None
            or not weight.is_initializer()
            or weight.const_value is not None
            or len(weight.uses()) != 1
        ):
            continue
        if weight.name in tables:
            _multiply_rows(model, node, weight)
            continue
        node.outputs[0].replace_all_uses_with(weight)
        model.graph.remove(node, safe=True)
        weight.shape = ir.Shape(list(weight.shape)[::-1])
        weight.metadata_props[TRANSPOSED] = "1"


def _multiply_rows(model: ir.Model, transpose: ir.Node, weight: ir.Value) -> None:
    """Replace `MatMul(x, Transpose(weight))` of x [B,K] by `Gemm(x, weight, transB=1)`."""
    ((matmul, _),) = transpose.outputs[0].uses()
    old = matmul.outputs[0]
    gemm = ir.node("Gemm", [matmul.inputs[0], weight], {"transB": 1}, name=matmul.name)
    gemm.metadata_props.update(matmul.metadata_props)
    new = gemm.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    model.graph.insert_before(matmul, gemm)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    model.graph.remove([matmul, transpose], safe=True)


def _check_constants(name: str, model: ir.Model) -> None:
    """Refuse inexact constants in the compute type, which another precision would round a second time."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.dtype == ir.DataType.BFLOAT16:
            numbers = value.const_value.numpy().astype("float32").reshape(-1)
            if not all(n in EXACT or abs(n) == float("inf") for n in numbers.tolist()):
                raise AssertionError(
                    f"{name}: constant {value.name} would be rounded to bfloat16: {numbers[:4]}"
                )


def _name_axes(
    name: str, model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> None:
    """Name the boundary's axes as the table does, after checking that all dynamic axes are still dynamic.

    The exporter may fix a dynamic axis without an error (pytorch issue 152018).
    """
    for values, specs in ((model.graph.inputs, inputs), (model.graph.outputs, outputs)):
        if [v.name for v in values] != [s.name for s in specs]:
            raise AssertionError(
                f"{name}: expected {[s.name for s in specs]}, got {[v.name for v in values]}"
            )
        for value, spec in zip(values, specs):
            traced = list(value.shape)
            fixed = [
                d for d, wanted in zip(traced, spec.shape) if isinstance(wanted, str) and isinstance(d, int)
            ]
            wrong = [d for d, wanted in zip(traced, spec.shape) if isinstance(wanted, int) and d != wanted]
            if fixed or wrong or len(traced) != len(spec.shape):
                raise AssertionError(f"{name}: {spec.name}: expected {spec.shape}, got {traced}")
            value.shape = ir.Shape(spec.shape)


def _strip(name: str, model: ir.Model) -> None:
    """Drop the stack traces and module paths that the exporter records about this machine."""
    model.graph.name = name
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    for value in model.graph.initializers.values():
        for key in [key for key in value.metadata_props if key != TRANSPOSED]:
            del value.metadata_props[key]
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
