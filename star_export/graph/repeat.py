"""A stack traced with two layers -> the same stack with any number of equal layers.

Tracing costs seconds per layer, and all layers of a stack are alike: only the names of their weights and
caches differ. So the second layer of a short trace is the pattern, and every further layer is a copy of it
that reads its own weights and caches.
"""

from __future__ import annotations

import re
from dataclasses import replace

import onnx_ir as ir

from engines.bundle.tensors import PAST, PRESENT
from reference.config import StarConfig

from ..components import COMPONENTS, DIFFUSION, Part
from .modules import MODULE
from .trace import traced_graph

TRACED_LAYERS = 2  # the first is fed by what comes before it, the second by a layer, as all that follow
_LAYER = re.compile(rf"((?:^|\.)layers\.|^{re.escape(PAST)}|^{re.escape(PRESENT)})(\d+)\.")


def graph_from_config(part: Part, config: StarConfig, *, rope_bf16: bool) -> ir.Model:
    """The graph of one part or component, with empty initializers; the caller may change it.

    Of a stack only two layers are traced, whatever the number of its layers: with what comes after them for a
    part that ends with the last layer, and with what comes before them for one that begins with the first.
    """
    if part.component not in DIFFUSION:
        config = replace(config, diffusion=None)  # whose graphs are the same with one
    stack = COMPONENTS[part.component].stack
    if stack is None or part.layers is None:
        return traced_graph(part, config, rope_bf16=rope_bf16)
    count = len(part.layers)
    first = int(stack.before is not None and part.layers.start > 0)  # without what comes before the layers
    traced = range(first, first + min(count, TRACED_LAYERS))
    final = part.layers.stop == stack.layers(config)
    model = traced_graph(
        Part(part.component, part.component, traced),
        stack.with_layers(config, traced.stop + (not final)),
        rope_bf16=rope_bf16,
    )
    model.graph.name = part.name
    if first:
        _move_layers(model, -first)
    if count > TRACED_LAYERS:
        repeat_layers(model, count)
    if part.layers.start:
        _move_layers(model, part.layers.start)
    return model


def repeat_layers(model: ir.Model, layers: int) -> None:
    """Extend a stack of two layers, fresh from tracing, to `layers` of them, in place.

    The copies follow the second layer; what followed it is fed by the last copy. Raises ValueError when the
    two layers are not alike.
    """
    first, second, rest = _split(model)
    stored = list(model.graph.initializers.values())
    after = stored[1 + max(i for i, value in enumerate(stored) if layer_of(value.name) is not None) :]
    following = {before: after for a, b in zip(first, second) for before, after in zip(a.outputs, b.outputs)}
    own = [value for node in second for value in node.outputs]
    previous = {
        value: value for value in own
    }  # value of the second layer -> the same of the layer before the one being made
    at = second[-1]
    for layer in range(TRACED_LAYERS, layers):
        made: dict[ir.Value, ir.Value] = {}
        for weight in stored:
            if layer_of(weight.name) == 1:
                _leaf(model, weight, layer)  # in the order of the second layer's
        for node in second:
            inputs = [
                None
                if value is None
                else made[value]
                if value in made
                else previous[following[value]]
                if value in following
                else _leaf(model, value, layer)
                for value in node.inputs
            ]
            copy = _copy(node, inputs, layer)
            made.update(zip(node.outputs, copy.outputs))
            model.graph.insert_after(at, copy)
            at = copy
        model.graph.outputs.extend(made[value] for value in own if layer_of(value.name) is not None)
        previous = made
    for node in rest:
        for i, value in enumerate(node.inputs):
            if value in previous:
                node.replace_input_with(i, previous[value])
    for i, value in enumerate(model.graph.outputs):
        if value in previous and layer_of(value.name) is None:  # the residual stream, without a final norm
            last = previous[value]
            name, value.name = value.name, in_layer(value.name, TRACED_LAYERS - 1)
            last.name, model.graph.outputs[i] = name, last
    for weight in after:
        model.graph.initializers.add(model.graph.initializers.pop(weight.name))


def _move_layers(model: ir.Model, by: int) -> None:
    """Add `by` to the numbers of all layers, in the names of weights and caches."""
    weights = list(model.graph.initializers.values())
    model.graph.initializers.clear()
    for value in (*weights, *model.graph.inputs, *model.graph.outputs):
        if (layer := layer_of(value.name)) is not None:
            value.name = in_layer(value.name, layer + by)
    for value in weights:
        model.graph.initializers.add(value)
    for value in (value for node in model.graph for value in node.outputs):
        module = value.metadata_props.get(MODULE)
        if module and (layer := layer_of(f"{module}.")) is not None:
            value.metadata_props[MODULE] = _module_in_layer(module, layer + by)


