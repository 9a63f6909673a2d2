"""Export a checkpoint to a bundle: the function behind `star-export export`.

An export is a list of steps that follow from the configuration. Each writes some files of the bundle from the
memory-mapped checkpoint, one weight at a time, so that a model of any size needs the memory of one layer.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path

from engines.bundle.manifest import SCHEMA, CalibrationSpec, Manifest
from engines.errors import UsageError
from engines.fit.work import check_export
from engines.progress import Progress, silent
from reference.config import StarConfig
from reference.containers import LazyTensor
from reference.weights import named_tensors, resolve_checkpoint

from ..calibration.decodes import Decodes
from ..calibration.effects import Effects
from ..calibration.examples import PROMPTS, SHIPPED, read_material
from ..calibration.run import Calibration, material_hash
from ..choice import FORMATS_FILE, json_from_formats
from ..components import COMPONENTS, PART_BYTES, Part, components_of, parts_of, whole
from ..golden import record as golden
from ..golden import runs as golden_runs
from ..golden.prepared import PREPARED, record_prepared
from ..graph.precisions import MIXED, PRECISIONS, Precision, mixed
from ..graph.repeat import graph_from_config
from ..graph.wrappers import TABLE
from ..planner.source import Source, largest_tensor_bytes, sizes_from_source
from .budget import budget_of, check_mixed, formats_of, precision_of
from .component import component_spec, write_component
from .identity import VERSIONS, checkpoint_hashes, code_hash
from .material import chat_of, check_calibration, decodes_of, drawn_material, recorded_texts, shipped_prompts
from .model_spec import model_spec_from_checkpoint, score_files, tokenizer_files
from .publish import Stage, filled, reserved, stage_path, write_manifest
from .recordings import recordings
from .tables import Table, stored_image_table, write_image_table

CALIBRATION = "calibration.json"  # of a bundle: what each weight lost
INPUTS = 13_000  # of a weight, that a calibration has by default


def export(
    source: str,
    *,
    out: str | Path,
    precision: str = "fp32",
    checkpoint: str | None = None,
    base: str | None = None,
    vq: str | None = None,
    lumina: str | None = None,
    from_folder: str | None = None,
    revision: str | None = None,
    rope_bf16: bool = True,
    components: list[str] | None = None,
    calibrate: int | None = None,
    calibration: str | Path | None = None,
    bits: float | None = None,
    target: str | None = None,
    part_bytes: int = PART_BYTES,
    progress: Progress = silent,
) -> Path:
    """Export `source` to the new bundle `out`, and return the bundle's path.

    `source` is `star-3b`, `star-7b`, a folder in the release layout, its config JSON, `nano`, or a hub id;
    `checkpoint`, `base`, `vq` and `lumina` (the diffusion decoder's folder) override parts of it.
    `from_folder` holds parts of `star-3b` or `star-7b`
    that need not be downloaded, and `revision` is a branch, tag or commit of a hub id. `rope_bf16=False`
    keeps the rotary frequencies in float32 (docs/star.md 0.2).
    `calibrate` chooses the codes of the decoders' weights for what the model computes when it draws that many
    prompts (0: as many as give INPUTS inputs, or all), and edits and answers a quarter as many. They are
    those of the folder `calibration` (`prompts.txt`, one per line, and images), or shipped ones.
    Precision `mixed` gives int8 to those layers of the decoders where it helps the draws most, and int4 to
    the others: at most so many `bits` per weight, or so that `generate` stays loaded on the device `target`.
    `components` limits the export to some rows of the table. A stack of layers (a decoder, the diffusion
    transformer or its text encoder) of more than `part_bytes` is stored in parts of at most that size.

    A run that was killed goes on where it stopped when it is repeated. Raises UsageError for unknown names,
    InputError for an `out` that is not empty or cannot be written, and CheckpointError for invalid files.
    """
    _check_names("precision", [precision], [*PRECISIONS, MIXED])
    if components is not None:
        _check_names("component", components, COMPONENTS)
    if part_bytes < 1:
        raise UsageError(
            "part_bytes is out of range",
            where=f"export: part_bytes: expected at least 1, got {part_bytes}",
            fix="omit it to use the default",
        )
    check_calibration(
        calibrate, calibration, PRECISIONS.get(precision, mixed({})), precision, components or [*COMPONENTS]
    )
    check_mixed(precision, bits=bits, target=target)
    if calibration:  # what is refused is refused before anything is downloaded
        own = Path(calibration, PROMPTS).is_file()
        read_material(Path(calibration), SHIPPED, calibrate or 1, fewer=not own)
    out = Path(out)
    with reserved(out) as reserve:
        files = resolve_checkpoint(
            source,
            checkpoint=checkpoint,
            base=base,
            vq=vq,
            lumina=lumina,
            from_folder=from_folder,
            revision=revision,
            progress=progress,
        )
        config = files.config()
        every = components_of(config)
        names = every if components is None else list(dict.fromkeys(components))
        _check_names("component", names, every)
        model = model_spec_from_checkpoint(files, config, rope_bf16=rope_bf16)
        host_files = tokenizer_files(files, model) | score_files(files)
        budget = budget_of(config, bits=bits, target=target) if precision == MIXED else None
        material = None
        if calibrate is not None:
            prompts = calibrate or math.ceil(INPUTS / 2 / config.vq.image_tokens)  # with two rows of guidance
            folder, shipped = Path(calibration) if calibration else None, shipped_prompts(files)
            material = read_material(folder, shipped, prompts, fewer=not calibrate)
        described = None
        if material:
            described = CalibrationSpec(
                prompts=len(material.prompts),
                edits=len(material.edits),
                questions=len(material.questions),
                images=len(material.images),
                sha256=material_hash(material),
            )
        given = material or (drawn_material(files, config) if budget else None)
        tensors = named_tensors(files, config)
        check_room(config, "int4" if budget else precision, names, out, part_bytes=part_bytes)
        inputs = {
            "calibration": described and asdict(described),
            "budget": budget and asdict(budget),
            "decoded": given and material_hash(given),
            "checkpoint": checkpoint_hashes(files, progress),
            "precision": precision,
            "rope_bf16": rope_bf16,
            "components": names,
            "part_bytes": part_bytes,
            "versions": {package: importlib.metadata.version(package) for package in VERSIONS},
            "code": code_hash(),
        }
        with filled(reserve, out, inputs, progress) as stage:
            table = stage.scratch / "image_table.safetensors"
            stage.step("image table", partial(write_image_table, config, tensors, table))
            tensors = dict(tensors) | {TABLE: stored_image_table(config, table)}
            decodes, chosen = None, PRECISIONS.get(precision)
            if given:
                decodes = decodes_of(stage, config, tensors, rope_bf16, host_files, model, given, progress)
            if budget:
                assert decodes
                effects = Effects(decodes, keep_examples=material is not None)
                _forget_damaged(stage, effects.steps())
                _run(stage, effects.steps(), progress)
                formats = formats_of(config, budget, effects)
                found = {FORMATS_FILE: json_from_formats(formats).encode()}
                stage.step("formats of the layers", lambda: _write_files(stage.bundle, found))
                chosen = precision_of(config, formats)
            assert chosen
            job = Job(stage, config, tensors, chosen, names, part_bytes, rope_bf16, progress)
            if material:
                assert decodes
                job.calibrate(decodes)
            steps = job.steps()
            if set(names) == set(every):
                texts, oracle = recorded_texts(files), lambda: job.oracle
                steps |= recordings(oracle, tensors, texts, host_files, model, stage.bundle)
            _run(stage, {name: (write, job.read_last.get(name)) for name, write in steps.items()}, progress)
            progress("publish", len(steps), len(steps))
            stage.step("files of the host", lambda: _write_files(stage.bundle, host_files))
            chat = chat_of(host_files, model)
            stage.step("what the host prepares", lambda: record_prepared(chat, stage.bundle / PREPARED))
            write_manifest(
                stage,
                Manifest(
                    schema=SCHEMA,
                    precision=precision,
                    model=model,
                    components={part.name: component_spec(part, config, job.precision) for part in job.parts},
                    tables={name: job.table(name).spec(stage.bundle, config) for name in job.tables},
                    part_bytes=part_bytes,
                    golden=job.oracle.spec,
                    files=stage.files(),
                    calibration=described,
                    hub=files.commits,
                ),
            )
    return out


def check_room(config: StarConfig, precision: str, names: list[str], out: Path, *, part_bytes: int) -> None:
    """Check that the disk holds the bundle's weights, and memory the largest weight of a stack in float32.

    Raises MissingError with the bytes needed and free.
    """
    stacks = [name for name in names if COMPONENTS[name].stack]
    check_export(
        sizes_from_source(Source(config, copied_bytes=0), precision, names, part_bytes=part_bytes),
        out,
        converted_bytes=largest_tensor_bytes(config, stacks),
        staged=stage_path(out),
    )


class Job:
    """One export: its parts and tables, and the steps that write their files to `stage`."""

    def __init__(
        self,
        stage: Stage,
        config: StarConfig,
        tensors: Mapping[str, LazyTensor],
        precision: Precision,
        names: list[str],
        part_bytes: int,
        rope_bf16: bool,
        progress: Progress,
    ):
        self.stage, self.config, self.precision, self.rope_bf16 = stage, config, precision, rope_bf16
        self.progress = progress
        self.names = names
        self.tables = [name for name in names if COMPONENTS[name].table]
        self.parts = [
            part
            for name in names
            if name not in self.tables
            for part in parts_of(
                name,
                config,
                weight_bytes=sum(
                    sum(precision.stored(weight, tuple(lazy.shape))[1])
                    for weight, lazy in tensors.items()
                    if weight.startswith(f"{name}.")
                ),
                part_bytes=part_bytes,
            )
        ]
        self.tensors = dict(tensors)
        self.calibration: Calibration | None = None
        self.read_last: dict[str, Path] = {}  # step -> a file of the stage that no later step reads

    @functools.cached_property
    def oracle(self) -> golden.Oracle:
        """The reference with the weights as stored, once those that are calibrated are there."""
        return golden.oracle_of(self.config, self.tensors, self.precision, rope_bf16=self.rope_bf16)

    def calibrate(self, decodes: Decodes) -> None:
        """Calibrate the decoders before anything else is written."""
        self.calibration = Calibration(decodes, self.precision)
        self.tensors |= self.calibration.stored_tensors()
        _forget_damaged(self.stage, self.calibration.steps())

    def steps(self) -> dict[str, Callable[[], None]]:
        """Name of a step -> what writes its files, in the order in which they run."""
        steps: dict[str, Callable[[], None]] = {}
        if self.calibration:
            for name, (run, read) in self.calibration.steps().items():
                steps[name] = run
                if read:
                    self.read_last[name] = read
            steps["table of the calibration"] = self._write_calibration
        for part in self.parts:
            steps[f"export {part.name}"] = partial(self._write_part, part)
            steps[f"golden tensors of {part.name}"] = partial(self._record, part)
        for name in self.tables:
            steps[f"export {name}"] = partial(self.table(name).write, self.stage.bundle)
            steps[f"golden tensors of {name}"] = partial(self._record, whole(name, self.config))
        if set(self.names) == set(components_of(self.config)):
            runs = self.stage.bundle / "golden.safetensors"
            steps["golden tensors of whole runs"] = lambda: golden_runs.run_golden(self.oracle, runs)
        return steps

    def _write_calibration(self) -> None:
        assert self.calibration
        text = json.dumps(self.calibration.table(), indent=1) + "\n"
        _write_files(self.stage.bundle, {CALIBRATION: text.encode()})

    def table(self, name: str) -> Table:
        """The table of a component, which a graph that is stored whole may use too."""
        weight = COMPONENTS[name].table or ""
        graphs = tuple(part.name for part in self.parts if part.layers is None)
        return Table(name, weight, self.tensors[weight], self.precision.within(name), graphs)

    def _write_part(self, part: Part) -> None:
        model = graph_from_config(part, self.config, rope_bf16=self.rope_bf16)
        folder = self.stage.bundle / part.name
        precision = self.precision.within(part.component)
        write_component(model, self.tensors, precision, folder, progress=self.progress)

    def _record(self, part: Part) -> None:
        before = self._before(part)
        folder = self.stage.bundle / part.name
        folder.mkdir(parents=True, exist_ok=True)
        golden.component_golden(
            part, self.oracle, folder / "golden.safetensors", before=before and before / "golden.safetensors"
        )

    def _before(self, part: Part) -> Path | None:
        """The folder of the part that hands its results to `part`."""
        chain = [other for other in self.parts if other.component == part.component]
        at = chain.index(part) if part in chain else 0
        return self.stage.bundle / chain[at - 1].name if at else None


def _run(
    stage: Stage, steps: Mapping[str, tuple[Callable[[], None], Path | None]], progress: Progress
) -> None:
    """Run the steps that are not done yet, and remove the file that none reads after a step."""
    for i, (name, (write, read_last)) in enumerate(steps.items()):
        progress(name, i, len(steps))
        stage.step(name, write)
        if read_last and read_last.exists():
            stage.drop(read_last)


def _forget_damaged(stage: Stage, steps: Mapping[str, tuple[Callable[[], None], Path | None]]) -> None:
    """Forget all steps if one was damaged: what it was made from, by the one before it, may be gone."""
    done = [name in stage.steps for name in steps]
    next_read = next((read for (_, read), ended in zip(steps.values(), done) if not ended), None)
    if done != sorted(done, reverse=True) or (next_read and not next_read.exists()):
        stage.forget(steps)


def _write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


def _check_names(kind: str, names: list[str], valid: Collection[str]) -> None:
    wrong = [name for name in names if name not in valid]
    if wrong or not names:
        raise UsageError(
            f"No such {kind}" if wrong else f"The list of {kind}s is empty",
            where=f"export: {kind}: expected names from {', '.join(valid)}; "
            f"got {', '.join(map(repr, wrong)) or 'none'}",
            fix="use names from the list",
        )
