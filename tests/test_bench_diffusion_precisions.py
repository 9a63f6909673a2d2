"""The overflow audit sees what is inside each block, and finds a number that fp16 does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reference.diffusion import tasks
from reference.model import Star
from reference.weights import load_star, resolve_checkpoint
from tests.helpers.magnitudes import ATTENDED, COLUMNS, INNER, LOGITS, PASSED, STREAM, Magnitudes, observed
from tests.helpers.official_diffusion import arrays, golden
from tests.helpers.paintings import PARTS, official, paint


@pytest.fixture
def star(diffusion_checkpoint: Path) -> Star:
    return load_star(resolve_checkpoint(str(diffusion_checkpoint)))


def test_every_block_of_every_part_is_seen_in_every_place_that_it_has(star: Star) -> None:
    with observed(star, PARTS) as seen:
        for given in official(("edit0",)):
            paint(star, given, {})
    layers = [f"text_encoder.layers.{i}" for i in range(3)] + [f"dit.layers.{i}" for i in range(3)]
    refiners = [f"dit.{kind}_refiner.{i}" for kind in ("noise", "context") for i in range(2)]
    for block in layers + refiners:
        assert seen.found[block].keys() == set(COLUMNS), block
    for part in ("vae_encoder", "vae_decoder"):
        assert seen.found[f"{part}.mid_block.attentions.0"].keys() == {STREAM, ATTENDED, LOGITS}
        assert seen.found[f"{part}.mid_block.resnets.0"].keys() == {STREAM, INNER, PASSED}
    assert {block.partition(".")[0] for block in seen.found} == set(PARTS)
    stream = seen.found["dit.layers.0"][STREAM]
    assert stream >= abs(arrays()["t2i0.trace.layer0"]).max() / 3  # of the same size as in another case
    assert all(0 < value < 448 for row in seen.found.values() for value in row.values())


@torch.inference_mode()
def test_a_number_that_fp16_does_not_hold_is_found_in_its_block_and_place(star: Star) -> None:
    ids = golden("t2i0.prompt_ids")[None]
    star.text_encoder.layers[1].mlp.up_proj.weight.mul_(
        1e5
    )  # the norm behind the MLP hides it from the stream
    with observed(star, ("text_encoder",)) as seen:
        caption = tasks.encode_text(star.text_embedding, star.text_encoder, ids)
    assert caption.isfinite().all()
    large = {
        (block, column) for block, row in seen.found.items() for column, value in row.items() if value > 65504
    }
    assert large == {("text_encoder.layers.1", INNER), ("text_encoder.layers.1", PASSED)}
    star.half()
    assert not tasks.encode_text(star.text_embedding, star.text_encoder, ids).isfinite().all()


def test_what_is_not_finite_counts_as_infinite() -> None:
    seen = Magnitudes()
    seen.see("part.block", STREAM, torch.tensor([1.0, float("nan")]))
    seen.see("part.block", STREAM, torch.tensor([2.0]))
    assert seen.largest("part")[STREAM] == float("inf")
