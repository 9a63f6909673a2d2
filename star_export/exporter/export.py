"""Export a checkpoint to a bundle: the function behind `star-export export`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import onnx_ir as ir
import torch

from engines import plugins
from engines.bundle.manifest import ComponentSpec
from engines.bundle.tensors import present_name
from engines.errors import UsageError
from engines.fit.work import check_export
from engines.progress import Progress, silent
from reference.config import StarConfig, config_from_files
from reference.containers import LazyTensor
from reference.model import pixel_adapter
from reference.weights import named_tensors, resolve_checkpoint

from ..components import COMPONENTS
from ..golden import record as golden
from ..graph import lint
from ..graph.classic import classic_from_graph
from ..graph.quantize import PRECISIONS, Precision, attach_weights, rounded, set_precision, twin_from_graph
from ..graph.trace import graph_from_config
from ..graph.wrappers import TABLE, FoldedStar
from ..planner.source import Source, largest_tensor_bytes, sizes_from_source
from .model_spec import model_spec_from_checkpoint, score_files, tokenizer_files
from .publish import check_out, staged, write_manifest

INLINE_BYTES = 1024  # smaller tensors are shapes and scalars, and stay in model.onnx


def export(
    source: str,
    *,
    out: str | Path,
    precision: str = "fp32",
    checkpoint: str | None = None,
    base: str | None = None,
    vq: str | None = None,
    from_folder: str | None = None,
    rope_bf16: bool = True,
    components: list[str] | None = None,
    progress: Progress = silent,
) -> Path:
    """Export `source` to the new bundle `out`, and return the bundle's path.

    `source` is `star-3b`, `star-7b`, a folder in the release layout, its config JSON, `nano`, or a hub id;
    `checkpoint`, `base` and `vq` override parts of it. `from_folder` holds parts of `star-3b` or `star-7b`
    that need not be downloaded. `rope_bf16=False` keeps the rotary frequencies in float32 (docs/star.md 0.2).
    `components` limits the export to some rows of the table. Raises UsageError for unknown names, InputError
    for an `out` that is not empty or cannot be written, and CheckpointError for invalid files.
    """
    _check_names("precision", [precision], PRECISIONS)
    names = list(COMPONENTS) if components is None else components
    _check_names("component", names, COMPONENTS)
    out = Path(out)
    check_out(out)
    files = resolve_checkpoint(
        source, checkpoint=checkpoint, base=base, vq=vq, from_folder=from_folder, progress=progress
    )
    config = config_from_files(files.config_json, files.qwen_folder)
    tensors = named_tensors(files, config)
    tensors |= {TABLE: image_table(tensors, config, files.star_pt)}
    check_room(config, precision, names, out)
    step = _counter(progress, len(names) + 2)
    with staged(out) as stage:
        for name in names:
            step(f"export {name}")
            model = graph_from_config(name, config, rope_bf16=rope_bf16)
            write_component(model, tensors, PRECISIONS[precision], stage / name)
        step("record golden tensors")
        oracle = rounded_star(config, tensors, PRECISIONS[precision], rope_bf16=rope_bf16)
        record_golden(oracle, names, PRECISIONS[precision], stage)
        step("hash and publish")
        for file_name, data in (tokenizer_files(files) | score_files(files)).items():
            (stage / file_name).write_bytes(data)
        write_manifest(
            stage,
            precision=precision,
            model=model_spec_from_checkpoint(files, config, rope_bf16=rope_bf16),
            components={name: component_spec(name, config, PRECISIONS[precision]) for name in names},
        )
    return out


def check_room(config: StarConfig, precision: str, names: list[str], out: Path) -> None:
    """Check that the disk holds the bundle's weights, and the memory the largest decoder weight in float32.

    Raises MissingError with the bytes needed and free.
    """
    decoders = [name for name in names if COMPONENTS[name].quantized]
    check_export(
        sizes_from_source(Source(config, copied_bytes=0), precision, names),
        out,
        converted_bytes=largest_tensor_bytes(config, decoders),
    )


def write_component(
    model: ir.Model, tensors: Mapping[str, LazyTensor], precision: Precision, folder: Path
) -> None:
    """Set a traced graph's precision, lint it, and stream its weights into `folder/model.onnx.data`.

    Then write the classic graph and, for a 16-bit graph, the fp32 twin, which share the weights.
    """
    folder.mkdir()
    set_precision(model, precision.compute)
    attach_weights(model, tensors, precision)
    lint.check_graph(model)
    ir.save(model, folder / "model.onnx", external_data=lint.DATA_FILE, size_threshold_bytes=INLINE_BYTES)
    classic = classic_from_graph(ir.load(folder / "model.onnx"))
    (folder / "classic.onnx").write_bytes(ir.to_proto(classic).SerializeToString())
    lint.check_graph(folder / "classic.onnx", dialect="classic")
    if precision.compute != ir.DataType.FLOAT:
        twin = twin_from_graph(ir.load(folder / "model.onnx"))
        (folder / "twin.onnx").write_bytes(ir.to_proto(twin).SerializeToString())
    lint.check_graph(folder / "model.onnx")


def record_golden(oracle: FoldedStar, names: list[str], precision: Precision, stage: Path) -> None:
    """Record the golden tensors of the named components, and whole runs if these are all components."""
    for name in names:
        path = stage / name / "golden.safetensors"
        golden.component_golden(name, oracle, path, compute=precision.torch_dtype)
    if len(names) == len(COMPONENTS):
        golden.run_golden(oracle, stage / "golden.safetensors")


def component_spec(name: str, config: StarConfig, precision: Precision) -> ComponentSpec:
    """Build the manifest's entry of component `name`."""
    inputs, outputs = COMPONENTS[name].boundary(config, precision.dtype_name)
    twin = None if precision.compute == ir.DataType.FLOAT else f"{name}/twin.onnx"
    abi = plugins.ABI if any(present_name(t.name) for t in inputs) else None
    return ComponentSpec(
        graph=f"{name}/model.onnx",
        twin=twin,
        golden=f"{name}/golden.safetensors",
        inputs=inputs,
        outputs=outputs,
        classic=f"{name}/classic.onnx",
        plugin_abi=abi,
    )


