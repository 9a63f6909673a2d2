"""Which tensor of the reference each value of a traced graph is, kept in the value's metadata as `module`.

The exporter records for each node the modules that were running. From that follow the values that a module of
`reference.model.Star` returns, `base_ar.layers.1.self_attn.q_proj`, or takes, `...mlp.down_proj:in`; and of
the two functions that attention is given, `...self_attn.rotate:0` (query) and `:1` (key), and
`...self_attn.attention:0` to `:2` (output and both caches).
"""

from __future__ import annotations

import json

import onnx_ir as ir
from torch import nn

from . import ops

MODULE = "module"  # metadata of a value
TAKES = ":in"
_SCOPES = "pkg.torch.onnx.name_scopes"
_FUNCTIONS = {"RotaryEmbedding": "rotate", ops.NAME: "attention"}


def modules_from_scopes(model: ir.Model, module: nn.Module, star: nn.Module) -> dict[ir.Value, str]:
    """Value -> the tensor of `star` that it is, in a graph fresh from tracing `module`.

    `module` holds modules of `star`. Values that are no module's are left out.
    """
    names = {id(inner): name for name, inner in star.named_modules() if name}
    leaves = {name for name, inner in star.named_modules() if not list(inner.children())}
    paths = {path: names.get(id(inner), "") for path, inner in module.named_modules()}
    chains: dict[ir.Node, list[str]] = {}
    for node in model.graph:
        scopes = json.loads(node.metadata_props.get(_SCOPES, "[]").replace("'", '"'))
        chains[node] = [paths[path] for path in scopes[:-1] if paths.get(path)]
    found: dict[ir.Value, str] = {}
    for name in sorted({name for chain in chains.values() for name in chain}, key=len, reverse=True):
        nodes = [node for node, chain in chains.items() if name in chain]
        values = _leaving(nodes) if name in leaves else [nodes[-1].outputs[0]]
        for i, value in enumerate(values):
            found.setdefault(value, name if len(values) == 1 else f"{name}:{i}")
    counts: dict[str, int] = {}
    for node, chain in chains.items():
        if chain and (function := _FUNCTIONS.get(node.op_type)):
            for value in node.outputs:
                key = f"{chain[-1]}.{function}"
                found.setdefault(value, f"{key}:{counts.get(key, 0)}")
                counts[key] = counts.get(key, 0) + 1
    for node, chain in chains.items():
        if chain and chain[-1] in leaves and (entering := _entering(node, chain[-1], chains)) is not None:
            found.setdefault(entering, f"{chain[-1]}{TAKES}")
    return found


def _leaving(nodes: list[ir.Node]) -> list[ir.Value]:
    """The values that `nodes` compute and other nodes read, or the graph returns."""
    own = set(nodes)
    values = [value for node in nodes for value in node.outputs]
    return [v for v in values if v.is_graph_output() or any(node not in own for node, _ in v.uses())]


def _entering(node: ir.Node, leaf: str, chains: dict[ir.Node, list[str]]) -> ir.Value | None:
    """What `node`, of module `leaf`, reads first of what another module computed."""
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None and leaf not in chains[producer]:
            return value
    return None


def hand_on(old: ir.Value, new: ir.Value) -> None:
    """Let `new`, which takes the place of `old`, be the same tensor of the reference, if it is none yet."""
    if MODULE in old.metadata_props:
        new.metadata_props.setdefault(MODULE, old.metadata_props[MODULE])
