"""Golden tensors as cases, read and checked here and recorded in `record.py`.

This module knows nothing of sessions, and needs neither torch nor safetensors. It refuses a set that cannot
prove anything: one without cases, with wrong names or types, with numbers that are not finite, or with
constant outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle.manifest import ComponentSpec, TableSpec
from engines.bundle.reader import Bundle
from engines.bundle.records import value_from_json
from engines.errors import InputError

from .compare import check_not_vacuous

Tensors = dict[str, np.ndarray]
# Fills cache slots that must not be read; finite, because an executor may multiply it by a weight of 0.
POISON = 1e4
DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "I64": np.dtype("<i8")}


@dataclass
class Case:
    """One recorded call: `inputs` and `outputs` by name. Floats, caches included, are float32, and ids int64.

    `noise` maps an output to its distance from the same reference computed in the bundle's 16-bit type (see
    `tolerances`); it is empty in an fp32 bundle. `int8` is the same for activations in int8, of components
    with int8 or int4 weights, and `fp4` for activations that are not rounded to nvfp4, of components with
    nvfp4 weights.
    """

    inputs: Tensors = field(default_factory=dict)
    outputs: Tensors = field(default_factory=dict)
    noise: Tensors = field(default_factory=dict)
    int8: Tensors = field(default_factory=dict)
    fp4: Tensors = field(default_factory=dict)

    def noise_in(self, compute: str) -> Tensors:
        """The noise of the arithmetic `compute`."""
        return {"int8": self.int8, "fp4": self.fp4}.get(compute, self.noise)


def cases_from_file(path: Path) -> dict[str, Case]:
    """`cases_from_bytes` of a file."""
    return cases_from_bytes(path.read_bytes(), path)


def recorded_runs(bundle: Bundle, name: str) -> dict[str, Case]:
    """The cases in the file `name` of a bundle: of the bytes that were hashed. Raises InputError."""
    return cases_from_bytes(bundle.read(name), bundle.path / name)


def recorded_cases(bundle: Bundle, name: str) -> dict[str, Case]:
    """The cases of the graph or table `name`, checked as `component_cases` does. Raises InputError."""
    spec = bundle.manifest.components.get(name) or bundle.manifest.tables[name]
    return _checked(recorded_runs(bundle, spec.golden), spec, bundle.path / spec.golden)


def cases_from_bytes(data: bytes, path: Path) -> dict[str, Case]:
    """Read case name -> case from keys `case/in/name`, `case/out/name`, `case/noise/name`, `case/int8/name`
    and `case/fp4/name`.

    Raises InputError for a set that cannot prove anything.
    """
    cases: dict[str, Case] = {}
    for key, array in tensors_from_bytes(data, path).items():
        case, side, name = (key.split("/", 2) + ["", ""])[:3]
        if side not in ("in", "out", "noise", "int8", "fp4") or not name:
            raise _refusal(path, "keys case/in/name and case/out/name, /noise/, /int8/ and /fp4/", repr(key))
        if not np.isfinite(array).all():
            raise _refusal(f"{path}: {key}", "finite numbers", "NaN or Inf")
        entry = cases.setdefault(case, Case())
        sides = {"in": entry.inputs, "out": entry.outputs, "noise": entry.noise, "int8": entry.int8}
        (sides | {"fp4": entry.fp4})[side][name] = array
    if not cases:
        raise _refusal(path, "at least one case", "none")
    for case, entry in cases.items():
        if not entry.outputs:
            raise _refusal(f"{path}: {case}", "at least one output", "none")
        for name, array in entry.outputs.items():
            check_not_vacuous(f"{case}/out/{name}", array, where=str(path))
    return cases


def tensors_from_bytes(data: bytes, path: Path) -> Tensors:
    """Read the contents of a safetensors file of float32 and int64 arrays.

    That needs no library, which a device may lack. Raises InputError for another file.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    if not 8 <= start <= len(data):
        raise _refusal(path, f"a header within {len(data)} bytes", f"{start - 8} bytes of header")
    try:
        header: Any = value_from_json(data[8:start].decode(), where=str(path))
        header.pop("__metadata__", None)
        body = memoryview(data)[start:]
        return {
            key: np.frombuffer(body[slice(*entry["data_offsets"])], DTYPES[entry["dtype"]]).reshape(
                entry["shape"]
            )
            for key, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _refusal(
            path, "float32 and int64 tensors in safetensors format", f"{type(error).__name__}: {error}"
        ) from None


def component_cases(path: Path, spec: ComponentSpec | TableSpec) -> dict[str, Case]:
    """Read the cases of one graph or table, each with the inputs and outputs of `spec`, in their types.

    Raises InputError for other names or types.
    """
    return _checked(cases_from_file(path), spec, path)


def _checked(cases: dict[str, Case], spec: ComponentSpec | TableSpec, path: Path) -> dict[str, Case]:
    for case, entry in cases.items():
        for side, arrays, specs in (("in", entry.inputs, spec.inputs), ("out", entry.outputs, spec.outputs)):
            expected = {t.name: "int64" if t.dtype == "int64" else "float32" for t in specs}
            got = {name: str(array.dtype) for name, array in arrays.items()}
            if wrong := sorted(expected.items() ^ got.items()):
                name = wrong[0][0]
                raise _refusal(
                    f"{path}: {case}/{side}/{name}",
                    expected.get(name, "no such tensor"),
                    got.get(name, "nothing"),
                )
    return cases


def _refusal(where: object, expected: str, got: str) -> InputError:
    return InputError(
        "The golden set cannot prove anything",
        where=f"{where}: expected {expected}, got {got}",
        fix="export the bundle again",
    )