def _module_in_layer(module: str, layer: int) -> str:
    """The same tensor of the reference in another layer; one of no layer, such as an angle, is kept."""
    return in_layer(f"{module}.", layer)[:-1] if layer_of(f"{module}.") is not None else module


def layer_of(name: str) -> int | None:
    """The layer that a weight, cache or present belongs to by its name; None for what belongs to none."""
    match = _LAYER.search(name)
    return int(match[2]) if match else None


def in_layer(name: str, layer: int) -> str:
    """The same name in another layer; an inner value's name gets the layer as its suffix."""
    return (
        _LAYER.sub(rf"\g<1>{layer}.", name, count=1)
        if layer_of(name) is not None
        else f"{name}.layer_{layer}"
    )


def _split(model: ir.Model) -> tuple[list[ir.Node], list[ir.Node], list[ir.Node]]:
    """(nodes of the first layer, of the second, and what comes after them); what comes before belongs to all.

    A node belongs to the highest layer that it depends on. What only asks for a shape does not depend on
    numbers.
    """
    depth: dict[ir.Value, int] = {}
    by_layer: dict[int, list[ir.Node]] = {}
    for node in model.graph:
        known = [
            depth.get(v, -1) if v.producer() else _layer_or_none(v) for v in node.inputs if v is not None
        ]
        layer = -1 if node.op_type == "Shape" else max(known, default=-1)
        depth.update(dict.fromkeys(node.outputs, layer))
        by_layer.setdefault(layer, []).append(node)
    first, second = by_layer.get(0, []), by_layer.get(1, [])
    if [_kind(node) for node in first] != [_kind(node) for node in second[: len(first)]]:
        _begin_with_cast(model, first, second)
    second, rest = second[: len(first)], second[len(first) :]
    if max(by_layer) != 1 or not first or [_kind(node) for node in first] != [_kind(node) for node in second]:
        raise ValueError(
            f"{model.graph.name}: expected a graph of two equal layers, got {max(by_layer) + 1} layers of "
            f"{', '.join(str(len(nodes)) for layer, nodes in sorted(by_layer.items()) if layer >= 0)} nodes"
        )
    return first, second, rest


def _begin_with_cast(model: ir.Model, first: list[ir.Node], second: list[ir.Node]) -> None:
    """Count the cast of a layer's results, with which the next layer begins, as that layer's: it comes before
    any weight of its own. In the first layer what came before is cast."""
    (use,) = first[-1].outputs[0].uses()
    if first[-1].op_type != "Cast" or use.node not in second[: len(first)]:
        return
    before = first[second.index(use.node)].inputs[use.idx].producer()
    if before is None or before.op_type != "Cast":
        return
    places = {node: i for i, node in enumerate(model.graph)}
    cast = first.pop()
    at = sum(places[node] < places[cast] for node in second)
    second.insert(at, cast)
    first.insert(at, before)


def _layer_or_none(value: ir.Value) -> int:
    layer = layer_of(value.name)
    return -1 if layer is None else layer


def _kind(node: ir.Node) -> tuple[str, str, int]:
    return node.domain, node.op_type, len(node.inputs)


def _leaf(model: ir.Model, value: ir.Value, layer: int) -> ir.Value:
    """What a copy for `layer` reads where the second layer reads `value`: its own weight or cache, or the
    same value."""
    if value.producer() is not None or layer_of(value.name) is None:
        return value
    name = in_layer(value.name, layer)
    existing = model.graph.initializers.get(name) or next(
        (i for i in model.graph.inputs if i.name == name), None
    )
    if existing is not None:
        return existing
    leaf = ir.Value(name=name, type=value.type, shape=value.shape)
    leaf.metadata_props.update(value.metadata_props)
    if value.is_initializer():
        model.graph.initializers.add(leaf)
    else:
        model.graph.inputs.append(leaf)
    return leaf


def _copy(node: ir.Node, inputs: list[ir.Value | None], layer: int) -> ir.Node:
    copy = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        list(node.attributes.values()),
        overload=node.overload,
        num_outputs=len(node.outputs),
        version=node.version,
        name=in_layer(node.name, layer),
    )
    for value, made in zip(node.outputs, copy.outputs):
        made.name, made.type, made.shape = in_layer(value.name, layer), value.type, value.shape
        if MODULE in value.metadata_props:
            made.metadata_props[MODULE] = _module_in_layer(value.metadata_props[MODULE], layer)
    return copy
