"""The rules of a target's parser, checked on the graph before anything is built.

They hold what TensorRT drops without a message, interprets in another sense, or rejects only after minutes.
Every finding names its rule and node.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from engines import plugins
from engines.errors import InputError, listed
from engines.targets import TARGETS

from . import classic, nvfp4
from .formats import FP8, NVFP4
from .ops import DOMAIN, NAME, OPSET

Finding = tuple[str, str, str]  # rule, node, detail
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)  # what TensorRT for RTX fuses
TOP_K_MAX = 3840
DATA_FILE = "model.onnx.data"
FUNCTIONS = ((DOMAIN, NAME), (DOMAIN, nvfp4.NAME))  # our operations; twins alone have the second


def check_graph(source: ir.Model | Path, *, target: str | None = None, dialect: str | None = None) -> None:
    """Check `source` against the rules of a dialect (default: `target`'s, else modern) and of `target`.

    Raises InputError that lists the findings with their rules and nodes.
    """
    model = source if isinstance(source, ir.Model) else _load(Path(source))
    dialect = dialect or (TARGETS[target].dialect if target else "modern")
    findings = [finding for rule in _DIALECTS[dialect] for finding in rule(model)]
    if target is not None:
        findings += _target_findings(model, target)
    if findings:
        shown = listed([f"[{rule}] {node}: {detail}" for rule, node, detail in findings])
        raise InputError(
            f"This graph breaks {len(findings)} rule(s) of the parsers it is meant for",
            where=f"{source if isinstance(source, Path) else model.graph.name}: {shown}",
            fix="export the component again; a graph from another tool must follow these rules",
        )


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many types for a damaged file
        raise InputError(
            "This is not an ONNX file",
            where=f"{path}: expected a model, got {type(error).__name__}: {error}",
            fix="export the component again",
        ) from None


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _attribute(node: ir.Node, name: str, default):
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.value


def _opsets(model: ir.Model) -> Iterator[Finding]:
    if "" not in model.opset_imports or not len(model.graph):
        yield "opset", "graph", f"expected nodes of opset {OPSET}, got an empty model"
    for domain, version in model.opset_imports.items():
        if (domain, version) not in (("", OPSET), (DOMAIN, 1), (nvfp4.QUANTIZE[0], 1)):
            yield (
                "opset",
                "graph",
                f"expected opset {OPSET} and {DOMAIN} 1, got {domain or 'ai.onnx'} {version}",
            )


def _domains(model: ir.Model) -> Iterator[Finding]:
    for node in _nodes(model):
        if node.domain and (node.domain, node.op_type) not in (*FUNCTIONS, nvfp4.QUANTIZE):
            yield (
                "operator-domain",
                str(node.name),
                f"{node.domain}::{node.op_type} is not an operator of this project",
            )
        elif not node.domain and not onnx.defs.has(node.op_type, max_inclusive_version=OPSET, domain=""):
            yield "operator", str(node.name), f"{node.op_type} is not in opset {OPSET}"
    for domain, name in FUNCTIONS:
        if any(n.op_type == name for n in model.graph) and (domain, name, "") not in model.functions:
            yield "function-body", "graph", f"{domain}::{name} is called but has no body"


def _attention(model: ir.Model) -> Iterator[Finding]:
    for node in _nodes(model):
        if node.op_type != "Attention":
            continue
        if len(node.inputs) > 6 and node.inputs[6] is not None:
            yield (
                "nonpad-kv-seqlen",
                str(node.name),
                "TensorRT silently drops nonpad_kv_seqlen; use an explicit mask",
            )
        if _attribute(node, "is_causal", 0):
            yield (
                "is-causal",
                str(node.name),
                "TensorRT aligns is_causal upper-left, which is wrong for decode; use an explicit mask",
            )
        if len([o for o in node.outputs if o.name]) > 1:
            yield "attention-outputs", str(node.name), f"expected one output, got {len(node.outputs)}"
    for function in model.functions.values():
        for node in function:
            if node.op_type == "Attention" and (len(node.inputs) < 4 or node.inputs[3] is None):
                yield "attention-mask", str(node.name), "attention over a cache needs its mask as an input"


def _caches(model: ir.Model) -> Iterator[Finding]:
    for node in _nodes(model):
        if node.op_type == "TensorScatter":
            if _attribute(node, "mode", "linear") != "linear":
                yield (
                    "scatter-mode",
                    str(node.name),
                    f"expected linear, got {_attribute(node, 'mode', 'linear')}",
                )
            if _attribute(node, "axis", -2) != -2:
                yield "scatter-axis", str(node.name), f"expected -2, got {_attribute(node, 'axis', -2)}"
    for node in model.graph:
        if node.op_type != NAME:
            continue
        for value in node.inputs[3:5]:
            if value is None or not value.is_graph_input():
                yield (
                    "cache-input",
                    str(node.name),
                    "a cache must itself be a graph input, to be updated in place",
                )
        for value in node.outputs[1:3]:
            if not value.is_graph_output():
                yield (
                    "cache-output",
                    str(node.name),
                    "an updated cache must itself be a graph output, to be updated in place",
                )


def _top_k(model: ir.Model) -> Iterator[Finding]:
    for node in _nodes(model):
        if node.op_type == "TopK":
            k = node.inputs[1].const_value if node.inputs[1] is not None else None
            if k is None:
                yield "top-k-constant", str(node.name), "K must be a constant"
            elif int(k.numpy().reshape(-1)[0]) > TOP_K_MAX:
                yield (
                    "top-k-limit",
                    str(node.name),
                    f"expected K <= {TOP_K_MAX}, got {int(k.numpy().reshape(-1)[0])}",
                )


def _weights(model: ir.Model) -> Iterator[Finding]:
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) != DATA_FILE:
            yield "external-data", name, f"expected weights in {DATA_FILE}, got {str(tensor.location)!r}"
    for node in model.graph:
        if node.op_type == "DequantizeLinear" and node.inputs[0] is not None:
            yield from _fused(node)
    for node in _nodes(model):
        if "sparse_value" in node.attributes:
            yield "sparse-initializer", str(node.name), "TensorRT does not support sparse tensors"


def _fused(dequantize: ir.Node) -> Iterator[Finding]:
    """A weight in a form that TensorRT for RTX would write out in 16 bits at every step (docs/targets.md)."""
    dense, codes = dequantize.outputs[0], dequantize.inputs[0]
    products = [user for user, _ in dense.uses() if user.op_type == "MatMul"]
    if codes.dtype == FP8.code and products and _attribute(dequantize, "block_size", 0):
        yield "fp8-blocks", str(dequantize.name), "expected one scale per output channel, got blocks"
    for product in products if codes.dtype == NVFP4.code else []:
        if not nvfp4.is_rounded(product.inputs[0]):
            got = product.inputs[0].name
            yield "nvfp4-activations", str(product.name), f"expected activations in nvfp4, got {got}"


def _classic(model: ir.Model) -> Iterator[Finding]:
    """Allow only operators that TensorRT 10.0's parser knows, in its sense, and the plugin for the cache."""
    opset = model.opset_imports.get("", 0)
    for domain, version in model.opset_imports.items():
        if (domain, version) not in (("", classic.OPSET), ("", classic.OPSET_INT4), (DOMAIN, 1)):
            yield (
                "opset",
                "graph",
                f"expected opset {classic.OPSET} and {DOMAIN} 1, got {domain or 'ai.onnx'} {version}",
            )
    for function in model.functions.values():
        yield (
            "function-body",
            "graph",
            f"{function.domain}::{function.name} has a body, which hides the plugin of that name",
        )
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) == (DOMAIN, NAME):
            yield from _plugin_call(node)
        elif node.domain:
            yield (
                "operator-domain",
                str(node.name),
                f"{node.domain}::{node.op_type} is not an operator of this project",
            )
        elif node.op_type in REDEFINED or not onnx.defs.has(
            node.op_type, max_inclusive_version=opset, domain=""
        ):
            yield (
                "operator",
                str(node.name),
                f"{node.op_type} is not in opset {opset}, or has another meaning there",
            )


