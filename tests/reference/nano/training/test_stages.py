"""Every stage of the language model can learn a batch by heart, and changes only the parts that it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reference.nano import recipe
from reference.nano.benchmark.painter import images_of
from reference.nano.checkpoint.tokens import Rows
from reference.nano.recipe import STAGES
from reference.nano.training import stage_image
from reference.nano.training.batches import (
    base_batch,
    edit_batch,
    generate_batch,
)
from reference.nano.training.cells import (
    empty_cells,
    image_from_scenes,
)
from reference.nano.training.stage_base import base_job
from reference.nano.training.stage_eyes import eyes_batch, eyes_job
from reference.nano.training.stage_vq import (
    background_ids,
)
from reference.nano.world.scorer import Reading, read
from reference.nano.world.world import COLORS
from reference.weights import load_star, resolve_checkpoint
from tests.helpers.small_star import overfit, small_star


def test_the_base_learns_a_batch_by_heart(small_root: Path) -> None:
    star, rows = small_star(small_root)
    batch = base_batch(0, rows=rows, batch=12)
    found = overfit(base_job(star, rows, STAGES["base"]), [batch], steps=80, rate=4e-3)
    assert found[0]["asked"] < 0.3 and found[-1]["asked"] > 0.95 and found[-1]["worded"] > 0.95


def test_the_eyes_learn_a_batch_by_heart(small_root: Path) -> None:
    star, _ = small_star(small_root)
    before = {name: tensor.clone() for name, tensor in star.state_dict().items()}
    job = eyes_job(star, STAGES["eyes"], torch.device("cpu"))
    found = overfit(job, [eyes_batch(0, batch=8)], steps=200, rate=2e-3)
    assert found[0]["shape"] < 0.5 and all(
        found[-1][name] > 0.9 for name in ("shape", "color", "size", "background")
    )
    assert found[-1]["offset"] < 0.15 < found[0]["offset"]
    moved = {
        name.split(".")[0]
        for name, tensor in star.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert moved == {"vision_encoder"}


def test_heads_are_asked_of_the_given_image(small_root: Path) -> None:
    """Of where its tokens are and what it shows, and what the instruction means by it."""
    star, rows = small_star(small_root)
    job, batch = stage_image.edit_job(star, rows, STAGES["edit"]), edit_batch(0, rows=rows, batch=4)
    assert torch.equal(
        batch["prompt_ids"].gather(1, batch["given"]),
        torch.full((1, recipe.IMAGE_TOKENS), star.config.special.vision_pad),
    )
    with torch.no_grad():
        losses = job.losses(batch, 0)
        for name, part in {
            "placed": "given",
            "there": "given_offsets",
            "meant": "meant",
            "touched": "touched",
        }.items():
            other = batch | {part: batch[part].flip(0 if part == "meant" else 1)}
            changed = {key for key, value in job.losses(other, 0).items() if abs(value - losses[key]) > 1e-4}
            assert name in changed and changed <= {name, "loss", "hit"}
    parts = {name: float(losses["edited" if name == "tokens" else name]) for name in stage_image.WEIGHTS}
    assert float(losses["loss"]) == pytest.approx(
        sum(weight * parts[name] for name, weight in stage_image.WEIGHTS.items()), rel=1e-4
    )


def test_instructions_share_their_image(small_root: Path) -> None:
    """Four instructions behind one image give what each gives in a row of its own."""
    star, rows = small_star(small_root)
    job, batch = stage_image.edit_job(star, rows, STAGES["edit"]), edit_batch(1, rows=rows, batch=8)
    own = dict(batch)
    for name in ("prompt_ids", "before_things", "before_backgrounds", "given"):
        own[name] = batch[name].repeat_interleave(4, 0)
    own["prompt_positions"] = batch["prompt_positions"].repeat_interleave(4, 1)
    assert len(batch["prompt_ids"]) == 2 and len({tuple(row) for row in batch["input_ids"].tolist()}) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            stage_image, "drawn", lambda batch, step, stream=0: image_from_scenes(batch, noise=None)
        )
        with torch.no_grad():
            shared = job.losses(batch, 0)
            patch.setattr(stage_image, "EDITS_PER_IMAGE", 1)
            alone = job.losses(own, 1)
    for name, value in shared.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-3, atol=1e-4)


def test_ids_of_batches_that_come_again_are_found_once(
    small_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    star, rows = small_star(small_root)
    asked, ids_of = [], stage_image.ids_of
    monkeypatch.setattr(
        stage_image, "ids_of", lambda star, image: asked.append(len(image)) or ids_of(star, image)
    )
    job, batch = stage_image.edit_job(star, rows, STAGES["edit"]), edit_batch(0, rows=rows, batch=4)
    with torch.no_grad():
        first, again = job.losses(batch, 0), job.losses(batch, 0)
        assert asked == [4, 1] and all(torch.equal(first[name], again[name]) for name in first)
        job.losses(batch, 1)
    assert asked == [4, 1] * 2


def test_empty_background_is_painted_with_one_id_of_each_colour(nano_rows: Rows) -> None:
    """With the shipped weights: whatever the encoder says of an empty token; everything else as it says."""
    star = load_star(resolve_checkpoint("nano"))
    backgrounds = background_ids(star)
    with torch.no_grad():
        bare = images_of(star.vq_decoder(backgrounds[:, None].expand(-1, recipe.IMAGE_TOKENS)))
    assert [read(image) for image in bare] == [Reading(color, ()) for color in COLORS]
    batch = generate_batch(0, rows=nano_rows, batch=6, stage="generate")
    natural, painted = (
        stage_image.ids_of(star, image_from_scenes(batch, noise=None)),
        stage_image.painted_ids(star, backgrounds, batch),
    )
    empty = empty_cells(batch).flatten(1) == 1
    assert torch.equal(painted[~empty], natural[~empty]) and (natural[empty] != painted[empty]).any()
    for row, ids, found in zip(batch["classes"][:, 0, 3], painted, empty):
        assert set(ids[found].tolist()) == {int(backgrounds[row])} and len(set(ids[~found].tolist())) > 1


def test_generation_and_editing_learn_a_batch_by_heart(
    small_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches in turn, one drawn and one edited,
    with the base frozen and without noise, so that images repeat."""
    star, rows = small_star(small_root)
    before = {name: tensor.clone() for name, tensor in star.state_dict().items()}
    batches = [edit_batch(0, rows=rows, batch=4), generate_batch(1, rows=rows, batch=2, stage="edit")]
    monkeypatch.setattr(
        stage_image, "drawn", lambda batch, step, stream=0: image_from_scenes(batch, noise=None)
    )
    job = stage_image.edit_job(star, rows, STAGES["edit"])
    assert {id(p) for p in job.waiting} == {
        id(p) for name in stage_image.DRAWING_PARTS for p in star.get_submodule(name).parameters()
    }
    found = overfit(job, batches, steps=150, rate=4e-3)
    assert found[0]["loss"] > 3 and found[-1]["right"] > 0.85 and found[-2]["right"] > 0.85
    assert "edited" in found[-2] and "drawn" in found[-1]
    assert all(
        losses["foreseen"] > 0.9 > found[0]["foreseen"] and losses["placed"] < 0.5 < found[0]["placed"]
        for losses in found[-2:]
    )
    assert found[-2]["copied"] < 0.2 < found[0]["copied"] and "copied" not in found[-1]
    assert (
        found[-2]["found"] > 0.9 > found[0]["found"]
        and found[-2]["hit"] > 0.9
        and found[-2]["meant"] < 0.5 < found[0]["meant"]
    )
    moved = {
        name.split(".")[0]
        for name, tensor in star.state_dict().items()
        if not torch.equal(tensor, before[name])
    }
    assert moved == set(stage_image.DRAWING_PARTS)


def test_a_new_image_head_points_at_entries(small_root: Path) -> None:
    """Whatever the stack says, similar entries are about equally probable,
    and embeddings of image tokens are large."""
    star, _ = small_star(small_root)
    stage_image.start_from_codebook(star)
    entries = star.codebook.weight
    logits = star.image_head(
        torch.randn(50, recipe.HIDDEN, generator=torch.Generator().manual_seed(3))
    )  # [n, K]
    apart = torch.cdist(entries, entries)
    nearest_one, farthest = (apart + 1e9 * torch.eye(len(apart))).argmin(1), apart.argmax(1)
    assert (logits[:, nearest_one] - logits).abs().mean() < 0.5 * (logits[:, farthest] - logits).abs().mean()
    made = star.image_embedding(torch.arange(len(entries))).detach()
    assert float((made - made.mean(0)).square().mean().sqrt()) == pytest.approx(
        stage_image.EMBEDDED, rel=1e-3
    )


def test_the_stack_starts_as_the_bases_last_layers(small_root: Path) -> None:
    star, _ = small_star(small_root)
    stage_image.stack_from_base(star)
    for ours, base in zip(star.stacked_ar.layers, star.base_ar.layers, strict=True):
        assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in ours.state_dict().items())
