"""Golden tensors in the files of Polygraphy, NVIDIA's tool, so that it can judge a graph or a plan by itself.

A case becomes two files that `polygraphy run` reads with `--load-inputs` and `--load-outputs`, and one with
its options, tolerances among them. numpy has no bfloat16, so caches of that type are written as torch
tensors, which Polygraphy reads where torch is installed.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle.files import write_atomic
from engines.bundle.manifest import ComponentSpec
from engines.bundle.reader import Bundle
from engines.bundle.tensors import PRESENT
from engines.bundle.typed_paths import output_folder, typed_path
from engines.errors import InputError, MissingError, UsageError, install
from engines.sessions.onnxruntime import twin_spec

from .cases import Case, Tensors, recorded_cases
from .compare import tolerance_of
from .run_case import written_slots
from .tolerances import compute_type, tolerances_of

REFERENCE = "reference"  # what the files call the runner that made the outputs


@dataclass(frozen=True)
class WrittenCase:
    """One case of one `graph`, the path of an ONNX file; `options` is the file with Polygraphy's options."""

    component: str
    case: str
    graph: str
    options: str


def check_polygraphy() -> None:
    """Raise MissingError where Polygraphy is not installed."""
    if importlib.util.find_spec("polygraphy") is None:
        raise MissingError(
            "Polygraphy is not installed",
            where="expected the package polygraphy, got no such package",
            fix=install("debug"),
        )


def check_folder(folder: Path) -> None:
    """Raise UsageError for a name with spaces, as a shell reads the options, and InputError for a place that
    is taken."""
    if any(character.isspace() for character in str(folder)):
        raise UsageError(
            "Polygraphy's options cannot name this folder",
            where=f"{str(folder)!r}: expected a name without spaces",
            fix="choose another folder",
        )
    typed_path(folder)
    output_folder(next(path for path in (folder, *folder.absolute().parents) if path.is_dir()))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            "The place of Polygraphy's files is taken",
            where=f"{folder}: expected nothing or an empty folder, got "
            + ("a folder with files in it" if folder.is_dir() else "a file"),
            fix="name another folder, or remove what is there",
        )


def write_cases(
    bundle: Bundle, folder: Path, *, only: Callable[[str], bool] = lambda name: True
) -> list[WrittenCase]:
    """Write the golden tensors of every graph that `only` accepts to `folder`, for Polygraphy.

    `folder/COMPONENT/CASE/` gets `GRAPH.inputs.json`, `GRAPH.outputs.json` and `GRAPH.options` for the graph
    `model` and, in a bundle of 16 bits, for its fp32 `twin`, each in the graph's own types. Raises
    MissingError without Polygraphy, or without torch for caches in bfloat16, and what `check_folder` raises.
    """
    check_polygraphy()
    check_folder(folder)
    written = []
    for name, spec in bundle.manifest.components.items():
        if not only(name):
            continue
        cases = recorded_cases(bundle, name)
        graphs = {"model": (spec.graph, spec)} | ({"twin": (spec.twin, twin_spec(spec))} if spec.twin else {})
        for stem, (graph, own) in graphs.items():
            compute = compute_type(bundle.manifest.precision, twin=stem == "twin")
            for case, recorded in cases.items():
                tolerances = tolerances_of(name, compute, recorded.noise_in(compute))
                place = folder / name / case
                place.mkdir(parents=True, exist_ok=True)
                options = _write_case(place / stem, own, recorded, tolerances)
                written.append(WrittenCase(name, case, str(bundle.path / graph), str(options)))
    return written


def _write_case(stem: Path, spec: ComponentSpec, case: Case, tolerances: Mapping[str, float]) -> Path:
    """Write `stem.inputs.json`, `stem.outputs.json` and `stem.options`; returns the last one's path."""
    from polygraphy.comparator import RunResults
    from polygraphy.json import save_json

    types = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}
    inputs, outputs, options = (
        stem.with_name(f"{stem.name}.{kind}") for kind in ("inputs.json", "outputs.json", "options")
    )
    results = RunResults()
    results.add([_typed(case.outputs, types)], runner_name=REFERENCE)
    _save(lambda path: save_json([_typed(case.inputs, types)], path), inputs)
    _save(results.save, outputs)
    bounds = [f"{name}:{atol!r}" for name, atol in absolute_tolerances(case, tolerances).items()]
    words = [
        f"--load-inputs {inputs}",
        f"--load-outputs {outputs}",
        "--check-error-stat max --rtol 0",
        "--atol " + " ".join(bounds),
    ]
    write_atomic(options, ("\n".join(words) + "\n").encode())
    return options


def _save(write: Callable[[str], None], path: Path) -> None:
    """Let Polygraphy write a file elsewhere, and publish it as a whole."""
    from polygraphy.logger import G_LOGGER

    with tempfile.TemporaryDirectory() as folder, G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        draft = Path(folder) / path.name
        write(str(draft))
        write_atomic(path, draft.read_bytes())


def _typed(tensors: Tensors, types: Mapping[str, str]) -> dict[str, Any]:
    """The tensors in the graph's types; those of bfloat16 are torch tensors."""
    return {
        name: _bfloat16(array) if types[name] == "bfloat16" else array.astype(types[name])
        for name, array in tensors.items()
    }


def _bfloat16(array: np.ndarray) -> Any:
    if importlib.util.find_spec("torch") is None:
        raise MissingError(
            "torch is not installed",
            where="caches in bfloat16: expected torch, since numpy has no such type, got no such package",
            fix=install("export"),
        )
    import torch

    return torch.from_numpy(array.copy()).to(torch.bfloat16)


def absolute_tolerances(case: Case, tolerances: Mapping[str, float]) -> dict[str, float]:
    """Our tolerances as Polygraphy's `--atol` per output: those times the reference's standard deviation.

    Of a cache it is that of the slots which the case writes. Ids of which a share may differ have no such
    tolerance, so theirs is infinite: Polygraphy prints how far they are and lets them pass.
    """
    found = {}
    for name, array in case.outputs.items():
        if name.startswith(PRESENT):
            array = written_slots(array, case.inputs["write_indices"], case.inputs["inputs_embeds"].shape[1])
        found[name] = atol_of(array, tolerance_of(name, tolerances))
    return found


def atol_of(reference: np.ndarray, tolerance: float) -> float:
    """Our tolerance as an absolute one, by the standard deviation of `reference`; 0 or infinite for ids."""
    if np.issubdtype(reference.dtype, np.floating):
        return tolerance * float(reference.astype(np.float64).std())
    return float("inf") if tolerance else 0.0
