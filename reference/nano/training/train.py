"""Train STAR-Nano from scratch, or continue where training stopped.

    python -m reference.nano.training.train --out FOLDER

The stages after `vq` may run in several processes that share each batch:

    torchrun --nproc-per-node 2 -m reference.nano.training.train --out FOLDER --threads 1

FOLDER becomes a checkpoint in the release's layout; each stage's optimiser state and losses, as text and as
an image, are stored beside it. Stages run in order, and complete ones are skipped. The same seed, machine,
number of threads and number of processes give the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ...model import Star
from ...weights import load_star, resolve_checkpoint
from .. import recipe
from ..benchmark.plot import write_curves
from ..checkpoint import layout
from ..checkpoint.tokens import Rows
from ..recipe import STAGES, Stage
from .loop import Job, process, run
from .sequences import grouped_attention
from .stage_base import base_job
from .stage_eyes import eyes_job
from .stage_image import edit_job, generate_job
from .stage_reward import reward_job
from .stage_vq import VQ_TRAINERS

PART = {  # stage -> the part of the checkpoint that it writes
    "vq": "vq",
    "local": "vq",
    "decoder": "vq",
    "eyes": "base",
    "base": "base",
    "generate": "trained",
    "edit": "trained",
    "reward": "trained",
}
WORK = "training"  # the folder for what training needs and a checkpoint does not
PUBLISHED = (".json", ".pt", ".safetensors", ".png", ".jsonl", ".done")


def train(
    out: Path,
    *,
    names: list[str],
    device: torch.device,
    workers: int,
    scale: float,
    seconds: float | None,
    wide: int = 1,
    rate: float = 1.0,
    compiled: bool = False,
) -> bool:
    """Run the named stages in `out`. Returns False if `seconds` ran out before the end.

    Each stage gets `scale` times its samples, in batches `wide` times as large, at `rate` times its learning
    rate, with the decoders compiled or not.
    """
    work, began, (rank, processes) = out / WORK, time.monotonic(), process()
    if rank == 0:
        begin(out)
    for name in names:
        meet()
        if (work / f"{name}.done").exists():
            continue
        left = None if seconds is None else seconds - (time.monotonic() - began)
        stage = scaled(STAGES[name], scale, wide=wide, rate=rate)
        stage = dataclasses.replace(stage, batch=stage.batch // processes)
        star = training_star(out, device)
        job = job_of(star, stage, out, device, workers=workers, compiled=compiled)
        base_before = digest(out)
        finished = run(job, folder=work, device=device, workers=workers, tell=tell, stop_after_seconds=left)
        if rank == 0:
            write_curves(work, list(STAGES))
        if not finished:
            return False
        if rank:
            continue
        job.finish()
        layout.save_star(star, out, parts=(PART[name],))
        if PART[name] == "trained" and digest(out) != base_before:
            raise RuntimeError("the frozen base has changed")
        (work / f"{name}.done").write_text(f"{stage.steps} steps of {stage.batch * processes}\n")
    return True


def begin(out: Path) -> None:
    """Create what the checkpoint in `out` lacks: its configuration, and new weights."""
    (out / WORK).mkdir(parents=True, exist_ok=True)
    config = layout.write_config(out)
    if missing := [part for part, path in layout.weight_files(out).items() if not path.exists()]:
        layout.save_star(layout.new_star(config), out, parts=missing)


def meet() -> None:
    """Wait for all processes."""
    if process()[1] > 1:
        dist.barrier()


def scaled(stage: Stage, scale: float, *, wide: int, rate: float = 1.0) -> Stage:
    """A stage with `scale` times its samples, in batches `wide` times as large, at `rate` times its learning
    rate."""
    steps = max(1, int(stage.steps * scale / wide))
    return dataclasses.replace(
        stage,
        steps=steps,
        batch=stage.batch * wide,
        learning_rate=stage.learning_rate * rate,
        warmup=min(stage.warmup, max(1, steps // 10)),
        alone=min(stage.alone, steps // 10),
        distinct=stage.distinct and max(1, int(stage.distinct * scale / wide)),
    )


def training_star(out: Path, device: torch.device) -> Star:
    """The model as it is on file, ready for training: on whole sequences and with gradients."""
    loaded = load_star(resolve_checkpoint(out))
    star = Star(loaded.config, attention=grouped_attention)
    star.load_state_dict(loaded.state_dict())
    return star.to(device)


def job_of(
    star: Star, stage: Stage, out: Path, device: torch.device, *, workers: int = 0, compiled: bool = False
) -> Job:
    """What the stage brings to the loop."""
    if stage.name in VQ_TRAINERS:
        return VQ_TRAINERS[stage.name](star, stage, device).job()
    if stage.name == "eyes":
        return eyes_job(star, stage, device, compiled=compiled)
    rows = Rows.from_file(out / recipe.BASE_FOLDER / "tokenizer.json", star.config.special)
    if stage.name == "reward":
        return reward_job(star, rows, stage, workers=workers)
    job = {"base": base_job, "generate": generate_job, "edit": edit_job}[stage.name]
    return job(star, rows, stage, compiled=compiled)


def digest(out: Path) -> str:
    """Hash of the base model's weights file."""
    return hashlib.sha256((out / recipe.BASE_FOLDER / "model.safetensors").read_bytes()).hexdigest()


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def publish(out: Path, target: Path) -> None:
    """Copy the checkpoint to `target` without the optimisers' state.

    The copy includes its measurements, loss curves and the marks of complete stages, so that training can
    continue from it.
    """
    for path in sorted(out.rglob("*")):
        if path.suffix in PUBLISHED:
            relative = path.relative_to(out)
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / relative)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m reference.nano.training.train", description=__doc__.splitlines()[0]
    )
    device, add = "cuda" if torch.cuda.is_available() else "cpu", parser.add_argument
    add("--out", type=Path, required=True, help="folder of the checkpoint; training continues from it")
    add("--stages", default=",".join(STAGES), help=f"default: {','.join(STAGES)}")
    add("--device", default=device, help="default: a GPU if there is one")
    add("--workers", type=int, default=0, help="processes that make batches (default: 0)")
    add("--threads", type=int, help="threads of torch (default: all cores)")
    add("--scale", type=float, default=1.0, help="factor for each stage's samples (default: 1)")
    add(
        "--wide", type=int, default=1, help="factor for its batch size, which costs a GPU little (default: 1)"
    )
    add("--rate", type=float, default=1.0, help="factor for its learning rate (default: 1)")
    add("--compile", action="store_true", help="compile the decoders, which needs a C++ compiler")
    add("--minutes", type=float, help="save, stop and exit with 3 after so long; the same command continues")
    add("--publish", type=Path, help="finally copy the checkpoint here")
    options = parser.parse_args(argv)
    names = options.stages.split(",")
    if wrong := [name for name in names if name not in STAGES]:
        parser.error(f"no such stage: {', '.join(wrong)}; the stages are {', '.join(STAGES)}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        processes = int(os.environ["WORLD_SIZE"])
        if processes > 1 and "vq" in names:
            parser.error(
                "stage vq keeps running sums, which processes do not share: "
                "train it in one process, and the others with --stages"
            )
        if odd := [name for name in names if STAGES[name].batch * options.wide % processes]:
            batch = STAGES[odd[0]].batch * options.wide
            parser.error(f"{processes} processes cannot share the batch of {batch} of stage {odd[0]} evenly")
        dist.init_process_group("gloo")
    if options.threads:
        torch.set_num_threads(options.threads)
    finished = train(
        options.out,
        names=names,
        device=torch.device(options.device),
        workers=options.workers,
        scale=options.scale,
        wide=options.wide,
        rate=options.rate,
        compiled=options.compile,
        seconds=None if options.minutes is None else 60 * options.minutes,
    )
    if finished and options.publish and process()[0] == 0:
        publish(options.out, options.publish)
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main())
