"""The files of one graph in a bundle, and its entry in the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from engines import plugins
from engines.bundle.manifest import ComponentSpec
from engines.bundle.tensors import present_name
from engines.progress import Progress, adder, silent
from reference.config import StarConfig
from reference.containers import LazyTensor

from ..components import Part, boundary
from ..graph import lint
from ..graph.classic import classic_from_graph
from ..graph.precisions import Precision
from ..graph.quantize import INLINE_BYTES, attach_weights, set_precision, twin_from_graph
from ..planner.source import bytes_by_format, shapes_of


def write_component(
    model: ir.Model,
    tensors: Mapping[str, LazyTensor],
    precision: Precision,
    folder: Path,
    *,
    progress: Progress = silent,
) -> None:
    """Set a traced graph's precision, lint it, and stream its weights into `folder/model.onnx.data`.

    `precision` is that within the component. Then write the classic graph, if the classic dialect has all of
    the precision's formats, and for a 16-bit graph the fp32 twin. They share the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    set_precision(model, precision.compute)
    attach_weights(model, tensors, precision)
    lint.check_graph(model)
    values = [value.const_value for value in model.graph.initializers.values()]
    sizes = [value.nbytes for value in values if value is not None]
    streamed = sum(size for size in sizes if size > INLINE_BYTES)
    tick = adder(progress, "write weights, in bytes", streamed)
    ir.save(
        model,
        folder / "model.onnx",
        external_data=lint.DATA_FILE,
        size_threshold_bytes=INLINE_BYTES,
        callback=lambda tensor, _: tick(tensor.nbytes),
    )
    if precision.classic:
        classic = classic_from_graph(ir.load(folder / "model.onnx"))
        (folder / "classic.onnx").write_bytes(ir.to_proto(classic).SerializeToString())
        lint.check_graph(folder / "classic.onnx", dialect="classic")
    if precision.compute != ir.DataType.FLOAT:
        twin = twin_from_graph(ir.load(folder / "model.onnx"))
        (folder / "twin.onnx").write_bytes(ir.to_proto(twin).SerializeToString())
    lint.check_graph(folder / "model.onnx")


def component_spec(part: Part, config: StarConfig, precision: Precision) -> ComponentSpec:
    """Build the manifest's entry of one graph."""
    precision = precision.within(part.component)
    inputs, outputs = boundary(part, config, precision.dtype_name)
    twin = None if precision.compute == ir.DataType.FLOAT else f"{part.name}/twin.onnx"
    abi = plugins.ABI if any(present_name(t.name) for t in inputs) else None
    return ComponentSpec(
        graph=f"{part.name}/model.onnx",
        twin=twin,
        golden=f"{part.name}/golden.safetensors",
        inputs=inputs,
        outputs=outputs,
        classic=f"{part.name}/classic.onnx" if precision.classic else None,
        plugin_abi=abi if precision.classic else None,
        weights=bytes_by_format(shapes_of(part, config), precision),
    )