def rounded_star(
    config: StarConfig, tensors: Mapping[str, LazyTensor], precision: Precision, *, rope_bf16: bool
) -> FoldedStar:
    """Load the reference in float32, with every weight rounded as the bundle stores it."""
    with torch.device("meta"):
        star = FoldedStar(config, rope_bf16=rope_bf16)
    weights = {name: rounded(name, tensors[name].load(), precision) for name, _ in star.named_parameters()}
    star.load_state_dict(weights, assign=True, strict=False)
    star.tie_text_head()
    for name, value in star.constants().items():
        module, _, buffer = name.rpartition(".")
        setattr(star.get_submodule(module), buffer, value)
    return star.eval().requires_grad_(False)


def image_table(tensors: Mapping[str, LazyTensor], config: StarConfig, source: Path) -> LazyTensor:
    """adapter(codebook) [codebook_size, H] in float32, computed from the checkpoint when it is loaded."""
    shape = (config.vq.codebook_size, config.base_ar.hidden_size)

    def compute() -> torch.Tensor:
        adapter = pixel_adapter(config.vq.codebook_dim, shape[1], depth=config.adapter_depth)
        adapter.load_state_dict(
            {name: tensors[f"pixel_adapter.{name}"].load().float() for name in adapter.state_dict()}
        )
        with torch.inference_mode():
            return adapter(tensors["codebook.weight"].load().float())

    return LazyTensor(TABLE, shape, torch.float32, source, compute)


def _check_names(kind: str, names: list[str], valid: Mapping[str, object]) -> None:
    wrong = [name for name in names if name not in valid]
    if wrong or not names:
        raise UsageError(
            f"No such {kind}" if wrong else f"The list of {kind}s is empty",
            where=f"export: {kind}: expected names from {', '.join(valid)}; "
            f"got {', '.join(map(repr, wrong)) or 'none'}",
            fix="use names from the list",
        )


def _counter(progress: Progress, total: int) -> Callable[[str], None]:
    numbers: Iterator[int] = iter(range(total))
    return lambda what: progress(what, next(numbers), total)
