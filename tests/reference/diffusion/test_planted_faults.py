"""Each mistake that is easily made changes the final latents or the image by far more than the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from reference.diffusion import dit as transformer
from reference.diffusion import tasks, text_encoder
from reference.model import Star
from reference.weights import load_star, resolve_checkpoint
from tests.helpers.official_diffusion import CASES, LIMIT, error, golden

EDIT = "edit0"


@pytest.fixture(scope="module")
def star(diffusion_checkpoint: Path) -> Star:
    return load_star(resolve_checkpoint(diffusion_checkpoint), rope_bf16=False)


def final_error(star: Star) -> float:
    """The error of the latents of an edit, from ids, codes and image on."""
    case, side = CASES[EDIT], CASES[EDIT]["resolution"] // 8
    ids = golden(f"{EDIT}.prompt_ids")[None], torch.tensor([[2]])
    caption, empty = (tasks.encode_text(star.text_embedding, star.text_encoder, i) for i in ids)
    vq = tasks.vq_map(star.codebook, golden(f"{EDIT}.codes"), side=side)
    moments = star.vae_encoder(golden(f"{EDIT}.source"))
    source = tasks.source_latent(moments, golden(f"{EDIT}.source_noise"), star.config.diffusion.vae)
    rows = tasks.edit_rows(caption, empty, vq, source)
    guidance = tasks.Guidance(text=case["g_txt"], image=case["g_img"], vq=case["g_vq"])
    steps = tasks.schedule(case["steps"], shift=6.0, sigmas_bf16=True)
    painted = [*tasks.paint(star.dit, rows, golden(f"{EDIT}.noise"), steps, guidance)]
    return error(torch.stack([step.latents for step in painted]), f"{EDIT}.bf16_sigmas.latents")


def test_nothing_is_wrong_without_a_fault(star: Star) -> None:
    assert final_error(star) <= LIMIT


def exact_sigmas(patch: pytest.MonkeyPatch) -> None:
    right = tasks.schedule
    patch.setattr(tasks, "schedule", lambda n, shift, sigmas_bf16: right(n, shift=shift, sigmas_bf16=False))


def times_of_rounded_sigmas(patch: pytest.MonkeyPatch) -> None:
    right = tasks.schedule

    def wrong(steps: int, **options):
        found = right(steps, **options)
        return replace(found, times=1 - found.sigmas[:-1])

    patch.setattr(tasks, "schedule", wrong)


def another_gelu(patch: pytest.MonkeyPatch) -> None:
    right = F.gelu
    patch.setattr(text_encoder.F, "gelu", lambda x, approximate="none": right(x))


def rows_that_restart(patch: pytest.MonkeyPatch) -> None:
    right = tasks.rotary_cos_sin

    def wrong(config, *, caption_tokens: int, side: int):
        tables = right(config, caption_tokens=caption_tokens, side=side)
        upper = [t[: caption_tokens + side * side] for t in tables]
        return tuple(torch.cat([t, t[caption_tokens:]]) for t in upper)

    patch.setattr(tasks, "rotary_cos_sin", wrong)


def pairs_by_halves(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(transformer, "pairs_first", lambda x: x)


def guidance_at_the_last_step(patch: pytest.MonkeyPatch) -> None:
    right, rows = tasks.guided, tasks.needed_rows
    patch.setattr(tasks, "guided", lambda found, guidance, last: right(found, guidance, last=False))
    patch.setattr(tasks, "needed_rows", lambda found, guidance, last: rows(found, guidance, last=False))


def no_fourth_row(patch: pytest.MonkeyPatch) -> None:
    right = tasks.edit_rows

    def wrong(*given):
        return {name: row for name, row in right(*given).items() if name != "x"}

    patch.setattr(tasks, "edit_rows", wrong)


def image_tokens_in_an_edits_rows(patch: pytest.MonkeyPatch) -> None:
    right = tasks.edit_rows

    def wrong(caption, empty, vq, source):
        rows = right(caption, empty, vq, source)
        return rows | {name: replace(rows[name], vq_map=vq) for name in ("i", "t")}

    patch.setattr(tasks, "edit_rows", wrong)


def the_mode_of_the_source(patch: pytest.MonkeyPatch) -> None:
    right = tasks.source_latent
    patch.setattr(tasks, "source_latent", lambda moments, noise, vae: right(moments, 0 * noise, vae))


def aligned_corners(patch: pytest.MonkeyPatch) -> None:
    right = F.interpolate
    patch.setattr(tasks.F, "interpolate", lambda x, **options: right(x, **options | {"align_corners": True}))


def time_in_thousands(patch: pytest.MonkeyPatch) -> None:
    right = tasks.time_features
    patch.setattr(tasks, "time_features", lambda time: right(1000 * time))


def positions_of_the_longest_caption(patch: pytest.MonkeyPatch) -> None:
    """As if the rows were padded to one length."""
    right = tasks.rotary_cos_sin

    def wrong(config, *, caption_tokens: int, side: int):
        longest = right(config, caption_tokens=34, side=side)
        own = right(config, caption_tokens=caption_tokens, side=side)
        return tuple(torch.cat([o[:caption_tokens], t[34:]]) for o, t in zip(own, longest))

    patch.setattr(tasks, "rotary_cos_sin", wrong)


FAULTS = [
    exact_sigmas,
    times_of_rounded_sigmas,
    another_gelu,
    rows_that_restart,
    pairs_by_halves,
    guidance_at_the_last_step,
    no_fourth_row,
    image_tokens_in_an_edits_rows,
    the_mode_of_the_source,
    aligned_corners,
    time_in_thousands,
    positions_of_the_longest_caption,
]


@pytest.mark.parametrize("plant", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_shows(
    star: Star, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)
    assert final_error(star) > 2 * LIMIT
