"""One training loop for all stages: optimisers, learning rate, data, checkpoints, resuming, logs.

Step i is a function of (seed, stage, i) and of the weights before it, so a run that was interrupted and
resumed ends with the same weights as one that was not. If torch's process group is open, its processes share
each batch and average their gradients: on two cores, two processes of one thread are an eighth faster than
one process of two.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset

from ...model import Star
from ..recipe import Stage

SAVE_SECONDS = 120.0
DECAYING = 0.4  # share of a stage's steps in which the learning rate falls
# The second process's batches start at this number, the third's at twice that. It is a multiple of 4, so that
# all processes take batches of the same kind.
OTHERS = 12_000_000
Losses = dict[str, Tensor]  # "loss" is minimised, the others are recorded


@dataclass
class Job:
    """What a stage brings to the loop; its batch is this process's part.

    `batch_of(number)` runs in worker processes and returns a dict of tensors; `losses` computes the losses of
    a batch and its number; `after` runs after each optimiser step, `finish` once after the last. `trained`
    are the modules whose parameters learn; those in `waiting` learn only after the stage's first `alone`
    steps; Muon updates those in `by_muon` and AdamW the rest; `extra` is saved as well.
    """

    stage: Stage
    trained: dict[str, nn.Module]
    batch_of: Callable[[int], dict]
    losses: Callable[[dict, int], Losses]
    after: Callable[[int], None] = lambda step: None
    finish: Callable[[], None] = lambda: None
    by_muon: Sequence[Tensor] = ()
    waiting: Sequence[Tensor] = ()
    extra: dict[str, Tensor] | None = None


class Steps(Dataset):
    """The batches of steps, for the loader's workers. Each process takes different ones, which are its part
    of the stage's."""

    def __init__(self, job: Job):
        self.batch_of, self.stage, self.first = job.batch_of, job.stage, OTHERS * process()[0]

    def __len__(self) -> int:
        return self.stage.steps

    def __getitem__(self, step: int) -> dict:
        return self.batch_of(self.first + self.stage.number(step))


def freeze(star: Star, *, trained: tuple[str, ...]) -> dict:
    """Train only the parameters of the named components; returns these components."""
    star.requires_grad_(False)
    modules = {name: star.get_submodule(name) for name in trained}
    for module in modules.values():
        module.requires_grad_(True)
    return modules


def process() -> tuple[int, int]:
    """The rank of this process and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def fused(function: Callable, *, compiled: bool) -> Callable:
    """The function, compiled for each width of a batch if asked for.

    With small matrices most of a step's time is spent between them.
    """
    return torch.compile(function, dynamic=False) if compiled else function


def rate(stage: Stage, step: int) -> float:
    """The learning rate at a step: a linear warm-up, then constant, then a cosine to zero.

    The cosine covers the last DECAYING of the steps, so a stage can still be extended while the rate is
    constant.
    """
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    flat = max(stage.warmup, (1 - DECAYING) * stage.steps)
    share = max(0.0, step - flat) / max(1, stage.steps - flat)
    return stage.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def run(
    job: Job,
    *,
    folder: Path,
    device: torch.device,
    workers: int,
    tell: Callable[[str], None] = print,
    stop_after_seconds: float | None = None,
) -> bool:
    """Train a stage to its end, from its newest checkpoint in `folder` if there is one.

    Writes `<stage>.ckpt` and `<stage>.jsonl` (a line of losses per tenth of a percent). Returns False if
    `stop_after_seconds` passed first; the same call then goes on from there.
    """
    stage = job.stage
    parameters = [p for module in job.trained.values() for p in module.parameters() if p.requires_grad]
    optimisers = optimisers_of(job, parameters)
    first, began, saved = restore(job, optimisers, folder), time.monotonic(), time.monotonic()
    if first >= stage.steps:
        return True
    if job.extra and process()[1] > 1:
        raise ValueError(
            f"stage {stage.name} keeps running sums, which processes do not share: train it in one process"
        )
    loader = DataLoader(
        Steps(job),
        batch_size=None,
        sampler=range(first, stage.steps),
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=device.type == "cuda",
    )
    recorded, every, seen, (rank, processes) = [], max(1, stage.steps // 1000), 0, process()
    for step, batch in enumerate(loader, start=first):
        losses = train_step(job, optimisers, parameters, moved_to(device, batch), step)
        seen += stage.batch * processes
        recorded.append(losses)
        if rank == 0 and ((step + 1) % every == 0 or step + 1 == stage.steps):
            speed = seen / max(time.monotonic() - began, 1e-9)
            tell(record(stage, folder, step + 1, recorded, speed))
            recorded = []
        ended = stop_after_seconds is not None and time.monotonic() - began > stop_after_seconds
        out_of_time = stop_after_seconds is not None and on_the_first(ended)
        if rank == 0 and (time.monotonic() - saved > SAVE_SECONDS or out_of_time or step + 1 == stage.steps):
            save(job, optimisers, folder, step + 1)
            saved = time.monotonic()
        if out_of_time and step + 1 < stage.steps:
            return False
    return True


def moved_to(device: torch.device, batch: dict) -> dict:
    """The batch with its tensors on the device."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def on_the_first(answer: bool) -> bool:
    """The first process's answer, in all processes."""
    said = torch.tensor(answer)
    if process()[1] > 1:
        dist.broadcast(said, src=0)
    return bool(said)


