"""What each part of STAR-Nano loses in each weight format, rounded to nearest and all else in float32.

    python -m tests.bench_formats [--formats int8 int4 fp8 nvfp4]

Of the parts that decide an image token, the divergence of its distribution: teacher-forced on the recorded
images of the benchmark's fixed set, guided and filtered as STAR-Nano samples; and the same of each decoder's
cache in int8 with a scale per position and head, which no bundle has. Of the VQ encoder, the share of ids
that change on held-out images; of the VQ decoder and the vision encoder, the signal over its change in dB.
This is a benchmark, not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from reference import tasks
from reference.model import Star
from reference.nano.benchmark import identity
from reference.nano.benchmark.painter import Painter
from reference.nano.benchmark.score import SEED, items
from reference.nano.checkpoint.vision import embeds_of, prepared
from reference.nano.world.draw import images_from_scenes
from reference.weights import SHIPPED
from star_export.golden.divergence import divergence
from star_export.graph.formats import FORMATS, INT8, Format
from star_export.graph.precisions import DECODERS, DENSE
from star_export.scores import SCORE, ids_from_score

TABLE = "image_table"  # adapter(codebook), which a bundle stores in place of the adapter
DRAWN = ("base_ar", "stacked_ar", "image_head", "token_embedding", TABLE)
PICTURES = 4  # held-out scenes of each kind of edit


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_formats", description=__doc__.split("\n")[0])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    options = parser.parse_args()
    painter = Painter.from_checkpoint(SHIPPED["nano"])
    star = painter.star.float().requires_grad_(False)
    path = SHIPPED["nano"] / SCORE
    ids = ids_from_score(path.read_bytes(), where=str(path))
    sampling = painter.sampling["generate"]
    scenes = [item.scene for item in items("edit", PICTURES)]
    pictures = images_from_scenes(scenes, seed=SEED)
    planes = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    prepared_pictures = prepared(pictures, sharp=True)

    def logits() -> np.ndarray:
        return forced_logits(painter, ids, guidance=sampling.guidance)

    wanted = logits()

    def show(part: str, format: str) -> None:
        apart = divergence(logits(), wanted, top_k=sampling.top_k, top_p=sampling.top_p)
        kl, variation = apart.kl, apart.total_variation
        percentile = np.percentile(kl, 95)
        print(f"{part:<17}{format:<8}{kl.mean():<11.2e}{percentile:<11.2e}{variation.mean():.4f}")

    print("part             format  KL mean    95 %       TV mean")
    for part in DRAWN:
        for name in options.formats:
            with rounded(star, part, FORMATS[name]) as count:
                if count:
                    show(part, name)
    for decoder in DECODERS:
        with rounded_cache(star, decoder):
            show(f"{decoder} cache", INT8.name)
    with torch.inference_mode():
        vq_ids = star.vq_encoder(planes)
        runs: dict[str, Callable[[], Tensor]] = {
            "vq_decoder": lambda: star.vq_decoder(vq_ids),
            "vision_encoder": lambda: embeds_of(star.vision_encoder, prepared_pictures),
        }
        print("\npart             kernels        format  changes")
        for name in options.formats:
            for kernels, left_out in (("all", ()), ("all but some", DENSE), ("these alone", None)):
                with rounded(star, "vq_encoder", FORMATS[name], left_out=left_out) as count:
                    share = float((star.vq_encoder(planes) != vq_ids).float().mean())
                if count:
                    print(f"{'vq_encoder':<17}{kernels:<15}{name:<8}{share:.1%} of ids")
            for part, run in runs.items():
                before = run()
                with rounded(star, part, FORMATS[name], left_out=DENSE) as count:
                    change = run() - before
                if count:
                    decibels = 10 * float((before.square().mean() / change.square().mean()).log10())
                    print(f"{part:<17}{'all but some':<15}{name:<8}{decibels:.1f} dB")
    print(f"some: {', '.join(DENSE)}")
    return 0


@contextlib.contextmanager
def rounded_cache(star: Star, decoder: str) -> Iterator[None]:
    """Round keys and values of a decoder to int8 during the block, with a scale per position and head."""

    def narrow(x: Tensor) -> Tensor:
        return INT8.rounded(x.flatten(0, -2), torch.float32).view(x.shape)

    def of_narrow(whole: Callable) -> Callable:
        return lambda query, key, value, *rest: whole(query, narrow(key), narrow(value), *rest)

    with contextlib.ExitStack() as stack:
        for layer in getattr(star, decoder).layers:
            attention = layer.self_attn
            stack.enter_context(mock.patch.object(attention, "attention", of_narrow(attention.attention)))
        yield


@contextlib.contextmanager
def rounded(star: Star, part: str, format: Format, *, left_out: tuple[str, ...] | None = ()) -> Iterator[int]:
    """Round the weights of a part during the block, but for `left_out`; None rounds only those of DENSE.

    Yields how many weights the format can store.
    """
    if part == TABLE:
        with torch.no_grad():
            rows = star.image_embedding(torch.arange(star.config.vq.codebook_size))
        table = format.rounded(rows, torch.float32)
        with mock.patch.object(star, "image_embedding", lambda ids: table[ids]):
            yield 1
        return
    kept: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, parameter in star.named_parameters():
            chosen = name in DENSE if left_out is None else name not in left_out
            if not name.startswith(f"{part}.") or parameter.dim() < 2 or not chosen:
                continue
            if name.startswith("vq_") and "codebook" in name:
                continue
            if format.block(int(np.prod(parameter.shape[1:]))):
                kept[name] = parameter.clone()
                parameter.copy_(format.rounded(parameter, torch.bfloat16))
        try:
            yield len(kept)
        finally:
            for name, value in kept.items():
                star.get_parameter(name).copy_(value)


@torch.inference_mode()
def forced_logits(painter: Painter, ids: np.ndarray, *, guidance: float) -> np.ndarray:
    """Guided logits [n, T, V] of the fixed set's images `ids` [n, T], by the reference."""
    star, found = painter.star, []
    for text, row in zip(identity.prompts(), torch.from_numpy(ids), strict=True):
        prompt = painter.rows.draw(text)
        pair = torch.tensor([prompt, painter.rows.unconditional(prompt)])
        image = star.image_embedding(row[:-1]).expand(2, -1, -1)
        embeds = torch.cat([star.token_embedding(pair), image], 1)
        length = embeds.shape[1]
        caches = tasks.new_caches(star, 2, capacity_tokens=length)
        positions = torch.arange(length).expand(3, 2, -1)
        _, hidden = tasks.both_decoders(star, embeds, positions, 0, caches)
        both = star.image_head(hidden[:, -len(row) :]).float()  # [2, T, V]
        found.append((both[1] + guidance * (both[0] - both[1])).numpy())
    return np.stack(found)


if __name__ == "__main__":
    raise SystemExit(main())
