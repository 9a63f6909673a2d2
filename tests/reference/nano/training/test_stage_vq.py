"""The stages of the VQ model learn images by heart,
keep the latents' scale, and count empty background little."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import pytest
import torch

from reference.nano.recipe import STAGES, Stage
from reference.nano.training import stage_vq
from reference.nano.training.cells import (
    drawn,
    empty_cells,
    scenes_of,
)
from reference.nano.training.stage_vq import (
    EMPTY_SHARE,
    MISREAD,
    NEIGHBOURS,
    VQ_TRAINERS,
    apart,
    clusters,
    moved,
    nearest,
    scale_latents,
)
from reference.weights import load_star, resolve_checkpoint
from tests.helpers.small_star import overfit, small_star


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


@pytest.mark.slow
def test_the_vq_model_learns_images_by_heart(small_root: Path) -> None:
    """First whole, then made local, then the decoder alone from a new codebook."""
    star, _ = small_star(small_root)
    batch, device = scenes_of(0, batch=4), torch.device("cpu")
    found = {}
    for name, steps in {"vq": 60, "local": 60, "decoder": 40}.items():
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


def test_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(16, 4, generator=generator) * 10
    z = centres.repeat(200, 1) + 0.1 * torch.randn(3200, 4, generator=generator)
    found, counts = clusters(z, 64)
    assert (found[nearest(z, found)] - z).square().mean() < 0.02 and counts.sum() >= len(z)
