"""A whole training: stages run in turn, frozen parts stay bit for bit,
and training goes on from a published copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference import tasks
from reference.nano import recipe
from reference.nano.checkpoint import layout
from reference.nano.checkpoint.tokens import Rows
from reference.nano.recipe import STAGES, Stage
from reference.nano.training import train
from reference.weights import load_star, resolve_checkpoint


def test_a_wider_stage_sees_as_many_samples() -> None:
    stage = Stage("s", steps=100, batch=8, learning_rate=1.0, warmup=50, distinct=40, alone=3)
    wide = train.scaled(stage, 2.0, wide=4, rate=0.5)
    assert (wide.steps, wide.batch, wide.warmup, wide.distinct, wide.alone) == (
        50,
        32,
        5,
        20,
        3,
    ) and wide.learning_rate == 0.5
    assert (
        train.scaled(stage, 0.1, wide=1).alone == 1
        and train.scaled(replace(stage, distinct=None), 1.0, wide=2).distinct is None
    )
    assert wide.steps * wide.batch == 2 * stage.steps * stage.batch


@pytest.mark.slow
def test_all_stages_run_and_leave_the_frozen_base_bit_for_bit(small_root: Path) -> None:
    out, seconds = small_root, None
    options = {"device": torch.device("cpu"), "workers": 0, "scale": 1.0, "seconds": seconds}
    assert train.train(out, names=["vq", "eyes", "base"], **options)
    rows = Rows.from_file(out / recipe.BASE_FOLDER / "tokenizer.json", layout.read_config(out).special)
    prompt = rows.question("two red stars")
    before, base, generated = answers(out, prompt), train.digest(out), (out / "STAR-Nano.pt").read_bytes()
    assert train.train(out, names=["generate"], **options)
    middle = (out / "STAR-Nano.pt").read_bytes()
    assert train.train(out, names=list(STAGES), **options)
    assert train.digest(out) == base and all(torch.equal(a, b) for a, b in zip(answers(out, prompt), before))
    assert len({generated, middle, (out / "STAR-Nano.pt").read_bytes()}) == 3  # while the rest was trained
    assert {path.name for path in (out / "training").iterdir()} >= {
        "losses.png",
        "edit.done",
        "vq.jsonl",
        "base.ckpt",
    }
    train.publish(out, out / "published")
    shipped = {path.name for path in (out / "published" / "training").iterdir()}
    assert (
        load_star(resolve_checkpoint(out / "published"))
        and "edit.done" in shipped
        and "edit.ckpt" not in shipped
    )
    (out / "published" / "training" / "edit.done").unlink()  # training goes on from a copy of what is shipped
    assert (
        train.train(out / "published", names=list(STAGES), **options)
        and train.digest(out / "published") == base
    )


def test_parts_that_are_there_are_kept_and_the_others_made(small_root: Path) -> None:
    options = {"device": torch.device("cpu"), "workers": 0, "scale": 1.0, "seconds": None}
    assert train.train(small_root, names=["vq", "base"], **options)
    files = layout.weight_files(small_root)
    files["trained"].unlink()
    kept = {part: files[part].read_bytes() for part in ("base", "vq")}
    assert train.train(small_root, names=["vq", "base"], **options) and files["trained"].exists()
    assert all(files[part].read_bytes() == data for part, data in kept.items())


def answers(root: Path, prompt: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the base says, and its logits."""
    star, ids = load_star(resolve_checkpoint(root)), torch.tensor([prompt])
    positions = tasks.mrope_position_ids(ids[0], [], star.config.special)
    cache = star.base_ar.new_cache(1, capacity_tokens=len(prompt))
    hidden = tasks.decode(star.base_ar, star.token_embedding(ids), positions, 0, cache)
    return tasks.answer(star, ids, positions, None, max_new_tokens=8), star.text_head(hidden)
