"""What an export calibrates and measures on: whether it can, and the prompts and images that it decodes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from engines.bundle.manifest import ModelSpec
from engines.errors import UsageError
from engines.inputs.prompt import Chat
from engines.progress import Progress
from reference.config import StarConfig
from reference.containers import LazyTensor
from reference.weights import CheckpointFiles

from ..calibration.decodes import Decodes
from ..calibration.effects import images_of
from ..calibration.examples import SHIPPED, Material, read_material
from ..calibration.run import CALIBRATED
from ..graph.precisions import Precision
from .publish import Stage

CALIBRATION_PROMPTS = "calibration.txt"  # beside a checkpoint's configuration


def check_calibration(
    calibrate: int | None,
    calibration: str | Path | None,
    precision: Precision,
    name: str,
    components: list[str],
) -> None:
    """Raise UsageError for a calibration of no prompts, or without codes to choose."""
    if calibrate is not None and calibrate < 0:
        raise UsageError(
            "calibrate is out of range",
            where=f"export: calibrate: expected 1 prompt or more, or 0 for the default, got {calibrate}",
            fix="omit the number to use the default",
        )
    if calibration and calibrate is None:
        raise UsageError(
            "A folder of calibration without a calibration",
            where=f"export: calibration: expected --calibrate as well, got {calibration} alone",
            fix="add --calibrate",
        )
    if calibrate is not None and not precision.quantised:
        raise UsageError(
            "There is nothing to calibrate",
            where=f"export: calibrate: expected a precision with quantised weights, got {name}",
            fix="omit --calibrate, or export in int8, int4, fp8, nvfp4 or mixed",
        )
    if calibrate is not None and not set(CALIBRATED) & set(components):
        raise UsageError(
            "There is nothing to calibrate",
            where=f"export: calibrate: expected one of {', '.join(CALIBRATED)} among the components, "
            f"got {', '.join(components)}",
            fix="omit --calibrate, or export one of them too",
        )


def shipped_prompts(files: CheckpointFiles) -> Path:
    """The prompts beside a checkpoint, or else ours."""
    own = files.config_json.parent / CALIBRATION_PROMPTS
    return own if own.exists() else SHIPPED


def recorded_texts(files: CheckpointFiles) -> dict[str, str]:
    """The first prompt, instruction and question beside a checkpoint, or else of ours."""
    own, ours = (read_material(None, path, 1, fewer=True) for path in (shipped_prompts(files), SHIPPED))
    edits = own.edits or ours.edits
    return {"prompt": own.prompts[0], "edit": edits[0], "question": own.questions[0]}


def drawn_material(files: CheckpointFiles, config: StarConfig) -> Material:
    """The prompts that layers are measured on where nothing is calibrated: images only."""
    found = read_material(None, shipped_prompts(files), images_of(config.vq.image_tokens), fewer=True)
    return replace(found, edits=(), questions=())


def chat_of(host_files: Mapping[str, bytes], model: ModelSpec) -> Chat:
    """The tokenizer and chat template of a bundle that is being exported. Raises InputError."""
    tokenizer, template = (host_files[name].decode() for name in ("tokenizer.json", "chat_template.jinja"))
    return Chat(tokenizer, template, model)


def decodes_of(
    stage: Stage,
    config: StarConfig,
    tensors: Mapping[str, LazyTensor],
    rope_bf16: bool,
    host_files: Mapping[str, bytes],
    model: ModelSpec,
    material: Material,
    progress: Progress,
) -> Decodes:
    """What an export decodes of `material` with the checkpoint, in its scratch folder."""
    chat, folder = chat_of(host_files, model), stage.scratch / "calibration"
    return Decodes(folder, config, tensors, rope_bf16, chat, model, material, progress)
