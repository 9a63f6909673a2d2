"""What low precision does to the diffusion decoder: an overflow audit, and the picture in each format.

    python -m tests.bench_diffusion_precisions [CHECKPOINT] [--resolution R] [--steps N] [--tables ...]

Without a checkpoint, the miniature paints the official cases. A checkpoint with a lumina folder paints an
image and an edit of random image ids; its transformer lies in memory in float32 (10.4 GB for the release's),
everything else is read when it is needed. All is compared with what the same weights paint in float32:

* `magnitudes`: the largest numbers in each block, beside the largest of fp16, 65504, and of fp8, 448;
* `arithmetic`: one part at a time in bf16 or fp16, with all else in float32;
* `formats`: the weights of one part, or of some of the transformer's layers, rounded to nearest;
* `precisions`: all parts as a bundle of that precision stores them, computed in float32, and in its type.

This is a benchmark, not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from unittest import mock

import onnx_ir as ir
import torch
from torch import nn

from reference.mini import write_checkpoint
from reference.weights import CheckpointFiles, named_tensors, resolve_checkpoint
from star_export.golden.activations import int8_activations
from star_export.golden.oracle import streamed_star
from star_export.graph import precisions as precisions_module
from star_export.graph.formats import FORMATS
from star_export.graph.precisions import DENSE, PRECISIONS, Precision
from star_export.graph.wrappers import FoldedStar
from tests.helpers.magnitudes import COLUMNS, observed
from tests.helpers.paintings import PARTS, Given, Painting, held, made_up, official, paint

OFFICIAL = ("t2i0", "t2i1", "t2i2", "t2i3", "edit0", "edit1", "t2i40", "edit50")
TABLES = ("magnitudes", "arithmetic", "formats", "precisions")
TYPES = {"bf16": ir.DataType.BFLOAT16, "fp16": ir.DataType.FLOAT16}
LARGEST = {"fp16": 65504.0, "fp8": 448.0}
QUANTISED = ("int8", "fp8", "nvfp4", "int4")
ENDS = "both ends, which bundles leave wide"
# Groups of the transformer's weights, by what their names hold.
GROUPS = {
    ENDS: ("x_embedder", "time_caption_embed", "norm_out"),
    "scales and gates": ("norm1.linear",),
    "refiners": ("noise_refiner", "context_refiner", "ori_inp_refiner"),
    "attention of the layers": ("dit.layers.", ".attn."),
    "feed-forward of the layers": ("dit.layers.", ".feed_forward."),
}
Others = dict[str, tuple[nn.Module, torch.dtype]]


class Bench:
    """A checkpoint, its cases, and what it paints in float32."""

    def __init__(self, files: CheckpointFiles, resolution: int | None, steps: int):
        self.config = files.config()
        assert self.config.diffusion and files.lumina_folder, "expected a checkpoint with a lumina folder"
        self.tensors = dict(named_tensors(files, self.config))
        self.star = self.star_in(PRECISIONS["fp32"])
        tokenizer = str(files.lumina_folder / "tokenizer" / "tokenizer.json")
        self.cases: list[Given] = (
            official(OFFICIAL)
            if resolution is None
            else made_up(self.star, tokenizer, resolution=resolution, steps=steps)
        )
        self.wanted = self.paintings({})

    def star_in(self, precision: Precision, *, narrow: bool = False) -> FoldedStar:
        return streamed_star(self.config, self.tensors, precision, rope_bf16=True, narrow=narrow)

    def paintings(self, others: Others) -> list[Painting]:
        modules: Mapping[str, nn.Module] = {name: module for name, (module, _) in others.items()}
        with held(self.star, modules):
            return [paint(self.star, given, others) for given in self.cases]

    def row(self, name: str, others: Others) -> None:
        """Print a row: how far captions, latents and images are from those in float32."""
        found = self.paintings(others)
        pairs = list(zip(found, self.wanted, strict=True))
        if not all(got.decoded.isfinite().all() for got, _ in pairs):
            print(f"| {name} | **not finite** | | | | |")
            return
        caption = max(apart(got.caption, want.caption) for got, want in pairs)
        first = max(apart(got.latents[0], want.latents[0]) for got, want in pairs)
        last = max(apart(got.latents[-1], want.latents[-1]) for got, want in pairs)
        errors = [(got.image.float() - want.image.float()).square().mean() for got, want in pairs]
        changed = max(float((got.image != want.image).float().mean()) for got, want in pairs)
        print(
            f"| {name} | {caption:.1e} | {first:.1e} | {last:.1e} "
            f"| {decibels(torch.stack(errors).mean()):.1f} ({decibels(max(errors)):.1f}) dB | {changed:.0%} |"
        )


def apart(got: torch.Tensor, want: torch.Tensor) -> float:
    """The root mean square of a difference, in standard deviations of what is wanted."""
    return float((got - want).square().mean().sqrt() / want.std())


def decibels(error: torch.Tensor) -> float:
    """The peak signal-to-noise ratio of images of uint8 whose mean square of differences is `error`."""
    return float(10 * torch.log10(255**2 / error))


def head(first: str) -> None:
    print(f"\n| {first} | caption | latents, first step | last step | images (the worst) | values changed |")
    print("|---|---|---|---|---|---|")


def magnitudes(bench: Bench) -> None:
    with observed(bench.star, PARTS) as seen:
        bench.paintings({})
    print(f"\n| block | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    for block, found in seen.found.items():
        print(f"| `{block}` | {' | '.join(shown(found.get(column)) for column in COLUMNS)} |")
    for part in PARTS:
        largest = seen.largest(part)
        print(f"| all of `{part}` | {' | '.join(shown(largest[column]) for column in COLUMNS)} |")
        for name, top in LARGEST.items():
            shares = (f"{largest[column] / top:.1%}" for column in COLUMNS)
            print(f"| share of {name}'s {top:g} | {' | '.join(shares)} |")


def shown(value: float | None) -> str:
    return "" if not value else f"{value:.3g}"


def arithmetic(bench: Bench) -> None:
    head("computed in 16 bits")
    for name, compute in TYPES.items():
        precision = Precision(compute, never_fp16=())
        star = bench.star_in(precision, narrow=True)
        for parts in [(part,) for part in PARTS] + [PARTS]:
            others = {part: (getattr(star, part), precision.torch_dtype) for part in parts}
            bench.row(f"{name}: {', '.join(f'`{part}`' for part in parts)}", others)


def formats(bench: Bench, names: list[str]) -> None:
    head("rounded alone")
    for name in names:
        for part in PARTS:
            star = bench.star_in(Precision(ir.DataType.FLOAT, {part: FORMATS[name]}))
            bench.row(f"{name}: `{part}`", {part: (getattr(star, part), torch.float32)})
        for group, words in GROUPS.items():
            every = words if group.endswith("layers") else ()
            chosen = {
                weight: FORMATS[name]
                for weight in bench.tensors
                if weight.startswith("dit.")
                and (all(w in weight for w in every) if every else any(w in weight for w in words))
            }
            star = bench.star_in(Precision(ir.DataType.FLOAT, chosen=chosen))
            with mock.patch.object(precisions_module, "DENSE", () if group == ENDS else DENSE):
                bench.row(f"{name}: {group}", {"dit": (star.dit, torch.float32)})


def precisions(bench: Bench) -> None:
    head("whole precision")
    for name, precision in PRECISIONS.items():
        star = bench.star_in(precision)
        whole = {part: (getattr(star, part), torch.float32) for part in PARTS}
        bench.row(f"{name}, in float32", whole)
        if name == "int8":
            with (
                int8_activations(star.dit, "dit", precision),
                int8_activations(star.text_encoder, "text_encoder", precision),
            ):
                bench.row(f"{name}, activations in int8", whole)
        if precision.torch_dtype != torch.float32:
            narrow = bench.star_in(precision, narrow=True)
            others = {part: (getattr(narrow, part), precision.within(part).torch_dtype) for part in PARTS}
            bench.row(f"{name}, in {precision.within('dit').dense_name}", others)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_diffusion_precisions", description=__doc__.split("\n")[0]
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a folder in the release's layout")
    parser.add_argument("--resolution", type=int, default=256, help="pixels a side of a checkpoint's images")
    parser.add_argument("--steps", type=int, default=4, help="of a checkpoint's images")
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=TABLES)
    parser.add_argument("--formats", nargs="+", default=list(QUANTISED), choices=QUANTISED)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.checkpoint is None:
            write_checkpoint(Path(folder) / "mini", diffusion=True)
        files = resolve_checkpoint(str(options.checkpoint or Path(folder) / "mini"))
        resolution = None if options.checkpoint is None else options.resolution
        bench = Bench(files, resolution, options.steps)
        if "magnitudes" in options.tables:
            magnitudes(bench)
        if "arithmetic" in options.tables:
            arithmetic(bench)
        if "formats" in options.tables:
            formats(bench, options.formats)
        if "precisions" in options.tables:
            precisions(bench)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
