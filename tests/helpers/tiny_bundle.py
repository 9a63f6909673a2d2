"""A small, valid bundle, made by hand in milliseconds: the smallest thing that `Bundle.open` accepts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.bundle.manifest import (
    SCHEMA,
    CacheSpec,
    ComponentSpec,
    FileSpec,
    GoldenSpec,
    Manifest,
    ModelSpec,
    TensorSpec,
    TokenSpec,
    VisionSpec,
)
from engines.bundle.records import json_from_record
from tests.helpers.sealed import edit_sealed

DTYPES = {
    "float32": TensorProto.FLOAT,
    "int64": TensorProto.INT64,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "bool": TensorProto.BOOL,
    "int32": TensorProto.INT32,
}
TOKENS = TokenSpec(
    im_start=151644,
    im_end=151645,
    vision_start=151652,
    vision_end=151653,
    vision_pad=151654,
    image_pad=151655,
    fim_pad=151662,
    eos=(151645, 151643),
)
VISION = VisionSpec(
    patch_size=14,
    temporal_patch_size=2,
    spatial_merge_size=2,
    window_size=56,
    head_dim=16,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)
MODEL = ModelSpec(
    name="tiny",
    hidden_size=64,
    vocab_size=151936,
    codebook_size=1024,
    image_tokens=16,
    image_size=64,
    top_k_limit=1000,
    max_positions=4096,
    repetition_penalty=1.05,
    rope_bf16=True,
    tokens=TOKENS,
    vision=VISION,
    cache={"base_ar": CacheSpec(4, 2, 16), "stacked_ar": CacheSpec(2, 2, 16)},
)


def model_from_nodes(nodes, inputs, outputs, initializers=(), *, opset=24):
    """An ONNX model; `inputs` and `outputs` are TensorSpecs, `initializers` maps names to arrays."""
    values = [
        [helper.make_tensor_value_info(t.name, DTYPES[t.dtype], list(t.shape)) for t in side]
        for side in (inputs, outputs)
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in dict(initializers).items()]
    graph = helper.make_graph(list(nodes), "g", values[0], values[1], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)


def write_component(root: Path, name: str, model, inputs, outputs) -> ComponentSpec:
    """Write `name/model.onnx` and a golden file, weights in `model.onnx.data`; the component's spec."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = bool(model.graph.initializer)
    onnx.save_model(
        model,
        folder / "model.onnx",
        save_as_external_data=weights,
        location="model.onnx.data",
        size_threshold=0,
    )
    (folder / "golden.safetensors").write_bytes(b"golden of " + name.encode())
    return ComponentSpec(
        graph=f"{name}/model.onnx",
        twin=None,
        golden=f"{name}/golden.safetensors",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


def write_manifest(
    root: Path,
    components: dict,
    *,
    tables: dict | None = None,
    model: ModelSpec = MODEL,
    precision: str = "fp32",
    **changes,
) -> None:
    """Hash what lies under `root` and write the manifest."""
    files = {
        p.relative_to(root).as_posix(): FileSpec(p.stat().st_size, hashlib.sha256(p.read_bytes()).hexdigest())
        for p in sorted(root.rglob("*"))
        if p.is_file() and p.name != "manifest.json"
    }
    manifest = Manifest(
        schema=SCHEMA,
        precision=precision,
        model=model,
        components=components,
        tables=tables or {},
        part_bytes=1 << 30,
        golden=GoldenSpec(images=3, decoder_cases=6, draw_cases=5, image_tokens=16, answer_tokens=8),
        files=files,
    )
    (root / "manifest.json").write_text(json_from_record(manifest))
    edit_sealed(root / "manifest.json", lambda value: value.update(changes))


def write_tiny_bundle(root: Path) -> Path:
    """A bundle with one component, `token_embedding`, of eight tokens with four numbers each."""
    import numpy as np

    inputs = [TensorSpec("input_ids", "int64", ("B", "S"))]
    outputs = [TensorSpec("inputs_embeds", "float32", ("B", "S", 4))]
    table = np.arange(32, dtype=np.float32).reshape(8, 4)
    model = model_from_nodes(
        [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])],
        inputs,
        outputs,
        {"table": table},
    )
    spec = write_component(root, "token_embedding", model, inputs, outputs)
    (root / "tokenizer.json").write_text("{}")
    (root / "chat_template.jinja").write_text("{{ messages }}")
    write_manifest(root, {"token_embedding": spec})
    return root
