"""An image loop on a toy model of whole numbers, in numpy on the host or as kernels on the device: what shows
the loop on the device, graphs included, where there is no TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engines.bundle.manifest import ComponentSpec, TensorSpec
from engines.bundle.tensors import check_binding
from engines.runtime.decode import ImageLoop
from engines.sessions.array_buffer import ArrayBuffer
from engines.sessions.device_loop import SOURCE, THREADS, DeviceBuffer
from engines.tensorrt import nvrtc

HIDDEN, CODEBOOK = 8, 256  # at most THREADS each
PROMPT_TOKENS, CAPACITY_TOKENS = 5, 80
KERNELS = ("toy_decoder", "toy_head")


def _caches(side: str) -> tuple[TensorSpec, ...]:
    return (TensorSpec(f"{side}.0.key", "float32", ("B", 1, "C", HIDDEN)),)


DECODER = ComponentSpec(
    "toy decoder",
    None,
    "none",
    inputs=(
        TensorSpec("inputs_embeds", "float32", ("B", "S", HIDDEN)),
        TensorSpec("position_ids", "int64", (3, "B", "S")),
        TensorSpec("write_indices", "int64", ("B",)),
        *_caches("past_key_values"),
    ),
    outputs=(TensorSpec("hidden_states", "float32", ("B", "S", HIDDEN)), *_caches("present")),
)
HEAD = ComponentSpec(
    "toy head",
    None,
    "none",
    inputs=(
        TensorSpec("hidden_states", "float32", ("2N", "S", HIDDEN)),
        TensorSpec("guidance", "float32", (1,)),
        TensorSpec("top_k", "int64", (1,)),
        TensorSpec("top_p", "float32", (1,)),
        TensorSpec("noise", "float32", ("N", "S", CODEBOOK)),
    ),
    outputs=(
        TensorSpec("image_ids", "int64", ("N", "S")),
        TensorSpec("inputs_embeds", "float32", ("2N", "S", HIDDEN)),
        TensorSpec("logits", "float32", ("N", "S", CODEBOOK)),  # the toy leaves them zero
    ),
)


def embeds_from_ids(ids: np.ndarray) -> np.ndarray:
    """ids [N, S] -> rows float32 [N, S, H]."""
    columns = np.arange(HIDDEN)
    return ((ids[..., None] * (columns + 3) + columns) % 29).astype(np.float32)


def decode_on_host(t: Mapping[str, np.ndarray]) -> None:
    """The decoder, on arrays by name: the caches and `hidden_states` are written."""
    new, cache = t["inputs_embeds"], t["past_key_values.0.key"]
    for row, at in enumerate(t["write_indices"]):
        end = at + new.shape[1]
        cache[row, 0, at:end] = new[row]
        sums = cache[row, 0, :end].astype(np.int64).cumsum(0)[at:]
        places = t["position_ids"][0, row, :, None]
        t["hidden_states"][row] = (3 * sums + places + np.arange(HIDDEN)) % 31


def draw_on_host(t: Mapping[str, np.ndarray]) -> None:
    """The head, on arrays by name: `image_ids` and `inputs_embeds` are written."""
    hidden, ids = t["hidden_states"].astype(np.int64), np.arange(CODEBOOK)
    state = (hidden[::2] * np.arange(1, HIDDEN + 1) + hidden[1::2]).sum(-1)[..., None]  # [N, S, 1]
    scores = t["noise"] + ((state * (ids + 1) + 7 * ids) % 11 * 0.25).astype(np.float32)
    t["image_ids"][...] = scores.argmax(-1)
    t["inputs_embeds"][...] = embeds_from_ids(t["image_ids"]).repeat(2, axis=0)


class HostSession:
    """A component in numpy, on host memory."""

    capacity_tokens = prefill_tokens = None
    buffer = staticmethod(ArrayBuffer)

    def __init__(self, spec, compute):
        self.spec, self._compute = spec, compute

    def bind(self, tensors):
        """A step that computes on `tensors`. Raises InputError where they do not match the spec."""
        check_binding(self.spec, tensors)
        return lambda: self._compute({name: buffer.array for name, buffer in tensors.items()})


class Embedding:
    """The table of image embeddings, which is on the host for every backend."""

    capacity_tokens = prefill_tokens = None
    buffer = staticmethod(ArrayBuffer)

    def bind(self, tensors):
        """A step that writes the rows of the ids."""
        return lambda: tensors["inputs_embeds"].write(embeds_from_ids(tensors["image_ids"].read()))


class DeviceSession:
    """A component as a kernel, on device memory."""

    capacity_tokens = prefill_tokens = None
    buffer = staticmethod(DeviceBuffer)

    def __init__(self, spec: ComponentSpec, kernel: nvrtc.Kernel):
        self.spec, self._kernel = spec, kernel

    def bind(self, tensors):
        """A step that enqueues the kernel on `tensors`. Raises InputError where they do not match the
        spec.
        """
        check_binding(self.spec, tensors)
        head = self.spec is HEAD
        source, to = ("hidden_states", "inputs_embeds") if head else ("inputs_embeds", "hidden_states")
        rows, places, _ = tensors[source].shape
        capacity = 0 if head else tensors["past_key_values.0.key"].shape[2]
        names = ("write_indices", "position_ids", source, "past_key_values.0.key", to, "noise", "image_ids")
        addresses = [tensors[name].address if name in tensors else 0 for name in names]
        sizes = [rows, places, HIDDEN, capacity, CODEBOOK, 0, 0, 0, 0]
        fields = np.array([*sizes, *addresses], np.uint64)  # Toy in toy.cu
        blocks = (places, rows // 2) if head else (rows, 1)

        def step(keep: object = tensors) -> None:
            self._kernel.launch(fields, blocks=blocks, threads=THREADS)

        return step

    def capturable(self) -> bool:
        """As a TensorRT session's: a kernel can always be captured."""
        return True


def host_sessions() -> list:
    """base_ar, stacked_ar, image_head and image_embedding in numpy."""
    decoders = [HostSession(DECODER, decode_on_host) for _ in range(2)]
    return [*decoders, HostSession(HEAD, draw_on_host), Embedding()]


def source_in(folder: Path) -> Path:
    """The CUDA source of the kernels, written to `folder`."""
    source = folder / "loop_and_toy.cu"
    source.write_text(SOURCE.read_text() + Path(__file__).with_suffix(".cu").read_text())
    return source


def device_sessions(folder: Path) -> list:
    """The same as kernels, compiled through a source in `folder`. Raises what `kernels_from_source` does."""
    decoder, head = nvrtc.kernels_from_source(source_in(folder), *KERNELS)
    return [*(DeviceSession(DECODER, decoder) for _ in range(2)), DeviceSession(HEAD, head), Embedding()]


def loop_on(sessions: list, *, images: int, window: int, tokens: int) -> ImageLoop:
    """The runtime's loop on these sessions."""
    sizes = {"num_images": images, "tokens": tokens, "window": window}
    return ImageLoop(*sessions, capacity_tokens=CAPACITY_TOKENS, **sizes)


def prompt(images: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs_embeds [2N, L, H], position_ids [3, 2N, L]) of a prompt that is another for each row."""
    rows = 2 * images
    ids = np.arange(rows * PROMPT_TOKENS).reshape(rows, PROMPT_TOKENS)
    places = np.broadcast_to(np.arange(PROMPT_TOKENS), (3, rows, PROMPT_TOKENS))
    return embeds_from_ids(ids), np.ascontiguousarray(places)
