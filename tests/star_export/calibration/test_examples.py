"""Examples of a calibration: what the model decodes itself, and what a folder may hold.

docs/bad_inputs.md 64.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.errors import InputError
from engines.inputs.image_io import write_image
from engines.runtime.gumbel import Noise
from reference import tasks
from star_export.calibration import examples
from star_export.calibration.examples import PROMPTS, QUESTION, SEED, SHIPPED, decoded, draw, read_material

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)


def fed(miniature, text: str):
    prompt = miniature.chat.generate_prompt(text, num_images=1)
    embeds = miniature.star.token_embedding(torch.from_numpy(prompt.input_ids))
    return examples._Fed(embeds, torch.from_numpy(prompt.position_ids.copy()))


@pytest.mark.parametrize("window", [1, 5, 16])
def test_each_prompt_of_a_batch_is_drawn_as_it_is_drawn_alone(miniature, monkeypatch, window: int) -> None:
    """The prompts have different lengths, and one has positions that are not its slots, as an edit has."""
    star, sampling = miniature.star, miniature.model.sampling.generate
    generator = torch.Generator().manual_seed(1)
    packed = examples._Fed(
        torch.randn(2, 9, star.config.base_ar.hidden_size, generator=generator),
        (torch.arange(9) // 2).expand(3, 2, -1),
    )
    prompts = [fed(miniature, "a red cat"), fed(miniature, "the blue star and the green dog"), packed]
    assert len({prompt.embeds.shape[1] for prompt in prompts}) == 3
    monkeypatch.setattr(examples, "WINDOW", window)
    with torch.inference_mode():
        ids = draw(star, prompts, sampling)
    tokens = star.config.vq.image_tokens
    noise = Noise(SEED, images=3, window=1, size=star.config.vq.codebook_size)
    for i, prompt in enumerate(prompts):
        after = int(prompt.positions.max()) + 1 + torch.arange(tokens - 1).expand(3, 2, -1)
        alone = tasks.generate(
            star,
            torch.zeros(2, prompt.embeds.shape[1], dtype=torch.int64),
            inputs_embeds=prompt.embeds,
            position_ids=torch.cat([prompt.positions, after], 2),
            guidance=sampling.guidance,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            noise=lambda step, i=i: torch.from_numpy(noise.at(np.full(3, step))[i].copy()),
        )
        assert torch.equal(ids[i], alone.image_ids[0])
    assert len(ids.unique()) > 10


@pytest.fixture(scope="module")
def material():
    return examples.Material(
        prompts=("a red cat", "the blue star and the green dog"),
        edits=("change the color",),
        questions=("what is",),
    )


def test_examples_hold_prompts_images_and_answers_as_the_decoders_were_fed(miniature, material) -> None:
    star, sampling = miniature.star, miniature.model.sampling.generate
    found = decoded(star, miniature.chat, miniature.model, material, sampling)
    assert [example.image for example in found] == [True, True, True, False]
    with torch.inference_mode():
        prompts = [fed(miniature, text) for text in material.prompts]
        ids = draw(star, prompts, sampling)
        for example, prompt, drawn in zip(found, prompts, ids):
            after = prompt.embeds.shape[1]
            assert torch.equal(example.embeds[:, :after], prompt.embeds)
            image = star.image_embedding(drawn[:-1])  # its last token is fed to nothing
            assert torch.equal(example.embeds[0, after:], image)
            assert torch.equal(example.embeds[1, after:], image)
        for example in found:
            assert example.positions.shape == (3, *example.embeds.shape[:2])
        # What follows a question is what the base decoder says to all before it.
        answer = found[-1]
        cache = star.base_ar.new_cache(1, capacity_tokens=answer.embeds.shape[1])
        hidden = tasks.decode(star.base_ar, answer.embeds, answer.positions, 0, cache)
        words = star.text_head(hidden)[0].argmax(-1)
        fed_next = (star.token_embedding(words[:-1]) == answer.embeds[0, 1:]).all(-1)
        said = int(fed_next.flip(0).int().argmin())
        assert said == examples.ANSWER_TOKENS or said and int(words[-1]) in star.config.eos_token_ids


def test_the_same_material_gives_the_same_examples(miniature, material) -> None:
    material = replace(material, images=(IMAGE,))
    sampling = miniature.model.sampling.generate
    first, second = (
        decoded(miniature.star, miniature.chat, miniature.model, material, sampling) for _ in range(2)
    )
    assert all(torch.equal(a.embeds, b.embeds) for a, b in zip(first, second, strict=True))


def test_an_image_that_the_model_does_not_take_is_refused_before_anything_is_drawn(
    miniature, material, monkeypatch
) -> None:
    monkeypatch.setattr(examples, "draw", lambda *_, **__: pytest.fail("drawn"))
    line = replace(material, images=(np.zeros((2, 3000, 3), np.uint8),))
    with pytest.raises(InputError) as error:
        decoded(miniature.star, miniature.chat, miniature.model, line, miniature.model.sampling.generate)
    assert len(str(error.value).splitlines()) == 3


def test_a_folder_gives_prompts_edits_questions_and_images(tmp_path: Path) -> None:
    (tmp_path / PROMPTS).write_text(
        "a cat\n\nedit: make it blue\nwarning: a sign\nask: what is it?\nedit:\nedit: make it red\n a dog \n"
    )
    for name in ("b.PNG", "a.png"):
        write_image(tmp_path / name, IMAGE if name[0] == "a" else IMAGE[::-1].copy())
    (tmp_path / "notes.txt").write_bytes((tmp_path / "a.png").read_bytes())
    few, many = (read_material(tmp_path, SHIPPED, count, fewer=True) for count in (2, 8))
    assert few.prompts == ("a cat", "warning: a sign") and many.prompts == (*few.prompts, "a dog")
    assert (few.edits, many.edits) == (("make it blue",), ("make it blue", "make it red"))
    assert few.questions == many.questions == ("what is it?",)
    assert len(few.images) == 1 and len(many.images) == 2
    np.testing.assert_array_equal(few.images[0], IMAGE)


def test_what_a_folder_lacks_is_shipped(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", IMAGE)
    shipped = read_material(None, SHIPPED, 8)
    found = read_material(tmp_path, SHIPPED, 8)
    assert (len(shipped.prompts), len(shipped.edits), len(shipped.questions)) == (8, 2, 2)
    assert not shipped.images and len(found.images) == 1
    assert (found.prompts, found.edits, found.questions) == (
        *(shipped.prompts, shipped.edits, shipped.questions),
    )
    (tmp_path / PROMPTS).write_text("a cat")
    assert read_material(tmp_path, SHIPPED, 1).questions == (QUESTION,)


# Row 64
def test_more_prompts_than_there_are_is_an_error_that_says_how_many(tmp_path: Path) -> None:
    (tmp_path / PROMPTS).write_text("a cat\nedit: make it blue\na dog\n")
    with pytest.raises(InputError) as error:
        read_material(tmp_path, SHIPPED, 3)
    assert f"{tmp_path / PROMPTS}: expected 3 prompts to draw, got 2" in error.value.where
    assert "with 2 prompts or fewer" in error.value.fix and len(str(error.value).splitlines()) == 3
    assert read_material(tmp_path, SHIPPED, 2).prompts == ("a cat", "a dog")
    with pytest.raises(InputError, match="expected 1000 prompts to draw, got 32"):
        read_material(None, SHIPPED, 1000)
    assert len(read_material(None, SHIPPED, 1000, fewer=True).prompts) == 32


def nothing(folder: Path) -> None:
    (folder / "notes.txt").write_text("a cat")
    (folder / "a.gif").write_bytes(b"GIF89a")


def not_utf8(folder: Path) -> None:
    (folder / PROMPTS).write_bytes(b"\xff\xfea\x00")


def only_edits(folder: Path) -> None:
    (folder / PROMPTS).write_text("edit: make it blue\n\n")


def broken_image(folder: Path) -> None:
    write_image(folder / "a.png", IMAGE)
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:100])


def no_image(folder: Path) -> None:
    (folder / "a.jpg").write_text("<html>")


def absent(folder: Path) -> None:
    os.rmdir(folder)


def a_file(folder: Path) -> None:
    os.rmdir(folder)
    folder.write_text("a cat")


# Row 64
@pytest.mark.parametrize(
    ("plant", "words"),
    [
        (nothing, "expected prompts.txt, or images (.png, .jpg, .jpeg), got neither"),
        (not_utf8, "prompts.txt: expected a text file in UTF-8, got UnicodeDecodeError"),
        (only_edits, "prompts.txt: expected at least one line with a prompt to draw, got 1 lines"),
        (broken_image, "a.png"),
        (no_image, "a.jpg: expected PNG, JPEG or WebP"),
        (absent, "got: No such file or directory"),
        (a_file, "got: Not a directory"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path: Path, plant, words: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    plant(folder)
    with pytest.raises(InputError) as error:
        read_material(folder, SHIPPED, 4)
    assert words in error.value.where and str(folder) in error.value.where
    assert len(str(error.value).splitlines()) == 3
