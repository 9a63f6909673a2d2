"""The steps of a calibrated export: decode the examples, then calibrate the decoders, layer by layer, and the
image head.

Each layer's result and the stream that it hands on are files of the export's scratch folder, so an export
that was killed goes on at the layer where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from engines.bundle.manifest import ModelSpec
from engines.errors import InputError
from engines.inputs.prompt import Chat
from engines.progress import Progress
from reference.config import StarConfig
from reference.containers import LazyTensor

from ..golden.oracle import resident, streamed_star
from ..graph.formats import Encoded
from ..graph.precisions import DECODERS, PRECISIONS, Precision
from ..graph.quantize import CODES, SCALES, StoredTensor
from .examples import Example, Material, decoded
from .gptq import SingularError
from .layers import Calibrated, calibrate_layer, moments_of, quantise

HEAD = "image_head"
CALIBRATED = (*DECODERS, HEAD)


@dataclass(frozen=True)
class Calibration:
    """A calibration on its way, in `folder`. `tensors` are the checkpoint's, and stay as they are."""

    folder: Path
    config: StarConfig
    tensors: Mapping[str, LazyTensor]
    precision: Precision
    rope_bf16: bool
    chat: Chat
    model: ModelSpec
    material: Material
    progress: Progress

    def steps(self) -> dict[str, tuple[Callable[[], None], Path | None]]:
        """Name of a step -> what writes its files, and the file that nothing reads after it, in order."""
        steps: dict[str, tuple[Callable[[], None], Path | None]] = {}
        steps["decode the examples"] = self._decode, None
        before = "examples"
        for name, layer in self._layers():
            run, read = partial(self._calibrate, name, layer, before), self._path(before, "stream")
            steps[f"calibrate {name} layer {layer}"] = run, read
            before = f"{name}.layers.{layer}"
        steps[f"calibrate {HEAD}"] = partial(self._calibrate_head, before), self._path(before, "stream")
        return steps

    def stored_tensors(self) -> dict[str, LazyTensor]:
        """The weights as calibrated, which are read once the steps have run."""
        found: dict[str, LazyTensor] = {}
        for prefix in self._prefixes():
            path = self._path(prefix, "weights")
            for weight, tensor in self.tensors.items():
                if not weight.startswith(f"{prefix}."):
                    continue
                shape = tuple(tensor.shape)
                if self.precision.format_of(weight, shape):
                    encoded, values = partial(_encoded, path, weight), partial(_values, path, weight)
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
            text = self._path(prefix, "errors", "json").read_text()
            for weight, (stored, nearest) in json.loads(text).items():
                format, sizes = self.precision.stored(weight, tuple(self.tensors[weight].shape))
                found[weight] = {
                    "format": format,
                    "bytes": sum(sizes),
                    "lost": stored,
                    "lost_if_rounded_to_nearest": nearest,
                }
        return found

    def _layers(self) -> list[tuple[str, int]]:
        return [(name, i) for name in DECODERS for i in range(getattr(self.config, name).num_layers)]

    def _prefixes(self) -> list[str]:
        """What the names of calibrated weights begin with, in the order of the steps."""
        return [*(f"{name}.layers.{layer}" for name, layer in self._layers()), HEAD]

    def _path(self, what: str, kind: str, suffix: str = "safetensors") -> Path:
        return self.folder / f"{what}.{kind}.{suffix}"

    def _decode(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        star = streamed_star(self.config, self.tensors, PRECISIONS["fp32"], rope_bf16=self.rope_bf16)
        sampling = self.model.sampling.generate
        self._write("examples", decoded(star, self.chat, self.model, self.material, sampling, self.progress))

    def _calibrate(self, name: str, layer: int, before: str) -> None:
        prefix, started = f"{name}.layers.{layer}", self._read(before)
        star = streamed_star(self.config, self.tensors, PRECISIONS["fp32"], rope_bf16=self.rope_bf16)
        decoder = getattr(star, name)
        block = decoder.layers[layer]
        stream = [example for example in started if example.image or name == "base_ar"]
        with torch.inference_mode(), resident(block), _singular(prefix):
            made, outputs = calibrate_layer(decoder, layer, stream, prefix=prefix, precision=self.precision)
            if layer == len(decoder.layers) - 1:
                outputs = [decoder.norm(x) for x in outputs]
        if bad := [i for i, x in enumerate(outputs) if not torch.isfinite(x).all()]:
            raise InputError(
                "The activations of the calibration are not finite",
                where=f"{prefix}: expected finite numbers, got NaN or infinity in {len(bad)} of "
                f"{len(outputs)} examples, the first of them {bad[0]}",
                fix="check the checkpoint",
            )
        self._write_weights(prefix, made)
        handed_on = [Example(x, e.positions, e.image) for x, e in zip(outputs, stream, strict=True)]
        self._write(prefix, handed_on)

    def _calibrate_head(self, before: str) -> None:
        """Quantise the image head for the positions that it draws from."""
        weight, tokens = f"{HEAD}.weight", self.config.vq.image_tokens
        inputs = [example.embeds[:, -tokens:] for example in self._read(before)]
        tensor, made = self.tensors[weight], Calibrated()
        if format := self.precision.format_of(weight, tuple(tensor.shape)):
            with torch.inference_mode(), _singular(weight):
                quantise(made, weight, tensor.load().float(), moments_of(inputs), format, self.precision)
        self._write_weights(HEAD, made)

    def _write_weights(self, prefix: str, made: Calibrated) -> None:
        tensors: dict[str, Tensor] = dict(made.norms)
        for weight, encoded in made.encoded.items():
            tensors |= {f"{weight}{CODES}": encoded.codes, f"{weight}{SCALES}": encoded.scales}
        save_file({key: value.contiguous() for key, value in tensors.items()}, self._path(prefix, "weights"))
        self._path(prefix, "errors", "json").write_text(json.dumps(made.errors))

    def _write(self, name: str, examples: list[Example]) -> None:
        tensors: dict[str, Tensor] = {}
        for i, example in enumerate(examples):
            kind = f"{i}.{'image' if example.image else 'text'}"
            tensors |= {f"{kind}.embeds": example.embeds, f"{kind}.positions": example.positions}
        save_file({key: value.contiguous() for key, value in tensors.items()}, self._path(name, "stream"))

    def _read(self, name: str) -> list[Example]:
        found, tensors = [], load_file(self._path(name, "stream"))
        for key in sorted((k for k in tensors if k.endswith(".embeds")), key=lambda k: int(k.split(".")[0])):
            kind = key.removesuffix(".embeds")
            found.append(Example(tensors[key], tensors[f"{kind}.positions"], kind.endswith("image")))
        return found


@contextlib.contextmanager
def _singular(what: str) -> Iterator[None]:
    """Turn a SingularError into an InputError that names the weights."""
    try:
        yield
    except SingularError as error:
        raise InputError(
            "A layer cannot be calibrated",
            where=f"{what}: {error}",
            fix="check the checkpoint and the pictures of the calibration, or calibrate with more prompts",
        ) from None


def material_hash(material: Material) -> str:
    """The SHA-256 of everything that a calibration is given."""
    digest = hashlib.sha256()
    for text in (*material.prompts, "\0edits", *material.edits, "\0questions", *material.questions):
        digest.update(text.encode() + b"\0")
    for picture in material.pictures:
        digest.update(repr(picture.shape).encode() + np.ascontiguousarray(picture).tobytes())
    return digest.hexdigest()


def _tensor(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


def _encoded(path: Path, weight: str) -> Encoded:
    return Encoded(_tensor(path, f"{weight}{CODES}"), _tensor(path, f"{weight}{SCALES}"))


def _values(path: Path, weight: str) -> Tensor:
    return _encoded(path, weight).decode()
