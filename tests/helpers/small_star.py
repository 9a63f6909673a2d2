"""A STAR-Nano of a few thousand weights, and training on the same few batches until it knows them."""

from __future__ import annotations

from pathlib import Path

from reference.model import Star
from reference.nano import recipe
from reference.nano.checkpoint import layout
from reference.nano.checkpoint.tokens import Rows
from reference.nano.recipe import Stage
from reference.nano.training import loop
from reference.nano.training.sequences import grouped_attention


def small_star(small_root: Path) -> tuple[Star, Rows]:
    config = layout.write_config(small_root)
    star = layout.new_star(config, attention=grouped_attention)
    return star, Rows.from_file(small_root / recipe.BASE_FOLDER / "tokenizer.json", config.special)


def overfit(job: loop.Job, batches: list[dict], *, steps: int, rate: float) -> list[dict[str, float]]:
    """Losses of `steps` steps on the same batches in turn."""
    parameters = [p for module in job.trained.values() for p in module.parameters() if p.requires_grad]
    job.stage = Stage(job.stage.name, steps=steps, batch=1, learning_rate=rate, warmup=10, weight_decay=0.0)
    optimisers = loop.optimisers_of(job, parameters)
    found = []
    for step in range(steps):
        losses = loop.train_step(job, optimisers, parameters, batches[step % len(batches)], step)
        found.append({name: float(value) for name, value in losses.items()})
    return found
