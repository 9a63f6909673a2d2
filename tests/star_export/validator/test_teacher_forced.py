"""Teacher-forced logits are those that the image was drawn from, and see no later token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engines.errors import InputError
from engines.inputs.prompt import Prompt
from engines.runtime.gumbel import gumbel_noise
from engines.runtime.sampler import sample
from engines.runtime.star import Star
from star_export.validator import teacher_forced
from star_export.validator.teacher_forced import forced_logits

SEED, CFG = 3, 2.5


@pytest.fixture(scope="module")
def star(mini_bundle: Path) -> Iterator[Star]:
    with Star(mini_bundle) as star:
        yield star


@pytest.fixture(scope="module")
def prompt(star: Star) -> Prompt:
    return star.chat.generate_prompt("a red cat", num_images=2)


@pytest.fixture(scope="module")
def drawn(star: Star) -> np.ndarray:
    """Two images of the prompt, each with its own noise."""
    return star.generate("a red cat", cfg=CFG, top_k=20, top_p=0.9, seed=SEED, num_images=2).image_ids


def test_drawing_from_them_gives_the_image_again(star: Star, prompt: Prompt, drawn: np.ndarray) -> None:
    """Token by token, with guidance from both rows and each image's own noise."""
    logits = forced_logits(star, prompt, drawn, guidance=CFG)
    assert logits.shape == (*drawn.shape, star.model.codebook_size) and logits.dtype == np.float32
    for image, ids in enumerate(drawn):
        noise = gumbel_noise(SEED, image=image, steps=range(len(ids)), size=logits.shape[-1])
        assert (sample(logits[image], top_k=20, top_p=0.9, noise=noise) == ids).all()
    other = forced_logits(star, prompt, drawn, guidance=1.0)
    assert np.abs(other - logits).max() > 1e-3 * logits.std()


def test_a_position_sees_the_tokens_before_it_only(star: Star, prompt: Prompt, drawn: np.ndarray) -> None:
    at, other = 5, drawn.copy()
    other[0, at] = (other[0, at] + 1) % star.model.codebook_size
    before, after = (forced_logits(star, prompt, ids, guidance=CFG) for ids in (drawn, other))
    assert np.allclose(before[0, : at + 1], after[0, : at + 1], atol=1e-5)
    assert np.abs(before[0, at + 1] - after[0, at + 1]).max() > 1e-3 * before.std()
    assert np.allclose(before[1], after[1], atol=1e-5)


def test_the_number_of_positions_at_once_changes_nothing(
    star: Star, prompt: Prompt, drawn: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a plan holds few positions."""
    whole = forced_logits(star, prompt, drawn, guidance=CFG)
    monkeypatch.setattr(teacher_forced, "HEAD_POSITIONS", 3)
    for name in ("base_ar", "stacked_ar"):
        monkeypatch.setattr(star.session(name), "prefill_tokens", 7)
    assert np.allclose(whole, forced_logits(star, prompt, drawn, guidance=CFG), atol=1e-5)


def test_an_id_outside_of_the_codebook_is_refused(star: Star, prompt: Prompt, drawn: np.ndarray) -> None:
    with pytest.raises(InputError, match="An id is not a row of the table"):
        forced_logits(star, prompt, drawn + star.model.codebook_size, guidance=CFG)