def _plugin_call(node: ir.Node) -> Iterator[Finding]:
    for name, value in (("num_heads", node.inputs[0]), ("num_kv_heads", node.inputs[3])):
        if _attribute(node, name, None) != value.shape[1]:
            yield (
                "plugin-field",
                str(node.name),
                f"expected {name} {value.shape[1]} as in {value.name}, got {_attribute(node, name, None)}",
            )
    head_dim, scale = _attribute(node, "head_dim", 0), _attribute(node, "scale", 0.0)
    if head_dim != node.inputs[0].shape[3] or not head_dim or abs(scale * head_dim**0.5 - 1) > 1e-6:
        yield (
            "plugin-field",
            str(node.name),
            f"head_dim and scale do not match the query, got {head_dim} and {scale}",
        )
    if _attribute(node, "plugin_version", None) != str(plugins.ABI):
        yield (
            "plugin-version",
            str(node.name),
            f"expected version {plugins.ABI}, got {_attribute(node, 'plugin_version', None)}",
        )


REDEFINED = ("GroupNormalization",)  # scale and bias per group up to opset 20, per channel from 21
_RULES = (_opsets, _domains, _attention, _caches, _top_k, _weights)
_DIALECTS = {"modern": _RULES, "classic": (_classic, _caches, _top_k, _weights)}


def _target_findings(model: ir.Model, name: str) -> Iterator[Finding]:
    target = TARGETS[name]
    used = {value.dtype for value in model.graph.initializers.values()}
    for found in (NVFP4, FP8):
        if found.code in used and found.name not in target.precisions:
            runs = ", ".join(target.precisions)
            yield "weight-format", "graph", f"expected weights in one of {runs}, got {found.name}"
            break  # the scales of nvfp4 are fp8
    for node in model.graph:
        if node.op_type == NAME and target.dialect == "classic":
            yield from _plugin_limits(node, name)
        if node.op_type not in (NAME, "Attention") or target.builder != "tensorrt_rtx":
            continue
        query = node.inputs[0]
        if query.dtype == ir.DataType.FLOAT:
            yield (
                "attention-type",
                str(node.name),
                f"{name} fuses attention only in 16 bits; export with --precision bf16",
            )
        if query.dtype == ir.DataType.BFLOAT16 and target.compute_capability < (8, 0):
            yield "bf16", str(node.name), f"{name} does not support bf16; export with --precision fp16"
        head_dim = query.shape[-1] if query.shape is not None else None
        if isinstance(head_dim, int) and head_dim not in HEAD_DIMS:
            yield "head-dim", str(node.name), f"expected one of {HEAD_DIMS}, got {head_dim}"


def _plugin_limits(node: ir.Node, target: str) -> Iterator[Finding]:
    query = node.inputs[0]
    if query.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        yield (
            "attention-type",
            str(node.name),
            f"{target}'s plugin computes only in 16 bits; export with --precision bf16",
        )
    if query.shape[-1] not in plugins.HEAD_DIMS:
        yield "head-dim", str(node.name), f"expected one of {plugins.HEAD_DIMS}, got {query.shape[-1]}"
