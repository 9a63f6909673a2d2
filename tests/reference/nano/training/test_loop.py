"""The training loop: a run that was interrupted, or shared by two processes, ends like a whole one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from reference.nano.recipe import Stage
from reference.nano.training import loop

QUICK = Stage("quick", steps=6, batch=1, learning_rate=0.1, warmup=2)


def toy_job(module: nn.Linear, extra: torch.Tensor) -> loop.Job:
    def losses(batch: dict, step: int) -> loop.Losses:
        extra.add_(1)
        return {"loss": (module(batch["x"]) - step).square().mean()}

    return loop.Job(
        QUICK,
        {"toy": module},
        lambda step: {"x": torch.full((1, 3), step / 6)},
        losses,
        extra={"count": extra},
    )


def toy() -> nn.Linear:
    module = nn.Linear(3, 1)
    nn.init.constant_(module.weight, 0.5)
    nn.init.zeros_(module.bias)
    return module


def run_toy(folder: Path, *, stop_after_steps: int | None = None) -> tuple[nn.Linear, torch.Tensor, bool]:
    module, count = toy(), torch.zeros(1)
    job, taken = toy_job(module, count), []
    job.after = taken.append
    folder.mkdir(exist_ok=True)
    if stop_after_steps is None:
        return (
            module,
            count,
            loop.run(job, folder=folder, device=torch.device("cpu"), workers=0, tell=lambda line: None),
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.time, "monotonic", lambda: 99.0 if len(taken) >= stop_after_steps else 0.1)
        done = loop.run(
            job,
            folder=folder,
            device=torch.device("cpu"),
            workers=0,
            tell=lambda line: None,
            stop_after_seconds=50,
        )
    return module, count, done


def test_an_interrupted_run_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, count, done = run_toy(tmp_path / "whole")
    assert done and count == 6 and not torch.equal(whole.weight, toy().weight)
    for stop in (1, 3, 5):
        folder = tmp_path / str(stop)
        assert run_toy(folder, stop_after_steps=stop)[2] is False
        module, again, done = run_toy(folder)
        assert done and torch.equal(module.weight, whole.weight) and again == 6
        logs = [
            [json.loads(line) for line in (place / "quick.jsonl").read_text().splitlines()]
            for place in (folder, tmp_path / "whole")
        ]
        assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert not list(tmp_path.rglob("*.partial"))


def test_what_only_some_steps_lose_is_recorded_too(tmp_path: Path) -> None:
    even, odd = (
        {"loss": torch.tensor(v), name: torch.tensor(v)} for v, name in ((1.0, "edited"), (3.0, "drawn"))
    )
    loop.record(QUICK, tmp_path, 2, [even, odd], 1.0)
    assert json.loads((tmp_path / "quick.jsonl").read_text()) == {
        "step": 2,
        "loss": 2.0,
        "edited": 1.0,
        "drawn": 3.0,
    }


def share_a_run(rank: int, folder: Path) -> None:
    """One of two processes: trains, and leaves its weights in `folder`."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2
    )
    module = toy()
    job = toy_job(module, torch.zeros(1))
    job.extra, job.batch_of = None, lambda step: {"x": torch.full((1, 3), step % 7 / 6)}
    job.trained["unused"] = nn.Linear(2, 2)  # has no gradient
    assert loop.run(job, folder=folder, device=torch.device("cpu"), workers=0, tell=lambda line: None)
    torch.save(module.state_dict(), folder / f"{rank}.pt")


def test_two_processes_train_what_one_would_on_both_their_batches(tmp_path: Path) -> None:
    for name in ("shared", "whole"):
        (tmp_path / name).mkdir()
    torch.multiprocessing.start_processes(
        share_a_run, args=(tmp_path / "shared",), nprocs=2, start_method="fork"
    )
    first, second = (torch.load(tmp_path / "shared" / f"{rank}.pt", weights_only=True) for rank in range(2))
    module = toy()
    job = toy_job(module, torch.zeros(1))
    job.batch_of = lambda step: {"x": torch.tensor([[step % 7 / 6] * 3, [(loop.OTHERS + step) % 7 / 6] * 3])}
    assert loop.run(
        job, folder=tmp_path / "whole", device=torch.device("cpu"), workers=0, tell=lambda line: None
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-5, atol=1e-6)
    assert (
        not torch.equal(first["weight"], toy().weight)
        and len((tmp_path / "shared" / "quick.jsonl").read_text().splitlines()) == 6
    )


def test_the_learning_rate_goes_up_and_down() -> None:
    stage = Stage("s", steps=100, batch=1, learning_rate=1.0, warmup=10)
    rates = [loop.rate(stage, step) for step in range(100)]
    assert (
        rates[0] == 0.1 and rates[9] == rates[10] == rates[60] == 1.0 and rates[61] < 1.0 and rates[-1] < 0.01
    )
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    job = toy_job(toy(), torch.zeros(1))
    job.losses = lambda batch, step: {"loss": (job.trained["toy"].weight * float("nan")).sum()}
    with pytest.raises(FloatingPointError, match="stage quick, step 1"):
        loop.run(job, folder=tmp_path, device=torch.device("cpu"), workers=0, tell=lambda line: None)


def test_a_stage_takes_its_distinct_batches_in_turn() -> None:
    stage = replace(QUICK, distinct=4)
    assert [stage.number(step) for step in range(6)] == [0, 1, 2, 3, 0, 1] and QUICK.number(5) == 5
    steps = loop.Steps(
        replace(toy_job(toy(), torch.zeros(1)), stage=stage, batch_of=lambda step: {"step": step})
    )
    assert [steps[step]["step"] for step in range(6)] == [0, 1, 2, 3, 0, 1]


def test_heads_may_learn_alone_first(tmp_path: Path) -> None:
    """What waits moves in the third step, not before; the rest moves from the first step on."""
    found = {}
    for steps in (2, 3):
        head, waiting, folder = toy(), toy(), tmp_path / str(steps)
        folder.mkdir()
        job = toy_job(head, torch.zeros(1))
        job.stage, job.trained, job.waiting = (
            replace(QUICK, steps=steps, alone=2, warmup=1),
            job.trained | {"late": waiting},
            [*waiting.parameters()],
        )
        job.losses = lambda batch, step, first=head, second=waiting: {
            "loss": (second(batch["x"]) + first(batch["x"]) - 1).square().mean()
        }
        assert loop.run(job, folder=folder, device=torch.device("cpu"), workers=0, tell=lambda line: None)
        found[steps] = [not torch.equal(module.weight, toy().weight) for module in (head, waiting)]
    assert found == {2: [True, False], 3: [True, True]}
