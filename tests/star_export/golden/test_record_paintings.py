"""Recorded paintings: what a file of them holds, in float32 and in 16 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.bundle.reader import Bundle
from engines.inputs.caption import Captions
from reference.weights import named_tensors, resolve_checkpoint
from star_export.golden.cases import cases_from_file
from star_export.golden.oracle import lazy_image_table
from star_export.golden.paintings import CASES, OUTPUTS, paintings_of
from star_export.golden.record import oracle_of
from star_export.golden.record_paintings import STEPS, Asked, record_paintings
from star_export.graph.precisions import PRECISIONS
from star_export.graph.wrappers import TABLE


def test_in_16_bits_the_noise_of_that_arithmetic_is_recorded(
    diffusion_checkpoint: Path, diffusion_bundle: Path, tmp_path: Path
) -> None:
    files = resolve_checkpoint(diffusion_checkpoint)
    config = files.config()
    tensors = dict(named_tensors(files, config))
    tensors[TABLE] = lazy_image_table(config, tensors)
    oracle = oracle_of(config, tensors, PRECISIONS["bf16"], rope_bf16=True)
    captions = Captions.from_bundle(Bundle.open(diffusion_bundle))
    assert captions
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.vq.codebook_size, (1, config.vq.image_tokens))
    image = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    asked = {"paint": Asked("a red cat", ids), "repaint": Asked("make it blue", ids, image)}
    path = tmp_path / "paintings.safetensors"
    record_paintings(oracle, captions, asked, seed=7, rope_bf16=True, path=path)
    for name, case in cases_from_file(path).items():
        assert set(case.inputs) == CASES[name] and set(case.outputs) == OUTPUTS == set(case.noise)
        assert len(case.outputs["latents"]) == STEPS
        assert all(1e-3 < float(noise) < 0.5 for noise in case.noise.values()), case.noise


def test_a_bundle_of_a_small_model_paints_the_images_that_it_draws(diffusion_bundle: Path) -> None:
    painting, edit = paintings_of(Bundle.open(diffusion_bundle)).values()
    assert painting.image is None and painting.painting.vq_guidance is None
    assert edit.image is not None and edit.painting.vq_guidance == 1.0 and edit.prompt != painting.prompt
    assert not np.array_equal(painting.image_ids, edit.image_ids)
    first, *_, last = painting.case.outputs["latents"]
    assert np.abs(first - last).max() > 0.1 and not painting.case.noise
