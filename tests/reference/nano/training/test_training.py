"""Training: every stage can learn, an interrupted run ends like an uninterrupted one, and the frozen base stays what it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch import nn

from reference import tasks
from reference.decoder import kv_cache_attention
from reference.model import Star
from reference.nano import recipe
from reference.nano.benchmark.painter import images_of
from reference.nano.checkpoint import layout
from reference.nano.checkpoint.tokens import Rows
from reference.nano.recipe import STAGES, Stage
from reference.nano.training import loop, stage_reward, stage_vq, stages, train
from reference.nano.training.batches import (
    IGNORED,
    base_batch,
    cells_of,
    edit_batch,
    generate_batch,
    token_tensors,
    touched_tensor,
)
from reference.nano.training.cells import (
    drawn,
    empty_cells,
    image_from_scenes,
    same_cells,
    scenes_of,
    with_fewer_things,
)
from reference.nano.training.sequences import grouped_attention, through
from reference.nano.training.stage_eyes import eyes_batch, eyes_job
from reference.nano.training.stage_vq import (
    EMPTY_SHARE,
    MISREAD,
    NEIGHBOURS,
    VQ_TRAINERS,
    apart,
    background_ids,
    clusters,
    moved,
    nearest,
    scale_latents,
)
from reference.nano.training.wanted import meant_by, touched_loss
from reference.nano.world.draw import arrays_from_scenes
from reference.nano.world.edits import Edit
from reference.nano.world.scorer import Reading, read
from reference.nano.world.world import COLORS, PLACES, RADII, SHAPES, Look, Scene, Thing
from reference.weights import load_star, resolve_checkpoint
from tests.helpers.small_star import overfit, small_star

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


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    job = toy_job(toy(), torch.zeros(1))
    job.losses = lambda batch, step: {"loss": (job.trained["toy"].weight * float("nan")).sum()}
    with pytest.raises(FloatingPointError, match="stage quick, step 1"):
        loop.run(job, folder=tmp_path, device=torch.device("cpu"), workers=0, tell=lambda line: None)


def test_the_base_learns_a_batch_by_heart(small_root: Path) -> None:
    star, rows = small_star(small_root)
    batch = base_batch(0, rows=rows, batch=12)
    found = overfit(stages.base_job(star, rows, STAGES["base"]), [batch], steps=80, rate=4e-3)
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


def test_cells_tell_what_has_its_centre_there() -> None:
    scene = Scene("blue", (Thing(Look("star", "red", "large"), x=36.0, y=8.0, radius=11.0, angle=0.0),))
    classes, offsets = cells_of(scene)
    assert classes[2] == [4, 0, 1, list(COLORS).index("blue")] and offsets[2] == [
        -0.5,
        0.0,
    ]  # row 0, column 2
    assert all(
        c == [0, IGNORED, IGNORED, list(COLORS).index("blue")] for i, c in enumerate(classes) if i != 2
    )


def test_tokens_tell_which_thing_reaches_them() -> None:
    """A large star over columns 2 to 5 and a small circle in the corner below; where both reach, the nearer."""
    scene = Scene(
        "blue",
        (
            Thing(Look("star", "red", "large"), x=32.0, y=32.0, radius=11.0, angle=0.0),
            Thing(Look("circle", "white", "small"), x=52.0, y=52.0, radius=7.0, angle=0.0),
        ),
    )
    told = token_tensors([Scene("green", ()), scene])
    classes, offsets = told["classes"].view(2, 8, 8, 4), told["offsets"].view(2, 8, 8, 2)
    assert (
        classes[0] == torch.tensor([0, IGNORED, IGNORED, list(COLORS).index("green")])
    ).all() and not offsets[0].any()
    assert (classes[1, ..., 3] == list(COLORS).index("blue")).all()
    shape = classes[1, ..., 0]
    assert (
        (shape[3:5, 2:6] == 4).all() and (shape[2:6, 3:5] == 4).all() and shape[2, 2] == 0
    )  # the corner is 17 pixels away, 11 + 3 reach
    assert (shape[6, 5:8] == 1).all() and not shape[:2].any() and not shape[:, :2].any()
    assert classes[1, 6, 6].tolist() == [1, list(COLORS).index("white"), 0, list(COLORS).index("blue")]
    assert offsets[1, 3, 5].tolist() == [-1.5, 0.5] and offsets[1, 6, 6].tolist() == [0.0, 0.0]
    assert not offsets[1][shape == 0].any()
    star, circle = scene.things
    shape = token_tensors([Scene("blue", (star, replace(circle, x=48.0, y=32.0)))])["classes"].view(8, 8, 4)[
        ..., 0
    ]
    assert shape[3].tolist() == [
        0,
        0,
        4,
        4,
        4,
        1,
        1,
        0,
    ]  # the fifth's centre is 1.6 pixels from the star and in the circle


def test_heads_are_asked_of_the_given_image(small_root: Path) -> None:
    """Of where its tokens are and what it shows, and what the instruction means by it."""
    star, rows = small_star(small_root)
    job, batch = stages.edit_job(star, rows, STAGES["edit"]), edit_batch(0, rows=rows, batch=4)
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
    parts = {name: float(losses["edited" if name == "tokens" else name]) for name in stages.WEIGHTS}
    assert float(losses["loss"]) == pytest.approx(
        sum(weight * parts[name] for name, weight in stages.WEIGHTS.items()), rel=1e-4
    )


def test_what_an_edit_means_is_told_as_numbers(nano_rows: Rows) -> None:
    star, circle = (
        Thing(Look(shape, color, size), x, 32.0, 7.0, 0.0)
        for shape, color, size, x in (("star", "red", "small", 12.0), ("circle", "blue", "large", 48.0))
    )
    scene, colors = Scene("white", (star, circle)), list(COLORS)
    green, cross = (
        replace(star, look=look) for look in (Look("star", "green", "small"), Look("cross", "red", "small"))
    )
    new = Thing(Look("square", "black", "large"), 50.0, 50.0, 11.0, 0.0)
    found = {
        edit.kind: (edit, meant_by(edit))
        for edit in (
            Edit("recolor", "", scene, Scene("white", (green, circle))),
            Edit("replace", "", scene, Scene("white", (cross, circle))),
            Edit("add", "", scene, Scene("white", (star, circle, new)), place="bottom right"),
            Edit("remove", "", scene, Scene("white", (circle,))),
            Edit("background", "", scene, Scene("black", (star, circle))),
        )
    }
    none, red_star = [len(SHAPES), len(colors), len(RADII)], [SHAPES.index("star"), colors.index("red"), 0]
    assert {kind: numbers[1:4] for kind, (_, numbers) in found.items()} == {
        "recolor": red_star,
        "replace": red_star,
        "add": none,
        "remove": red_star,
        "background": none,
    }
    assert {kind: numbers[4:] for kind, (_, numbers) in found.items()} == {
        "recolor": [SHAPES.index("star"), colors.index("green"), 0, len(PLACES)],
        "replace": [SHAPES.index("cross"), colors.index("red"), 0, len(PLACES)],
        "add": [
            SHAPES.index("square"),
            colors.index("black"),
            len(RADII),
            PLACES.index("bottom right"),
        ],  # nobody said how large
        "remove": [*none, len(PLACES)],
        "background": [len(SHAPES), colors.index("black"), len(RADII), len(PLACES)],
    }
    assert [numbers[0] for _, numbers in found.values()] == list(range(5))
    touched = touched_tensor([edit for edit, _ in found.values()]).view(5, 8, 8)
    assert touched[:, 3:5, :3].amin((1, 2)).tolist() == [1, 1, 0, 1, 0] and not touched[..., 4:].any()


def test_an_edit_is_right_about_what_it_touches_or_not() -> None:
    """Two of three tokens at which anything is; a row without its text does not count."""
    logits = torch.tensor([[5.0, -5.0, 5.0, 5.0], [-5.0, -5.0, -5.0, -5.0]])
    asked = {
        "touched": torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]),
        "given_classes": torch.tensor([[1, 2, 3, 0]] * 2)[..., None],
        "told": torch.tensor([True, False]),
    }
    loss, hit = touched_loss(logits, asked)
    assert float(hit) == pytest.approx(2 / 3) and float(loss) == pytest.approx(5 / 3, abs=0.02)


def test_instructions_share_their_image(small_root: Path) -> None:
    """What is computed of four instructions behind one image is what is computed of each in a row of its own."""
    star, rows = small_star(small_root)
    job, batch = stages.edit_job(star, rows, STAGES["edit"]), edit_batch(1, rows=rows, batch=8)
    own = dict(batch)
    for name in ("prompt_ids", "before_things", "before_backgrounds", "given"):
        own[name] = batch[name].repeat_interleave(4, 0)
    own["prompt_positions"] = batch["prompt_positions"].repeat_interleave(4, 1)
    assert len(batch["prompt_ids"]) == 2 and len({tuple(row) for row in batch["input_ids"].tolist()}) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "drawn", lambda batch, step, stream=0: image_from_scenes(batch, noise=None))
        with torch.no_grad():
            shared = job.losses(batch, 0)
            patch.setattr(stages, "EDITS_PER_IMAGE", 1)
            alone = job.losses(own, 1)
    for name, value in shared.items():
        torch.testing.assert_close(alone[name], value, rtol=1e-3, atol=1e-4)


def test_ids_of_batches_that_come_again_are_found_once(
    small_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    star, rows = small_star(small_root)
    asked, ids_of = [], stages.ids_of
    monkeypatch.setattr(stages, "ids_of", lambda star, image: asked.append(len(image)) or ids_of(star, image))
    job, batch = stages.edit_job(star, rows, STAGES["edit"]), edit_batch(0, rows=rows, batch=4)
    with torch.no_grad():
        first, again = job.losses(batch, 0), job.losses(batch, 0)
        assert asked == [4, 1] and all(torch.equal(first[name], again[name]) for name in first)
        job.losses(batch, 1)
    assert asked == [4, 1] * 2
    stage = replace(QUICK, distinct=4)
    assert [stage.number(step) for step in range(6)] == [0, 1, 2, 3, 0, 1] and QUICK.number(5) == 5
    steps = loop.Steps(
        replace(toy_job(toy(), torch.zeros(1)), stage=stage, batch_of=lambda step: {"step": step})
    )
    assert [steps[step]["step"] for step in range(6)] == [0, 1, 2, 3, 0, 1]


def test_heads_may_learn_alone_first(tmp_path: Path) -> None:
    """What waits is where it was after two steps, and moves in the third; the rest moves from the first on."""
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
        job.losses = lambda batch, step: {
            "loss": (waiting(batch["x"]) + head(batch["x"]) - 1).square().mean()
        }
        assert loop.run(job, folder=folder, device=torch.device("cpu"), workers=0, tell=lambda line: None)
        found[steps] = [not torch.equal(module.weight, toy().weight) for module in (head, waiting)]
    assert found == {2: [True, False], 3: [True, True]}


def test_processes_take_batches_of_one_kind(nano_rows: Rows) -> None:
    for step in range(8):
        kinds = {
            "before_things"
            in stages.mixed_batch(process * loop.OTHERS + step, rows=nano_rows, batch=4, stage="edit")
            for process in range(3)
        }
        assert kinds == {step % stages.DRAWN_EVERY != stages.DRAWN_EVERY - 1}
    assert not any(loop.OTHERS % every for every in (stages.DRAWN_EVERY, stage_reward.EDITED_EVERY))


def test_empty_background_is_painted_with_one_id_of_each_colour(nano_rows: Rows) -> None:
    """With the weights that are shipped: whatever the encoder says of an empty token; everything else as it says."""
    star = load_star(resolve_checkpoint("nano"))
    backgrounds = background_ids(star)
    with torch.no_grad():
        bare = images_of(star.vq_decoder(backgrounds[:, None].expand(-1, recipe.IMAGE_TOKENS)))
    assert [read(image) for image in bare] == [Reading(color, ()) for color in COLORS]
    batch = generate_batch(0, rows=nano_rows, batch=6, stage="generate")
    natural, painted = (
        stages.ids_of(star, image_from_scenes(batch, noise=None)),
        stages.painted_ids(star, backgrounds, batch),
    )
    empty = empty_cells(batch).flatten(1) == 1
    assert torch.equal(painted[~empty], natural[~empty]) and (natural[empty] != painted[empty]).any()
    for row, ids, found in zip(batch["classes"][:, 0, 3], painted, empty):
        assert set(ids[found].tolist()) == {int(backgrounds[row])} and len(set(ids[~found].tolist())) > 1


def test_one_scene_of_a_batch_is_bare() -> None:
    """One that the decoder stage reads with one background, or it would never learn to paint what an edit empties."""
    present = [scenes_of(step, batch=16)["things"][..., 0].any(1) for step in range(4)]
    assert all((~row).nonzero().tolist() == [[14]] for row in present)


def test_the_decoder_reads_every_other_image_with_one_background() -> None:
    star = load_star(resolve_checkpoint("nano"))
    trainer, batch = (
        VQ_TRAINERS["decoder"](star, STAGES["decoder"], torch.device("cpu")),
        scenes_of(0, batch=4),
    )
    image = drawn(batch, 0)
    with torch.no_grad():
        natural, found = star.vq_encoder(image), trainer.read_ids(star.vq_encoder.latents(image), batch)
    empty = empty_cells(batch).flatten(1) == 1
    assert torch.equal(found[1::2], natural[1::2]) and torch.equal(found[~empty], natural[~empty])
    for ids, own, cells in zip(found[::2], natural[::2], empty[::2], strict=True):
        assert len(set(ids[cells].tolist())) == 1 < len(set(own[cells].tolist()))


def test_the_decoder_misreads_some_ids_of_half_of_the_images_as_near_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    star = load_star(resolve_checkpoint("nano"))
    trainer, batch = (
        VQ_TRAINERS["decoder"](star, STAGES["decoder"], torch.device("cpu")),
        scenes_of(0, batch=64),
    )
    with torch.no_grad():
        ids = trainer.read_ids(star.vq_encoder.latents(drawn(batch, 0)), batch)
        found, others = trainer.misread(ids, batch, 0), trainer.misread(ids, batch, 1)
    exchanged, empty = found != ids, empty_cells(batch).flatten(1) == 1
    misread = torch.arange(64) // 2 % 2 == 1
    assert not exchanged[~misread].any() and not exchanged[empty].any() and not torch.equal(found, others)
    assert float(exchanged[misread][~empty[misread]].float().mean()) == pytest.approx(MISREAD, rel=0.2)
    entries = star.codebook.weight
    nearer = (
        torch.cdist(entries, entries)[ids[exchanged]]
        < (entries[ids[exchanged]] - entries[found[exchanged]]).norm(dim=1, keepdim=True)
    ).sum(1)
    assert nearer.min() >= 1 and nearer.max() <= NEIGHBOURS + 1  # itself is nearer than any other
    decoded, steps = [], []
    monkeypatch.setattr(
        trainer, "misread", lambda ids, batch, step: steps.append(step) or torch.full_like(ids, 7)
    )
    monkeypatch.setattr(
        stage_vq,
        "decoded",
        lambda star, latents: decoded.append(latents) or torch.zeros(len(latents), 3, 64, 64),
    )
    trainer.losses(batch, 5)
    assert steps == [5] and torch.equal(decoded[0], entries[7][:, None, None].expand(64, -1, 8, 8))


def test_generation_and_editing_learn_a_batch_by_heart(
    small_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two batches in turn, one drawn and one edited, with the base frozen; without noise, so that images repeat."""
    star, rows = small_star(small_root)
    before = {name: tensor.clone() for name, tensor in star.state_dict().items()}
    batches = [edit_batch(0, rows=rows, batch=4), generate_batch(1, rows=rows, batch=2, stage="edit")]
    monkeypatch.setattr(stages, "drawn", lambda batch, step, stream=0: image_from_scenes(batch, noise=None))
    job = stages.edit_job(star, rows, STAGES["edit"])
    assert {id(p) for p in job.waiting} == {
        id(p) for name in stages.DRAWING_PARTS for p in star.get_submodule(name).parameters()
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
    assert moved == set(stages.DRAWING_PARTS)


def test_the_vq_model_learns_images_by_heart(small_root: Path) -> None:
    """First whole, then made local, then the decoder alone from a new codebook."""
    star, _ = small_star(small_root)
    batch, device = scenes_of(0, batch=4), torch.device("cpu")
    found = {}
    for name, steps in {"vq": 80, "local": 60, "decoder": 40}.items():
        trainer = VQ_TRAINERS[name](
            star, Stage(name, steps=steps, batch=4, learning_rate=3e-3, warmup=10), device
        )
        encoder = {n: p.clone() for n, p in star.vq_encoder.named_parameters() if "codebook" not in n}
        found[name] = overfit(trainer.job(), [batch], steps=steps, rate=3e-3)
        moved_on = [
            not torch.equal(star.vq_encoder.get_parameter(n), before) for n, before in encoder.items()
        ]
        assert len(moved_on) > 20 and (not any(moved_on) if name == "decoder" else any(moved_on))
    first, local, last = found.values()
    assert (
        first[12]["used"] > 0.9
        and first[-1]["psnr"] > first[5]["psnr"] + 6
        and first[-1]["loss"] < 0.25 * first[5]["loss"]
    )
    assert mean(f["apart"] for f in local[-10:]) < 0.5 * mean(f["apart"] for f in local[:3])
    assert last[-1]["psnr"] > last[0]["psnr"] + 2
    image = drawn(batch, 0)
    with torch.no_grad():
        rebuilt = star.vq_decoder(star.vq_encoder(image))  # by ids, as the release does
    psnr = -10 * ((rebuilt.clamp(-1, 1) - image).square().mean(dim=(1, 2, 3)) / 4).log10().mean()
    assert abs(float(psnr) - last[-1]["psnr"]) < 1.5


def test_latents_are_scaled_and_nothing_else_changes(small_root: Path) -> None:
    star, _ = small_star(small_root)
    with torch.no_grad():
        for tensor in (
            star.codebook.weight,
            star.vq_encoder.quant_conv.weight,
            star.vq_encoder.quant_conv.bias,
        ):
            tensor.mul_(700)
        star.vq_decoder.post_quant_conv.weight.div_(700)
        image = drawn(scenes_of(0, batch=2), 0)
        ids = star.vq_encoder(image)
        decoded = star.vq_decoder(ids)
        scale_latents(star)
        assert 0.7 < float(star.codebook.weight.square().mean().sqrt()) < 1.5
        assert torch.equal(star.vq_encoder(image), ids) and torch.equal(star.vq_decoder(ids), decoded)


def test_cells_tell_what_is_the_same_and_what_is_empty() -> None:
    """Of three things in corners some go; each covers tokens 0 to 1 of its corner."""
    look = Look("square", "red", "small")
    scene = Scene(
        "white", tuple(Thing(look, x, y, 7.0, 0.0) for x, y in ((9.0, 9.0), (55.0, 9.0), (9.0, 55.0)))
    )
    things, backgrounds = (torch.from_numpy(array) for array in arrays_from_scenes([scene] * 8))
    batch = {"things": things, "backgrounds": backgrounds}
    fewer = with_fewer_things(batch, 3)
    kept = fewer["things"][:, :3, 0] == 1
    same, empty = same_cells(batch, fewer), empty_cells(batch)
    assert same.shape == empty.shape == (8, 8, 8) and 0 < kept.float().mean() < 1
    corners = [
        [(r < 2 or r > 5) and (c < 2 or c > 5) and not (r > 5 and c > 5) for c in range(8)] for r in range(8)
    ]
    assert torch.equal(empty, 1 - torch.tensor(corners).float().expand(8, -1, -1))
    for corner, (row, column) in enumerate(((0, 0), (0, 7), (7, 0))):
        assert torch.equal(same[:, row, column] == 1, kept[:, corner])
    assert (same[:, 5:, 5:] == 1).all() and (same[:, 2:6, 2:6] == 1).all()


def test_latents_are_held_where_they_should_be_equal() -> None:
    latents = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    others, same, empty = latents.clone(), torch.ones(2, 4, 4), torch.zeros(2, 4, 4)
    others[0, :, 1, 1] += 2.0
    assert float(moved(latents, others, same)) == pytest.approx(4 / 32)
    same[0, 1, 1] = 0  # there it may
    assert float(moved(latents, others, same)) == 0
    empty[1, 0] = 1
    latents[1, :, 0] = torch.tensor([1.0, 2.0, 3.0])[:, None]
    assert float(apart(latents, empty)) == pytest.approx(0, abs=1e-12)
    latents[1, :, 0, :2] += (
        2.0  # two of four are 1 above their mean, two 1 below; an image without empty cells counts as none
    )
    assert float(apart(latents, empty)) == pytest.approx(1 / 2)


def test_of_the_empty_background_little_counts_for_the_codebook(small_root: Path) -> None:
    star, _ = small_star(small_root)
    trainer = VQ_TRAINERS["decoder"](star, STAGES["decoder"], torch.device("cpu"))
    scenes = scenes_of(0, batch=64)
    empty = empty_cells(scenes).flatten()
    counted = trainer.counted(empty.unsqueeze(1), scenes, 0)  # latents that tell which they are
    assert (counted == 0).sum() == (empty == 0).sum() > 500  # all that show a thing
    assert (counted == 1).sum() == pytest.approx(
        EMPTY_SHARE * float(empty.sum()), rel=0.25
    ) and EMPTY_SHARE < 0.1


def test_a_new_image_head_points_at_entries(small_root: Path) -> None:
    """Whatever the stack says, entries that are alike are about as probable; and embeddings of image tokens are large."""
    star, _ = small_star(small_root)
    stages.start_from_codebook(star)
    entries = star.codebook.weight
    logits = star.image_head(
        torch.randn(50, recipe.HIDDEN, generator=torch.Generator().manual_seed(3))
    )  # [n, K]
    apart = torch.cdist(entries, entries)
    nearest_one, farthest = (apart + 1e9 * torch.eye(len(apart))).argmin(1), apart.argmax(1)
    assert (logits[:, nearest_one] - logits).abs().mean() < 0.5 * (logits[:, farthest] - logits).abs().mean()
    made = star.image_embedding(torch.arange(len(entries))).detach()
    assert float((made - made.mean(0)).square().mean().sqrt()) == pytest.approx(stages.EMBEDDED, rel=1e-3)


def test_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 4, generator=generator) * 10
    z = centres.repeat(200, 1) + 0.1 * torch.randn(3200, 4, generator=generator)
    found, counts = clusters(z, 64)
    assert (found[nearest(z, found)] - z).square().mean() < 0.02 and counts.sum() >= len(z)


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
    job = stages.generate_job(star, rows, STAGES["generate"])
    loss = job.losses(batch, 0)["loss"]
    longer = batch | {
        "input_ids": torch.cat([batch["input_ids"], torch.full((4, 5), 7)], 1),
        "position_ids": torch.cat([batch["position_ids"], torch.full((3, 4, 5), 300)], 2),
    }
    torch.testing.assert_close(job.losses(longer, 0)["loss"], loss, rtol=1e-3, atol=1e-4)


