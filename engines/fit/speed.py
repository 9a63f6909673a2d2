"""How fast it can be: the bytes that a decode step must read, over a memory bandwidth.

That is a lower bound of the time. What was measured is a share of it, and stands in `MEASURED` with the
command that printed it (docs/figures.md has the whole record).
"""

from __future__ import annotations

from dataclasses import dataclass

from .sizes import Sizes

CPU = "cpu"  # the host's CPU, beside the names of `engines.targets.TARGETS`


@dataclass(frozen=True)
class Measured:
    """A decode step that was measured on `device`.

    `share` is the time at the bandwidth limit over the time measured, and `bandwidth_bytes_per_s` the
    bandwidth that this limit refers to. It holds for models of this `hidden_size` only.
    """

    device: str
    hidden_size: int
    precision: str
    share: float
    bandwidth_bytes_per_s: float
    executor: str
    command: str


_H200 = "python -m tests.gpu --steps real_widths"
_GRAPH = "ONNX Runtime with a CUDA graph"
MEASURED = (
    Measured("h200", 2048, "bf16", 0.24, 4.20e12, _GRAPH, _H200),
    Measured("h200", 3584, "bf16", 0.44, 4.16e12, _GRAPH, _H200),
)


@dataclass(frozen=True)
class Times:
    """Milliseconds per image token and per token of an answer, and seconds per image."""

    image_token_ms: float
    answer_token_ms: float
    image_s: float


def image_step_bytes(sizes: Sizes, *, rows: int, filled_tokens: int) -> int:
    """Bytes that a step of one image token must read: weights, and the filled part of the caches.

    The head's file also holds the table of image embeddings, of which a step reads a row per image.
    """
    model = sizes.model
    table = model.codebook_size * model.hidden_size * sizes.cache_item_bytes
    weights = sum(sizes.weights.get(name, 0) for name in ("base_ar", "stacked_ar", "image_head"))
    return weights - table + _caches(sizes, ("base_ar", "stacked_ar"), rows, filled_tokens)


def answer_step_bytes(sizes: Sizes, *, filled_tokens: int) -> int:
    """The same for a step of one token of an answer."""
    weights = sum(sizes.weights.get(name, 0) for name in ("base_ar", "text_head"))
    return weights + _caches(sizes, ("base_ar",), 1, filled_tokens)


def times_at(sizes: Sizes, bandwidth_bytes_per_s: float, *, rows: int, prompt_tokens: int) -> Times:
    """The times at which the bandwidth is used fully, caches filled as on average over an image.

    An image takes one step per token and reads the VQ decoder once; a prefill counts as a step, although it
    may be bound by arithmetic instead.
    """
    filled = prompt_tokens + sizes.model.image_tokens // 2
    step = image_step_bytes(sizes, rows=rows, filled_tokens=filled)
    image = sizes.model.image_tokens * step + sizes.weights.get("vq_decoder", 0)
    answer = answer_step_bytes(sizes, filled_tokens=filled)
    return Times(
        image_token_ms=step / bandwidth_bytes_per_s * 1e3,
        answer_token_ms=answer / bandwidth_bytes_per_s * 1e3,
        image_s=image / bandwidth_bytes_per_s,
    )


def measured_on(device: str, sizes: Sizes) -> Measured | None:
    """What was last measured on `device` with a model of this width and precision; None if nothing was."""
    for entry in MEASURED:
        if (entry.device, entry.hidden_size, entry.precision) == (
            device,
            sizes.model.hidden_size,
            sizes.precision,
        ):
            return entry
    return None


def _caches(sizes: Sizes, decoders: tuple[str, ...], rows: int, tokens: int) -> int:
    return sum(sizes.cache_bytes(name, rows=rows, capacity_tokens=tokens) for name in decoders)
