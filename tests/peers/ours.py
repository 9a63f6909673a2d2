"""STAR-Nano's base AR and text head beside optimum's export of them: python -m tests.peers.ours

The reference in PyTorch, and the fp32 bundle on ONNX Runtime, decode the recorded prompt; both are compared
with the recorded arrays (`oracle.py`), for both roundings of the rotary frequencies.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from engines.bundle.reader import Bundle
from engines.inputs.prompt import text_positions
from engines.runtime.kv_cache import Slots, cache_buffers
from engines.runtime.prefill import run_chunks
from engines.sessions import open_session, run
from reference import tasks
from reference.model import Star
from reference.weights import load_star, resolve_checkpoint
from star_export.exporter.export import export

from . import oracle

COMPONENTS = ["token_embedding", "base_ar", "text_head"]


def star_of(rope: str) -> Star:
    """The reference with STAR-Nano's weights."""
    return load_star(resolve_checkpoint("nano"), rope_bf16=rope == "bf16")


def bundle_of(rope: str, out: Path) -> Bundle:
    """STAR-Nano's text decoder as an fp32 bundle, by the command's own function."""
    return Bundle.open(export("nano", out=out, rope_bf16=rope == "bf16", components=COMPONENTS))


def reference_step(star: Star, *, capacity_tokens: int) -> oracle.Step:
    """A step of the reference, on a cache of its own, in the type of its weights."""
    cache = star.base_ar.new_cache(1, capacity_tokens=capacity_tokens)

    def step(ids: np.ndarray, first: int) -> np.ndarray:
        embeds = star.token_embedding(torch.from_numpy(ids)[None])
        positions = torch.arange(first, first + len(ids)).expand(3, 1, -1)
        hidden = tasks.decode(star.base_ar, embeds, positions, first, cache)
        return star.text_head(hidden)[0].float().numpy()

    return step


def bundle_step(bundle: Bundle, *, capacity_tokens: int) -> oracle.Step:
    """A step of the bundle's components on ONNX Runtime, on a cache of its own."""
    embedding, base, head = (open_session(bundle, name) for name in COMPONENTS)
    caches = cache_buffers(base, rows=1, capacity_tokens=capacity_tokens)
    slots = Slots(capacity_tokens)

    def step(ids: np.ndarray, first: int) -> np.ndarray:
        slots.rewind(first)
        embeds = run(embedding, {"input_ids": ids[None]})["inputs_embeds"]
        positions = text_positions(1, first + len(ids))[:, :, first:]
        (hidden,) = run_chunks([(base, caches)], embeds, positions, slots)
        rows = np.ascontiguousarray(hidden.read()[0][:, None])  # [S, 1, H]: the head takes a position per row
        return run(head, {"hidden_states": rows})["logits"]

    return step


def main() -> int:
    prompt, failed = oracle.oracle_prompt(), False
    capacity = len(prompt) + oracle.NEW_TOKENS
    recorded = ", ".join(f"{name} {number}" for name, number in sorted(oracle.oracle_versions().items()))
    print(f"recorded by {recorded}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for rope in oracle.ROPES:
            steps = {
                "reference": reference_step(star_of(rope), capacity_tokens=capacity),
                "reference, float64": reference_step(star_of(rope).double(), capacity_tokens=capacity),
                "fp32 bundle": bundle_step(bundle_of(rope, Path(folder) / rope), capacity_tokens=capacity),
            }
            for name, step in steps.items():
                compared = oracle.against_oracle(oracle.decoded(step, prompt), rope)
                print(oracle.line_of(f"{name} against optimum, --rope {rope}", compared), flush=True)
                failed |= not all(result.passed for result in compared)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
