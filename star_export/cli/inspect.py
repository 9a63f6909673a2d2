"""What is in a bundle, an ONNX file or a plan, and the layers that TensorRT sees, as data and as text."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from engines.bundle.manifest import TensorSpec
from engines.bundle.reader import MANIFEST, Bundle
from engines.errors import InputError, MissingError, UsageError
from engines.tensorrt.plan import BUILD, describe_plans


def describe(path: Path) -> dict:
    """Of a bundle (every file hashed), a `.onnx`, a `.plan` or a folder of plans. Raises InputError for anything else."""
    if path.is_dir() and (path / MANIFEST).exists():
        return describe_bundle(path)
    if path.is_dir() and (path / BUILD).exists():
        return describe_plans(path)
    if path.suffix == ".plan" and path.is_file():
        plans = describe_plans(path.parent)
        if path.stem not in plans["components"]:
            raise InputError(
                "This plan is not in its record",
                where=f"{path.parent / BUILD}: expected one of "
                f"{', '.join(plans['components']) or 'none'}, got {path.stem!r}",
                fix="build it again",
            )
        return plans | {"components": {path.stem: plans["components"][path.stem]}} | _network_of_plan(path)
    if path.suffix == ".onnx" and path.is_file():
        return describe_graph(path)
    raise InputError(
        "There is nothing to inspect",
        fix="name a bundle, a .onnx or a .plan",
        where=f"{path}: expected a folder with {MANIFEST} or {BUILD}, a .onnx or a .plan, got "
        + ("a folder" if path.is_dir() else "a file" if path.exists() else "nothing"),
    )


def _network_of_plan(path: Path) -> dict:
    """The network that a plan inside its bundle was compiled from; why not, where that cannot be read."""
    bundle, target = path.parent.parent.parent, path.parent.name
    if not (bundle / MANIFEST).is_file():
        return {"network": "not read: the plan is outside its bundle"}
    try:
        return {"network": describe_networks(bundle, target, path.stem)["networks"][path.stem]}
    except (InputError, MissingError, UsageError) as error:
        return {"network": f"not read: {error.what}; {error.where}"}


def describe_bundle(path: Path) -> dict:
    """Model, precision, components, files, plans and certificates. Raises InputError for a file that is not the listed one."""
    bundle = Bundle.open(path)
    bundle.verify()
    manifest = bundle.manifest
    components = {
        name: {
            "inputs": _signatures(spec.inputs),
            "outputs": _signatures(spec.outputs),
            "bytes": sum(manifest.files[f].size for f in (spec.graph, *bundle.weights(name))),
        }
        for name, spec in manifest.components.items()
    }
    plans = {
        folder.name: describe_plans(folder)
        for folder in sorted((path / "plans").glob("*"))
        if (folder / BUILD).exists()
    }
    return {
        "bundle": str(path),
        "model": manifest.model.name,
        "precision": manifest.precision,
        "image_size": manifest.model.image_size,
        "image_tokens": manifest.model.image_tokens,
        "files": len(manifest.files),
        "components": components,
        "plans": {
            name: {c: p["state"] for c, p in plan["components"].items()} for name, plan in plans.items()
        },
        "certificates": [_certificate(file) for file in sorted((path / "certificates").glob("*.json"))],
    }


def describe_graph(path: Path) -> dict:
    """Opsets, boundary, operators and functions of an ONNX file. Raises InputError for a damaged one, MissingError without onnx."""
    try:
        import onnx
    except ImportError as error:
        raise MissingError(
            "onnx is not installed here", where=f"{path}: {error}", fix='pip install "star-export[export]"'
        ) from None
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path))
    except Exception as error:  # protobuf raises many kinds for a damaged file
        raise InputError(
            "This is not an ONNX file",
            fix="export the component again",
            where=f"{path}: expected a model, got {type(error).__name__}: {' '.join(str(error).split())[:200]}",
        ) from None
    operators = Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in model.graph.node)
    return {
        "graph": str(path),
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": {value.name: _onnx_signature(value) for value in model.graph.input},
        "outputs": {value.name: _onnx_signature(value) for value in model.graph.output},
        "operators": dict(sorted(operators.items())),
        "weights": len(model.graph.initializer),
        "functions": {
            f"{f.domain}::{f.name}": dict(sorted(Counter(n.op_type for n in f.node).items()))
            for f in model.functions
        },
    }


def describe_networks(path: Path, target: str, component: str | None = None) -> dict:
    """The components of a bundle, or one, as TensorRT reads them for `target`: `engines.sessions.interpreter.describe_component`.

    Needs the target's TensorRT, and no device. Raises UsageError for another path, MissingError without that TensorRT, InputError
    for a network that cannot be read or is not its plan's.
    """
    from engines.sessions.interpreter import describe_component

    if not (path / MANIFEST).is_file():
        raise UsageError(
            "Layers are read from a bundle",
            where=f"{path}: expected a folder with {MANIFEST}",
            fix="star-export inspect BUNDLE --target T",
        )
    bundle = Bundle.open(path)
    names = [component] if component else list(bundle.manifest.components)
    return {
        "bundle": str(path),
        "networks": {name: describe_component(bundle, name, target=target) for name in names},
    }


def text_from_description(data: dict) -> str:
    """Nested data as indented lines; caches of all layers but the first are counted."""
    return "\n".join(_lines(data, 0))


def _lines(data: dict, depth: int) -> list[str]:
    lines, shown = [], {k: v for k, v in data.items() if not _later_cache(k)}
    for key, value in shown.items():
        if isinstance(value, dict) and value:
            lines += [f"{'  ' * depth}{key}:", *_lines(value, depth + 1)]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines += [f"{'  ' * depth}{key}:", *(f"{'  ' * (depth + 1)}{_row(row)}" for row in value)]
        elif isinstance(value, list):
            lines.append(f"{'  ' * depth}{key}: {', '.join(map(str, value)) or 'none'}")
        else:
            lines.append(f"{'  ' * depth}{key}: {'none' if value == {} else value}")
    if len(shown) < len(data):
        lines.append(f"{'  ' * depth}and {len(data) - len(shown)} more caches")
    return lines


def _row(data: dict) -> str:
    """One layer or fusion on one line."""
    words = [str(data["kind"])]
    for key, value in data.items():
        if isinstance(value, dict):
            value = " ".join(f"{k}={v}" for k, v in value.items() if v is not None)
        elif isinstance(value, list):
            value = ", ".join(str(v) for v in value)
        if key != "kind" and value != "":
            words.append(f"{key}: {value}")
    return "  ".join(words)


def _later_cache(name: str) -> bool:
    family, _, rest = name.partition(".")
    return family in ("past_key_values", "present") and not rest.startswith("0.")


def _signatures(tensors: tuple[TensorSpec, ...]) -> dict[str, str]:
    return {t.name: f"{t.dtype}[{','.join(map(str, t.shape))}]" for t in tensors}


def _onnx_signature(value) -> str:
    import onnx

    tensor = value.type.tensor_type
    axes = ",".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}[{axes}]"


def _certificate(path: Path) -> str:
    try:
        data = json.loads(path.read_text())
        return f"{path.name}: {'passed' if data['passed'] is True else 'FAILED'} at {data['made_at']}"
    except (ValueError, KeyError, TypeError):
        return f"{path.name}: unreadable"
