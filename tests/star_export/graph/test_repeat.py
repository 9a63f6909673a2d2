"""A decoder of copied layers is the decoder traced whole: the same nodes, weights and numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from reference.config import StarConfig, config_from_files
from reference.weights import named_tensors, resolve_checkpoint
from star_export.components import COMPONENTS, Part
from star_export.components import whole as whole_part
from star_export.graph.modules import MODULE
from star_export.graph.precisions import PRECISIONS
from star_export.graph.quantize import attach_weights, set_precision
from star_export.graph.repeat import TRACED_LAYERS, graph_from_config, in_layer, layer_of, repeat_layers
from star_export.graph.trace import traced_graph
from star_export.planner.source import shapes_of


@pytest.fixture(scope="module")
def files(mini_checkpoint: Path):
    return resolve_checkpoint(str(mini_checkpoint), checkpoint=None, base=None, vq=None)


@pytest.fixture(scope="module")
def config(files) -> StarConfig:
    return config_from_files(files.config_json, files.qwen_folder)


def canonical(model: ir.Model) -> list[tuple]:
    """The graph without the names of inner values: each node with the places of its inputs, and the tensors
    of the reference that its outputs are."""
    place = {value: value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    place |= {
        value: ("constant", value.const_value.numpy().tobytes())
        for value in model.graph.initializers.values()
        if value.const_value is not None
    }
    nodes = []
    for i, node in enumerate(model.graph):
        attributes = sorted((a.name, a.type, str(a.value)) for a in node.attributes.values())
        inputs, modules = (
            [place.get(v) for v in node.inputs],
            [v.metadata_props.get(MODULE) for v in node.outputs],
        )
        nodes.append((node.domain, node.op_type, node.overload, inputs, attributes, modules))
        place |= {value: (i, j) for j, value in enumerate(node.outputs)}
    return nodes


@pytest.mark.parametrize("name", ["base_ar", "stacked_ar"])
def test_the_copied_graph_is_the_traced_one(config: StarConfig, name: str) -> None:
    part = whole_part(name, config)
    whole, copied = (make(part, config, rope_bf16=True) for make in (traced_graph, graph_from_config))
    same_graph(whole, copied)


@pytest.mark.parametrize("layers", [range(1), range(3), range(1, 3), range(3, 4), range(1, 4)])
def test_the_graph_of_a_part_is_the_traced_one(config: StarConfig, layers: range) -> None:
    part = Part("base_ar/7", "base_ar", layers)
    whole, copied = (make(part, config, rope_bf16=True) for make in (traced_graph, graph_from_config))
    assert whole.graph.name == copied.graph.name == "base_ar/7"
    same_graph(whole, copied)


@pytest.fixture(scope="module")
def painting(diffusion_checkpoint: Path) -> StarConfig:
    """The miniature with a diffusion decoder of four layers."""
    files = resolve_checkpoint(str(diffusion_checkpoint))
    config = config_from_files(files.config_json, files.qwen_folder, files.lumina_folder)
    for name in ("dit", "text_encoder"):
        config = COMPONENTS[name].stack.with_layers(config, 4)
    return config


@pytest.mark.parametrize("name", ["dit", "text_encoder"])
@pytest.mark.parametrize("layers", [range(3), range(1, 4), range(2, 3)], ids=["first", "last", "between"])
def test_a_part_of_the_diffusion_decoder_is_the_traced_one(
    painting: StarConfig, name: str, layers: range
) -> None:
    """What comes before and after the layers is in the first part and in the last."""
    part = Part(f"{name}/7", name, layers)
    whole, copied = (make(part, painting, rope_bf16=True) for make in (traced_graph, graph_from_config))
    same_graph(whole, copied)
    held = {v.name for v in copied.graph.initializers.values() if v.const_value is None}
    assert held == set(shapes_of(part, painting))


def same_graph(whole: ir.Model, copied: ir.Model) -> None:
    assert [v.name for v in copied.graph.inputs] == [v.name for v in whole.graph.inputs]
    assert [v.name for v in copied.graph.outputs] == [v.name for v in whole.graph.outputs]
    for ours, theirs in zip(
        (*copied.graph.inputs, *copied.graph.outputs), (*whole.graph.inputs, *whole.graph.outputs)
    ):
        assert (ours.dtype, str(ours.shape)) == (theirs.dtype, str(theirs.shape))
    weights = [
        [
            (v.name, v.dtype, str(v.shape), dict(v.metadata_props))
            for v in m.graph.initializers.values()
            if v.const_value is None
        ]
        for m in (copied, whole)
    ]
    assert weights[0] == weights[1]
    assert canonical(copied) == canonical(whole)
    values = [v.name for node in copied.graph for v in node.outputs]
    assert len(set(values)) == len(values), "two values share a name"


def test_the_copied_graph_computes_the_same_numbers(config: StarConfig, files, tmp_path: Path) -> None:
    tensors, decoder = named_tensors(files, config), config.base_ar
    random = np.random.default_rng(0)
    feeds = {
        "inputs_embeds": random.standard_normal((2, 3, decoder.hidden_size), np.float32),
        "write_indices": np.array([4, 2]),
        "position_ids": np.broadcast_to(np.arange(3), (3, 2, 3)).copy(),
    }
    shape = (2, decoder.num_kv_heads, 9, decoder.head_dim)
    feeds |= {
        f"past_key_values.{i}.{part}": random.standard_normal(shape, np.float32)
        for i in range(decoder.num_layers)
        for part in ("key", "value")
    }
    outputs = []
    for kind, graph in (("whole", traced_graph), ("copied", graph_from_config)):
        model = graph(whole_part("base_ar", config), config, rope_bf16=True)
        set_precision(model, PRECISIONS["fp32"].compute)
        attach_weights(model, tensors, PRECISIONS["fp32"])
        ir.save(model, tmp_path / f"{kind}.onnx")
        session = onnxruntime.InferenceSession(
            str(tmp_path / f"{kind}.onnx"), providers=["CPUExecutionProvider"]
        )
        outputs.append(session.run(None, feeds))
    assert len(outputs[0]) == 1 + 2 * decoder.num_layers and np.std(outputs[0][0]) > 0.1
    assert all(np.array_equal(a, b) for a, b in zip(*outputs, strict=True))


def test_layers_that_differ_are_refused(config: StarConfig) -> None:
    short = replace(config, base_ar=replace(config.base_ar, num_layers=TRACED_LAYERS))
    model = traced_graph(whole_part("base_ar", short), short, rope_bf16=True)
    last = [node for node in model.graph if node.op_type == "Sigmoid"][-1]
    tanh = ir.node("Tanh", list(last.inputs), name="planted")
    tanh.outputs[0].name = "planted"
    model.graph.insert_before(last, tanh)
    last.outputs[0].replace_all_uses_with(tanh.outputs[0])
    model.graph.remove(last, safe=True)
    with pytest.raises(ValueError, match="two equal layers"):
        repeat_layers(model, 5)
    with pytest.raises(ValueError, match="got 4 layers"):
        repeat_layers(traced_graph(whole_part("base_ar", config), config, rope_bf16=True), 6)


def test_names_carry_their_layer() -> None:
    names = ["base_ar.layers.1.mlp.up_proj.weight", "past_key_values.1.key", "present.1.value", "linear_3"]
    assert [layer_of(name) for name in names] == [1, 1, 1, None]
    assert [in_layer(name, 12) for name in names] == [
        "base_ar.layers.12.mlp.up_proj.weight",
        "past_key_values.12.key",
        "present.12.value",
        "linear_3.layer_12",
    ]
