"""What a bundle, an ONNX file or a plan contains, and the layers that TensorRT parses, as data and text."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path

from engines.bundle.files import MANIFEST
from engines.bundle.manifest import TensorSpec
from engines.bundle.reader import Bundle
from engines.errors import InputError, MissingError, UsageError, install, listed
from engines.tensorrt.plan import BUILD, OK, describe_plans

from ..choice import formats_of
from ..validator.chain import DAMAGED, Link, links


def describe(path: Path) -> dict:
    """Describe a bundle (every file is hashed), a `.onnx`, a `.plan` or a folder of plans.

    Raises InputError for anything else.
    """
    if path.is_dir() and (path / MANIFEST).exists():
        return describe_bundle(path)
    if path.is_dir() and (path / BUILD).exists():
        return describe_plans(path)
    if path.suffix == ".plan" and path.is_file():
        plans = describe_plans(path.parent)
        if path.stem not in plans["components"]:
            raise InputError(
                "This plan is not listed in its folder's record",
                where=f"{path.parent / BUILD}: expected one of "
                f"{', '.join(plans['components']) or 'none'}, got {path.stem!r}",
                fix="build the plan again",
            )
        return plans | {"components": {path.stem: plans["components"][path.stem]}} | _network_of_plan(path)
    if path.suffix == ".onnx" and path.is_file():
        return describe_graph(path)
    raise InputError(
        "This path cannot be inspected",
        where=f"{path}: expected a folder with {MANIFEST} or {BUILD}, a .onnx or a .plan, got "
        + ("a folder" if path.is_dir() else "a file" if path.exists() else "nothing"),
        fix="name a bundle, a .onnx or a .plan",
    )


def fault_of(data: dict, path: str) -> InputError | None:
    """The error for plans that are not those of their record, and for damaged certificates; None without."""
    plans = data.get("plans") or {data.get("target", ""): data.get("components", {})}
    wrong = [
        f"plan {target}/{name}: {state}"
        for target, states in plans.items()
        for name, found in states.items()
        if (state := found.get("state", OK) if isinstance(found, dict) else found) != OK
    ]
    wrong += [line for line in data.get("certificates", ()) if DAMAGED in line]
    if not wrong:
        return None
    return InputError(
        "Something here is not as it was written",
        where=f"{path}: expected plans and certificates as recorded, got {listed(wrong)}",
        fix="build the plans again with star-export build; remove a damaged certificate and validate again",
    )


def _network_of_plan(path: Path) -> dict:
    """The network that a plan in its bundle was compiled from, or the reason why it is not available."""
    bundle, target = path.parent.parent.parent, path.parent.name
    if not (bundle / MANIFEST).is_file():
        return {"network": "not available: the plan is outside its bundle"}
    try:
        return {"network": describe_networks(bundle, target, path.stem)["networks"][path.stem]}
    except (InputError, MissingError, UsageError) as error:
        return {"network": f"not available: {error.what}; {error.where}"}


def describe_bundle(path: Path) -> dict:
    """Describe a bundle: model, precision, components, files, plans and certificates.

    Raises InputError for a file that differs from its entry in the manifest.
    """
    bundle = Bundle.open(path)
    bundle.verify()
    manifest = bundle.manifest
    components = {
        name: {
            "inputs": _signatures(spec.inputs),
            "outputs": _signatures(spec.outputs),
            "bytes": sum(manifest.files[f].size for f in (spec.graph, *bundle.weights(name))),
            "weights": _weights(spec.weights),
        }
        for name, spec in manifest.components.items()
    }
    tables = {
        name: {
            "inputs": _signatures(spec.inputs),
            "outputs": _signatures(spec.outputs),
            "rows": f"{spec.dtype}[{','.join(map(str, spec.shape))}] at byte {spec.offset} of {spec.file}",
            "weights": _weights(spec.weights) if spec.weights else f"those of {spec.file}",
        }
        for name, spec in manifest.tables.items()
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
        "calibration": asdict(manifest.calibration) if manifest.calibration else "none",
        **_formats(bundle),
        "image_size": manifest.model.image_size,
        "image_tokens": manifest.model.image_tokens,
        "files": len(manifest.files),
        "components": components,
        "tables": tables,
        "plans": {
            name: {c: p["state"] for c, p in plan["components"].items()} for name, plan in plans.items()
        },
        "certificates": [line_from_link(link) for link in links(bundle)],
    }


def describe_graph(path: Path) -> dict:
    """Describe an ONNX file: opsets, inputs and outputs, operators and functions.

    Raises InputError for a damaged file, MissingError where onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingError("onnx is not installed", where=f"{path}: {error}", fix=install("export")) from None
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(str(path))
    except Exception as error:  # protobuf raises many types for a damaged file
        reason = " ".join(str(error).split())
        raise InputError(
            "This is not an ONNX file",
            where=f"{path}: expected a model, got {type(error).__name__}: {reason:.200}",
            fix="export the component again",
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
    """Describe a bundle's components, or one of them, as the TensorRT of `target` parses them.

    See `engines.sessions.interpreter.describe_component`. It needs the target's TensorRT, but no device.
    Raises UsageError for a path that is not a bundle, MissingError without that TensorRT, and InputError for
    a network that cannot be interpreted or is not the one that its plan was compiled from.
    """
    from engines.sessions.interpreter import describe_component

    bundle = _bundle(path, "Only a bundle's layers can be shown for a target", "--target T")
    names = _graphs(bundle, component)
    return {
        "bundle": str(path),
        "networks": {name: describe_component(bundle, name, target=target) for name in names},
    }


def files_for_polygraphy(path: Path, folder: Path, component: str | None = None) -> dict:
    """Write the golden tensors of a bundle's components, or of one, to `folder`, for `polygraphy run`.

    Returns the command of each case on the CPU, where a 16-bit graph's fp32 twin runs. Raises UsageError for
    a path that is not a bundle, and what `star_export.golden.polygraphy_files.write_cases` raises.
    """
    from ..golden.polygraphy_files import write_cases

    bundle = _bundle(path, "Only a bundle has golden tensors", "--polygraphy FOLDER")
    names = _graphs(bundle, component)
    written = write_cases(bundle, folder, only=lambda name: name in names)
    cases = [
        asdict(case) | {"command": f"polygraphy run {case.graph} --onnxrt $(cat {case.options})"}
        for case in written
        if Path(case.graph) == bundle.path / bundle.graph_name(case.component, twin=True)
    ]
    return {"bundle": str(path), "folder": str(folder), "cases": cases}


def _bundle(path: Path, what: str, option: str) -> Bundle:
    """The bundle at `path`; raises UsageError with `what` is wrong where there is none."""
    if not (path / MANIFEST).is_file():
        raise UsageError(
            what,
            where=f"{path}: expected a folder with {MANIFEST}",
            fix=f"star-export inspect BUNDLE {option}",
        )
    return Bundle.open(path)


def _graphs(bundle: Bundle, component: str | None) -> list[str]:
    """The names of all graphs, or of those of one component. Raises UsageError with the valid names."""
    names = list(bundle.manifest.components)
    if component is None:
        return names
    return [component] if component in names else bundle.parts(component)


def text_from_description(data: dict) -> str:
    """Format nested data as indented lines; the caches of all layers but the first are only counted."""
    return "\n".join(_lines(data, 0))


def _lines(data: dict, depth: int) -> list[str]:
    lines: list[str] = []
    shown = {k: v for k, v in data.items() if not _later_cache(k)}
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
    """Format one layer or fusion on one line."""
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


def _formats(bundle: Bundle) -> dict[str, str]:
    """In one line, the formats that layers have in mixed precision; nothing of another bundle."""
    found = formats_of(bundle)
    if found is None:
        return {}
    wide = ", ".join(found.wide()) or "no layer"
    return {
        "layers": f"{found.bytes} bytes of a budget of {found.budget.bytes}, {found.bits:.3f} bits per "
        f"weight; int8: {wide}; int4: the others"
    }


def _weights(formats: dict[str, int]) -> str:
    return ", ".join(f"{size} bytes in {name}" for name, size in formats.items())


def _signatures(tensors: tuple[TensorSpec, ...]) -> dict[str, str]:
    return {t.name: f"{t.dtype}[{','.join(map(str, t.shape))}]" for t in tensors}


def _onnx_signature(value) -> str:
    import onnx

    tensor = value.type.tensor_type
    axes = ",".join(d.dim_param or str(d.dim_value) for d in tensor.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()}[{axes}]"


def line_from_link(link: Link) -> str:
    """One certificate on one line: `onnxruntime-exact-cpu.json: passed at 2026-11-28T...`."""
    made = f" at {link.certificate.made_at}" if link.certificate else ""
    return f"{link.path.name}: {link.state}{made}" + (f"; {link.reason}" if link.reason else "")
