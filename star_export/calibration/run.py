"""The steps of a calibrated export: decode the examples, then calibrate the decoders, layer by layer, and the
image head.

Each layer's result and the stream that it hands on are files of the export's scratch folder, so an export
that was killed goes on at the layer where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from engines.errors import InputError
from reference.containers import LazyTensor

from ..golden.oracle import resident
from ..graph.formats import Encoded, Format
from ..graph.precisions import DECODERS, Precision
from ..graph.quantize import CODES, SCALES, WHOLE, StoredTensor
from ..tensor_files import save_tensors
from .decodes import DECODE, EXAMPLES, Decodes
from .examples import Material
from .gptq import SingularError, feedback_of
from .layers import (
    Calibrated,
    both_streams,
    calibrate_layer,
    moments_of,
    quantise,
    rows_of,
    through_norm,
    wanted,
)

HEAD = "image_head"
CALIBRATED = (*DECODERS, HEAD)


@dataclass(frozen=True)
class Calibration:
    """A calibration on its way, in the folder of its `decodes`."""

    decodes: Decodes
    precision: Precision

    def steps(self) -> dict[str, tuple[Callable[[], None], Path | None]]:
        """Name of a step -> what writes its files, and the file that nothing reads after it, in order."""
        steps: dict[str, tuple[Callable[[], None], Path | None]] = {}
        steps[DECODE] = self.decodes.decode, None
        before = EXAMPLES
        for name, layer in self.decodes.layers():
            run, read = partial(self._calibrate, name, layer, before), self.decodes.path(before)
            steps[f"calibrate {name} layer {layer}"] = run, read
            before = f"{name}.layers.{layer}"
        steps[f"calibrate {HEAD}"] = partial(self._calibrate_head, before), self.decodes.path(before)
        return steps

    def stored_tensors(self) -> dict[str, LazyTensor]:
        """The weights as calibrated, which are read once the steps have run."""
        found: dict[str, LazyTensor] = {}
        for prefix in self._prefixes():
            path = self.decodes.path(prefix, "weights")
            for weight, tensor in self.decodes.tensors.items():
                if not weight.startswith(f"{prefix}."):
                    continue
                shape = tuple(tensor.shape)
                if format := self.precision.format_of(weight, shape):
                    encoded = partial(_encoded, path, weight, format)
                    values = partial(_values, path, weight, format)
                    found[weight] = StoredTensor(weight, shape, torch.float32, path, values, encoded)
                elif weight.endswith("layernorm.weight"):
                    read = partial(_tensor, path, weight)
                    found[weight] = LazyTensor(weight, shape, torch.float32, path, read)
        return found

    def table(self) -> dict[str, dict[str, Any]]:
        """Weight -> its format, its bytes, and the share of its products' mean square that is lost: as it is
        stored, and as rounding to nearest would."""
        found: dict[str, dict[str, Any]] = {}
        for prefix in self._prefixes():
            text = self.decodes.path(prefix, "errors", "json").read_text()
            for weight, (stored, nearest) in json.loads(text).items():
                format, sizes = self.precision.stored(weight, tuple(self.decodes.tensors[weight].shape))
                found[weight] = {
                    "format": format,
                    "bytes": sum(sizes),
                    "lost": stored,
                    "lost_if_rounded_to_nearest": nearest,
                }
        return found

    def _prefixes(self) -> list[str]:
        """What the names of calibrated weights begin with, in the order of the steps."""
        return [*(f"{name}.layers.{layer}" for name, layer in self.decodes.layers()), HEAD]

    def _calibrate(self, name: str, layer: int, before: str) -> None:
        prefix, started = f"{name}.layers.{layer}", self.decodes.read(before)
        decoder = getattr(self.decodes.star(), name)
        block = decoder.layers[layer]
        stream = [example for example in started if example.image or name == "base_ar"]
        with torch.inference_mode(), resident(block), _singular(prefix):
            made, stream = calibrate_layer(decoder, layer, stream, prefix=prefix, precision=self.precision)
            if layer == len(decoder.layers) - 1:
                stream = through_norm(decoder.norm, stream, prefix=f"{name}.norm", precision=self.precision)
        if bad := [i for i, example in enumerate(stream) if not torch.isfinite(example.embeds).all()]:
            raise InputError(
                "The activations of the calibration are not finite",
                where=f"{prefix}: expected finite numbers, got NaN or infinity in {len(bad)} of "
                f"{len(stream)} examples, the first of them {bad[0]}",
                fix="check the checkpoint",
            )
        self._write_weights(prefix, made)
        self.decodes.write(prefix, stream)

    def _calibrate_head(self, before: str) -> None:
        """Quantise the image head for the positions that it draws from."""
        weight, tokens = f"{HEAD}.weight", self.decodes.config.vq.image_tokens
        tensor, made = self.decodes.tensors[weight], Calibrated()
        if format := self.precision.format_of(weight, tuple(tensor.shape)):
            stream = self.decodes.read(before)
            inputs, exact = (rows_of([x[:, -tokens:] for x in found]) for found in both_streams(stream))
            with torch.inference_mode(), _singular(weight):
                moments = moments_of(inputs)
                feedback = feedback_of(moments)
                (nearest,) = wanted([tensor.load()], inputs, exact, feedback)
                quantise(made, weight, nearest, moments, feedback, format, self.precision)
        self._write_weights(HEAD, made)

    def _write_weights(self, prefix: str, made: Calibrated) -> None:
        tensors: dict[str, Tensor] = dict(made.norms)
        for weight, encoded in made.encoded.items():
            tensors |= {f"{weight}{CODES}": encoded.codes, f"{weight}{SCALES}": encoded.scales}
            if encoded.whole is not None:
                tensors[f"{weight}{WHOLE}"] = encoded.whole
        save_tensors(
            {key: value.contiguous() for key, value in tensors.items()}, self.decodes.path(prefix, "weights")
        )
        self.decodes.path(prefix, "errors", "json").write_text(json.dumps(made.errors))


@contextlib.contextmanager
def _singular(what: str) -> Iterator[None]:
    """Turn a SingularError into an InputError that names the weights."""
    try:
        yield
    except SingularError as error:
        raise InputError(
            "A layer cannot be calibrated",
            where=f"{what}: {error}",
            fix="check the checkpoint and the images of the calibration, or calibrate with more prompts",
        ) from None


def material_hash(material: Material) -> str:
    """The SHA-256 of everything that a calibration is given."""
    digest = hashlib.sha256()
    for text in (*material.prompts, "\0edits", *material.edits, "\0questions", *material.questions):
        digest.update(text.encode() + b"\0")
    for image in material.images:
        digest.update(repr(image.shape).encode() + np.ascontiguousarray(image).tobytes())
    return digest.hexdigest()


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _encoded(path: Path, weight: str, format: Format) -> Encoded:
    codes, scales = _tensor(path, f"{weight}{CODES}"), _tensor(path, f"{weight}{SCALES}")
    whole = _tensor(path, f"{weight}{WHOLE}") if format.scale else None
    return Encoded(codes, scales, format.code, whole)


def _values(path: Path, weight: str, format: Format) -> Tensor:
    return _encoded(path, weight, format).decode()
