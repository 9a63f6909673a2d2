"""The examples of an export in its scratch folder, and the streams that layers make of them.

Both the calibration and the measurement of layers begin with the same examples, so these are decoded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from engines.bundle.manifest import ModelSpec
from engines.inputs.prompt import Chat
from engines.progress import Progress
from reference.config import StarConfig
from reference.containers import LazyTensor

from ..golden.oracle import streamed_star
from ..graph.precisions import DECODERS, PRECISIONS
from ..graph.wrappers import FoldedStar
from ..tensor_files import save_tensors
from .examples import Example, Material, decoded

EXAMPLES = "examples"
DECODE = "decode the examples"  # the name of the step


@dataclass(frozen=True)
class Decodes:
    """What is decoded, and the `folder` for it. `tensors` are the checkpoint's, and stay as they are."""

    folder: Path
    config: StarConfig
    tensors: Mapping[str, LazyTensor]
    rope_bf16: bool
    chat: Chat
    model: ModelSpec
    material: Material
    progress: Progress

    def star(self) -> FoldedStar:
        """The reference with the weights of the checkpoint, which it reads while it runs."""
        return streamed_star(self.config, self.tensors, PRECISIONS["fp32"], rope_bf16=self.rope_bf16)

    def layers(self) -> list[tuple[str, int]]:
        """Decoder and number of every layer, in the order in which the stream passes them."""
        return [(name, i) for name in DECODERS for i in range(getattr(self.config, name).num_layers)]

    def decode(self) -> None:
        """Write the stream `examples`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sampling = self.model.sampling.generate
        made = decoded(self.star(), self.chat, self.model, self.material, sampling, self.progress)
        self.write(EXAMPLES, made)

    def path(self, what: str, kind: str = "stream", suffix: str = "safetensors") -> Path:
        """The file of that kind that belongs to a layer or to the examples."""
        return self.folder / f"{what}.{kind}.{suffix}"

    def write(self, name: str, examples: list[Example]) -> None:
        """Write the stream `name`."""
        tensors: dict[str, Tensor] = {}
        for i, example in enumerate(examples):
            kind = f"{i}.{'image' if example.image else 'text'}"
            tensors |= {f"{kind}.embeds": example.embeds, f"{kind}.positions": example.positions}
            if example.exact is not None:
                tensors[f"{kind}.exact"] = example.exact
        save_tensors({key: value.contiguous() for key, value in tensors.items()}, self.path(name))

    def read(self, name: str) -> list[Example]:
        """Read the stream `name`, in the order in which it was written."""
        found, tensors = [], load_file(self.path(name))
        for key in sorted((k for k in tensors if k.endswith(".embeds")), key=lambda k: int(k.split(".")[0])):
            kind = key.removesuffix(".embeds")
            positions, exact = tensors[f"{kind}.positions"], tensors.get(f"{kind}.exact")
            found.append(Example(tensors[key], positions, kind.endswith("image"), exact))
        return found
