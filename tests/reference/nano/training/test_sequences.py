"""A whole sequence computes what the cache computes, and what inference sees; padding changes nothing."""

from __future__ import annotations

from pathlib import Path

import torch

from reference import tasks
from reference.decoder import kv_cache_attention
from reference.model import Star
from reference.nano import recipe
from reference.nano.recipe import STAGES
from reference.nano.training import stage_image
from reference.nano.training.batches import (
    edit_batch,
    generate_batch,
)
from reference.nano.training.sequences import through
from tests.helpers.small_star import small_star


def test_whole_sequences_compute_what_the_cache_computes(small_root: Path) -> None:
    star, _ = small_star(small_root)
    cached = Star(star.config, attention=kv_cache_attention)
    cached.load_state_dict(star.state_dict())
    embeds = torch.randn(3, 9, recipe.HIDDEN, generator=torch.Generator().manual_seed(1))
    positions = torch.randint(0, 40, (3, 3, 9), generator=torch.Generator().manual_seed(2))
    expected = tasks.decode(
        cached.base_ar, embeds, positions, 0, cached.base_ar.new_cache(3, capacity_tokens=9)
    )
    torch.testing.assert_close(
        through(star.base_ar, embeds, positions)[0][-1], expected, rtol=1e-4, atol=1e-5
    )


def test_padding_changes_nothing_before_it(small_root: Path) -> None:
    star, rows = small_star(small_root)
    batch = generate_batch(3, rows=rows, batch=4, stage="generate")
    job = stage_image.generate_job(star, rows, STAGES["generate"])
    loss = job.losses(batch, 0)["loss"]
    longer = batch | {
        "input_ids": torch.cat([batch["input_ids"], torch.full((4, 5), 7)], 1),
        "position_ids": torch.cat([batch["position_ids"], torch.full((3, 4, 5), 300)], 2),
    }
    torch.testing.assert_close(job.losses(longer, 0)["loss"], loss, rtol=1e-3, atol=1e-4)


def test_training_samples_are_what_inference_sees(small_root: Path) -> None:
    """Teacher forcing on the drawn tokens gives the logits that drawing them gave, for a prompt and for an
    edit.

    The edit also shows that positions are right.
    """
    star, rows = small_star(small_root)
    cached = Star(star.config)
    cached.load_state_dict(star.state_dict())
    row = rows.edit("make the circle red", image_tokens=64, merged_patches=16)
    batch = edit_batch(0, rows=rows, batch=4)
    positions = tasks.mrope_position_ids(torch.tensor(row + [0] * 63), [(4, 4)], star.config.special)
    ids = torch.tensor([row, row])
    given = stage_image.given_tensors(star, batch, 0)
    embeds = stage_image.with_images(star, ids[:1], given["given_ids"].long(), given["vision"])
    embeds = embeds.repeat(2, 1, 1)
    made = tasks.generate(
        cached,
        ids,
        guidance=1.0,
        top_k=1,
        top_p=1.0,
        noise=None,
        inputs_embeds=embeds,
        position_ids=tasks.mrope_position_ids(ids[0], [(4, 4)], star.config.special, trailing=64),
    )
    fed = torch.cat([embeds[:1], star.image_embedding(made.image_ids[:, :-1])], dim=1)
    hidden = through(star.stacked_ar, through(star.base_ar, fed, positions)[0][-1], positions)[0][-1]
    logits = star.image_head(hidden[0, len(row) - 1 :])
    torch.testing.assert_close(logits, made.cfg_logits[:, 0], rtol=1e-3, atol=1e-3)
