"""What one layer in low precision does to the draws of the whole model: the divergence per image token.

The checkpoint is given images that it drew, and its residual stream before each layer is kept. To measure a
layer, its linear weights are rounded to nearest, and the stream before it goes through it and through the
layers after it, which stay as they are. Both rows go on to the image head, and the guided distributions at
all positions of the image are compared with the checkpoint's (`golden/divergence.py`). Layers are read one at
a time, so a model of any size needs the memory of one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from reference import tasks
from reference.decoder import Decoder

from ..golden.divergence import divergence
from ..golden.oracle import resident
from ..graph.precisions import EQUAL_LAYERS
from ..graph.wrappers import FoldedStar
from ..tensor_files import save_tensors
from .decodes import DECODE, EXAMPLES, Decodes
from .examples import Example

TOKENS = 1024  # of images, that a layer is measured on by default
MEASURED = ("int8", "int4")


@dataclass(frozen=True)
class Effects:
    """A measurement on its way, in the folder of its `decodes`.

    `keep_examples` tells that a calibration reads the examples afterwards.
    """

    decodes: Decodes
    keep_examples: bool

    @property
    def images(self) -> int:
        """How many images a layer is measured on: as many as have TOKENS tokens, if so many are drawn."""
        material = self.decodes.material
        drawn = len(material.prompts) + len(material.edits)
        return min(drawn, images_of(self.decodes.config.vq.image_tokens))

    def steps(self) -> dict[str, tuple[Callable[[], None], Path | None]]:
        """Name of a step -> what writes its files, and the file that nothing reads after it, in order."""
        decodes = self.decodes
        examples = None if self.keep_examples else decodes.path(EXAMPLES)
        steps: dict[str, tuple[Callable[[], None], Path | None]] = {
            DECODE: (decodes.decode, None),
            "draws of the checkpoint": (self._pass_through, examples),
        }
        for at, (name, layer) in enumerate(decodes.layers()):
            before = decodes.path(_before(name, layer))
            steps[f"measure {name} layer {layer}"] = partial(self._measure, at), before
        return steps

    def kl(self) -> dict[str, dict[str, float]]:
        """Layer, such as `base_ar.layers.3` -> format -> mean divergence per image token, in nats."""
        return {
            f"{name}.layers.{layer}": json.loads(self._measured(name, layer).read_text())
            for name, layer in self.decodes.layers()
        }

    def _measured(self, name: str, layer: int) -> Path:
        return self.decodes.path(f"{name}.layers.{layer}", "kl", "json")

    def _draws(self) -> Path:
        return self.decodes.path("draws", "logits")

    def _pass_through(self) -> None:
        """Write the stream before every layer, and the logits at the end."""
        star, decodes = self.decodes.star(), self.decodes
        drawn = [example for example in decodes.read(EXAMPLES) if example.image]
        every = max(1, len(drawn) // self.images)
        stream = drawn[::every][: self.images]
        with torch.inference_mode():
            for name, layer in decodes.layers():
                decodes.write(_before(name, layer), stream)
                decoder = getattr(star, name)
                with resident(decoder.layers[layer]):
                    stream = _through(decoder, layer, stream)
            logits = self._logits(star, stream)
        save_tensors({str(i): torch.from_numpy(found) for i, found in enumerate(logits)}, self._draws())

    def _measure(self, at: int) -> None:
        """Write the divergences of the layer with the number `at` among those of both decoders."""
        star, decodes = self.decodes.star(), self.decodes
        (name, layer), *after = decodes.layers()[at:]
        decoder, stream = getattr(star, name), decodes.read(_before(name, layer))
        block = decoder.layers[layer]
        found: dict[str, list[Example]] = {}
        with torch.inference_mode():
            with resident(block):
                for format in MEASURED:
                    self._round(block, f"{name}.layers.{layer}", format)
                    found[format] = _through(decoder, layer, stream)
            for i, (later, number) in enumerate(after):
                decodes.progress(f"layers after {name} layer {layer}", i, len(after))
                decoder = getattr(star, later)
                with resident(decoder.layers[number]):
                    found = {format: _through(decoder, number, ours) for format, ours in found.items()}
            kl = {format: self._kl(self._logits(star, ours)) for format, ours in found.items()}
        self._measured(name, layer).write_text(json.dumps(kl, allow_nan=False))

    def _round(self, block: nn.Module, prefix: str, format: str) -> None:
        """Give `block`, whose weights are in memory, those of the checkpoint as `format` stores them."""
        for key, module in block.named_modules():
            if isinstance(module, nn.Linear):
                weight = f"{prefix}.{key}.weight"
                stored = EQUAL_LAYERS[format].rounded(weight, self.decodes.tensors[weight].load())
                module.weight = nn.Parameter(stored, requires_grad=False)

    def _logits(self, star: FoldedStar, stream: list[Example]) -> list[np.ndarray]:
        """The guided logits float32 [T, V] of each image."""
        tokens, guidance = self.decodes.config.vq.image_tokens, self.decodes.model.sampling.generate.guidance
        with resident(star.image_head):
            heads = [star.image_head(example.embeds[:, -tokens:]).float() for example in stream]
        return [tasks.guide(logits, guidance)[0].numpy() for logits in heads]

    def _kl(self, logits: list[np.ndarray]) -> float:
        """The mean over all tokens of the divergence from the checkpoint's draws."""
        settings, drawn = self.decodes.model.sampling.generate, load_file(self._draws())
        means = []
        for i, ours in enumerate(logits):
            top_k = min(settings.top_k, ours.shape[-1])
            first = drawn[str(i)].numpy()
            means.append(divergence(ours, first, top_k=top_k, top_p=settings.top_p).kl.mean())
        return float(np.mean(means))


def images_of(image_tokens: int) -> int:
    """How many images of so many tokens have TOKENS together."""
    return -(-TOKENS // image_tokens)


def _before(name: str, layer: int) -> str:
    return f"before {name}.layers.{layer}"


def _through(decoder: Decoder, layer: int, stream: list[Example]) -> list[Example]:
    """Pass the stream through one layer; the last one of a decoder applies its norm too."""
    found = []
    for example in stream:
        rows, length, _ = example.embeds.shape
        shape = (rows, decoder.config.num_kv_heads, length, decoder.config.head_dim)
        cache = [(torch.zeros(shape), torch.zeros(shape))]
        start = torch.zeros(rows, dtype=torch.int64)
        hidden, _ = decoder(example.embeds, example.positions, start, cache, range(layer, layer + 1))
        found.append(replace(example, embeds=hidden))
    return found
