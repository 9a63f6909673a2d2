"""The largest magnitudes inside the diffusion decoder's blocks, observed while the reference runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.diffusion import dit, text_encoder, vae
from reference.model import Star

STREAM, ATTENDED, LOGITS, INNER, PASSED = "residual stream", "attention", "logits", "inner", "ffn"
COLUMNS = (STREAM, ATTENDED, LOGITS, INNER, PASSED)
BLOCKS = (text_encoder.TextLayer, dit.ContextBlock, dit.ModulatedBlock, vae.ResnetBlock, vae.AttentionBlock)
# Place within a block -> the column, and whether it is the module's input or its output that is meant.
PLACES = {
    "": (STREAM, False),
    "self_attn": (ATTENDED, False),
    "attn": (ATTENDED, False),
    "to_out.0": (ATTENDED, False),
    "mlp.down_proj": (INNER, True),
    "feed_forward.linear_2": (INNER, True),
    "conv1": (INNER, False),
    "mlp": (PASSED, False),
    "feed_forward": (PASSED, False),
    "conv2": (PASSED, False),
}


class Magnitudes:
    """Block -> column -> the largest magnitude so far."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.block = ""

    def see(self, block: str, column: str, value: Tensor) -> None:
        """Keep the largest magnitude of `value`; one that is not finite counts as infinite."""
        largest = value.detach().abs().amax()
        found = float(largest) if largest.isfinite() else float("inf")
        row = self.found.setdefault(block, {})
        row[column] = max(found, row.get(column, 0.0))

    def largest(self, part: str) -> dict[str, float]:
        """Column -> the largest magnitude in all blocks of `part`."""
        rows = [row for block, row in self.found.items() if block.startswith(f"{part}.")]
        return {column: max((row.get(column, 0.0) for row in rows), default=0.0) for column in COLUMNS}


@contextlib.contextmanager
def observed(star: Star, parts: tuple[str, ...]) -> Iterator[Magnitudes]:
    """Observe all blocks of `parts` while the context lasts."""
    seen, handles = Magnitudes(), []
    for part in parts:
        for block, module in star.get_submodule(part).named_modules(prefix=part):
            if isinstance(module, BLOCKS):
                handles += _hooks(seen, block, module)
    try:
        with mock.patch.object(F, "scaled_dot_product_attention", _attention_seen_by(seen)):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _hooks(seen: Magnitudes, block: str, module: nn.Module) -> list:
    def entered(*_) -> None:
        seen.block = block

    handles: list = [module.register_forward_pre_hook(entered)]
    for place, inner in module.named_modules():
        if place in PLACES:
            column, takes = PLACES[place]

            def hook(_, given, output, column=column, takes=takes) -> None:
                seen.see(block, column, given[0] if takes else output)

            handles.append(inner.register_forward_hook(hook))
    if isinstance(module, vae.AttentionBlock):  # its scores are multiplied before they are scaled
        made: dict[str, Tensor] = {}

        def query(_, given, output) -> None:
            made["query"] = output

        def key(_, given, output) -> None:
            for rows in made.pop("query").split(1024, dim=1):
                seen.see(block, LOGITS, rows @ output.transpose(1, 2))

        handles += [module.to_q.register_forward_hook(query), module.to_k.register_forward_hook(key)]
    return handles


def _attention_seen_by(seen: Magnitudes) -> Callable:
    """Attention that shows its scores, scaled, one head at a time."""
    attention = F.scaled_dot_product_attention

    def run(query: Tensor, key: Tensor, value: Tensor, **options) -> Tensor:
        scale = options.get("scale") or query.shape[-1] ** -0.5
        group = query.shape[1] // key.shape[1]
        for head in range(query.shape[1]):
            scores = query[:, head] @ key[:, head // group].transpose(-1, -2)
            seen.see(seen.block, LOGITS, torch.as_tensor(scores * scale))
        return attention(query, key, value, **options)

    return run