def train_step(
    job: Job, optimisers: list[Optimizer], parameters: list[Tensor], batch: dict, step: int
) -> Losses:
    """One step. `record` raises FloatingPointError later if the loss is not finite."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate(job.stage, step)
        optimiser.zero_grad(set_to_none=True)
    losses = job.losses(batch, job.stage.number(step))
    losses["loss"].backward()
    if step < job.stage.alone:
        for parameter in job.waiting:
            parameter.grad = None
    average_gradients(parameters)
    torch.nn.utils.clip_grad_norm_(parameters, job.stage.clip)
    for optimiser in optimisers:
        optimiser.step()
    job.after(step)
    return {name: value.detach() for name, value in losses.items()}


def average_gradients(parameters: list[Tensor]) -> None:
    """Replace gradients by their mean over all processes, in place.

    Parameters that a step did not use have no gradient in any process, because all take steps of the same
    kind.
    """
    if process()[1] > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        means = (flat / process()[1]).split([g.numel() for g in gradients])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))


def optimisers_of(job: Job, parameters: list[Tensor]) -> list[Optimizer]:
    """AdamW, and Muon for the job's `by_muon` (Jordan et al. 2024; scaled to AdamW's step size: Liu et al.
    2025, 2.2)."""
    stage, taken = job.stage, {id(p) for p in job.by_muon}
    rest = groups([p for p in parameters if id(p) not in taken], stage)
    made: list[Optimizer] = [torch.optim.AdamW(rest, lr=stage.learning_rate, betas=(0.9, 0.98))]
    if taken:
        made.append(
            torch.optim.Muon(
                job.by_muon,
                lr=stage.learning_rate,
                weight_decay=stage.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    return made


def groups(parameters: list[Tensor], stage: Stage) -> list[dict]:
    """Parameter groups: matrices have weight decay, vectors (norms and biases) do not."""
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": stage.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def record(stage: Stage, folder: Path, step: int, recorded: list[Losses], speed: float) -> str:
    """Append the mean losses of the last steps to the stage's log; returns the line to show.

    Raises FloatingPointError if the mean loss is not finite.
    """
    means = {
        name: float(torch.stack([losses[name].float() for losses in recorded if name in losses]).mean())
        for name in dict.fromkeys(name for losses in recorded for name in losses)
    }
    if not math.isfinite(means["loss"]):
        raise FloatingPointError(f"stage {stage.name}, step {step}: the loss is {means['loss']}")
    with open(folder / f"{stage.name}.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps({"step": step} | {k: round(v, 6) for k, v in means.items()}) + "\n")
    values = "  ".join(f"{k} {v:.4f}" for k, v in means.items())
    return f"{stage.name} {step}/{stage.steps}  {values}  {speed:.0f}/s"


def save(job: Job, optimisers: list[Optimizer], folder: Path, step: int) -> None:
    """Write the checkpoint to a temporary name, then rename it."""
    state = {
        "step": step,
        "modules": {name: module.state_dict() for name, module in job.trained.items()},
        "optimisers": [o.state_dict() for o in optimisers],
        "extra": job.extra or {},
    }
    path = folder / f"{job.stage.name}.ckpt"
    torch.save(state, path.with_suffix(".partial"))
    os.replace(path.with_suffix(".partial"), path)


def restore(job: Job, optimisers: list[Optimizer], folder: Path) -> int:
    """Load the stage's checkpoint and cut its log there; returns the number of the next step, 0 without a
    checkpoint."""
    path, log = folder / f"{job.stage.name}.ckpt", folder / f"{job.stage.name}.jsonl"
    if not path.exists():
        if process()[0] == 0:
            log.unlink(missing_ok=True)
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, module in job.trained.items():
        module.load_state_dict(state["modules"][name])
    for optimiser, stored in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(stored)
    for name, tensor in (job.extra or {}).items():
        tensor.copy_(state["extra"][name])
    if log.exists() and process()[0] == 0:
        lines = [line for line in log.read_text().splitlines() if json.loads(line)["step"] <= state["step"]]
        log.write_text("".join(line + "\n" for line in lines))
    return state["step"]