def test_labels_are_the_answers_alone(nano_rows: Rows) -> None:
    batch = base_batch(5, rows=nano_rows, batch=8)
    for ids, labels in zip(batch["input_ids"], batch["labels"]):
        said = labels != IGNORED
        assert torch.equal(ids[1:][said[:-1]], labels[said])  # each predicted from the one before
        *answers, rest = " ".join(map(str, labels[said].tolist())).split(str(nano_rows.special.im_end))
        assert answers and not rest  # each ends with the mark
        assert all(f" {answer.strip()} " in " ".join(map(str, ids.tolist())) for answer in answers)
    assert (
        len(batch["things"]) == 7 and (batch["input_ids"][:7] == nano_rows.special.image_pad).sum() == 7 * 16
    )


def test_training_samples_are_what_inference_sees(small_root: Path) -> None:
    """Teacher forcing on the drawn tokens gives the logits that drawing them gave, for a prompt and (positions!) for an edit."""
    star, rows = small_star(small_root)
    cached = Star(star.config)
    cached.load_state_dict(star.state_dict())
    row = rows.edit("make the circle red", image_tokens=64, merged_patches=16)
    batch = edit_batch(0, rows=rows, batch=4)
    positions = tasks.mrope_position_ids(torch.tensor(row + [0] * 63), [(4, 4)], star.config.special)
    ids = torch.tensor([row, row])
    given = stages.given_tensors(star, batch, 0)
    embeds = stages.with_images(star, ids[:1], given["given_ids"].long(), given["vision"])
    embeds = embeds.repeat(2, 1, 1)
    made = tasks.generate(
        cached,
        ids,
        guidance=1.0,
        top_k=1,
        top_p=1.0,
        uniforms=None,
        inputs_embeds=embeds,
        position_ids=tasks.mrope_position_ids(ids[0], [(4, 4)], star.config.special, trailing=64),
    )
    fed = torch.cat([embeds[:1], star.image_embedding(made.image_ids[:, :-1])], dim=1)
    hidden = through(star.stacked_ar, through(star.base_ar, fed, positions)[0][-1], positions)[0][-1]
    logits = star.image_head(hidden[0, len(row) - 1 :])
    torch.testing.assert_close(logits, made.cfg_logits[:, 0], rtol=1e-3, atol=1e-3)


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


def test_the_stack_starts_as_the_bases_last_layers(small_root: Path) -> None:
    star, _ = small_star(small_root)
    stages.stack_from_base(star)
    for ours, base in zip(star.stacked_ar.layers, star.base_ar.layers, strict=True):
        assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in ours.state_dict().items())
