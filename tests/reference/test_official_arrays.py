"""The reference computes what the official code computed, with exact and with bfloat16 rotary frequencies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reference import tasks, vision
from reference.model import Star
from tests.helpers.official import CASES, SPECIAL, TEMPLATE, error, golden, names

LIMIT = 1e-3  # of the standard deviation; measured: 1.1e-5 on hidden states and logits, 2.2e-5 on images
BOTH = pytest.mark.parametrize("rope_bf16", [False, True], ids=["exact_rope", "bf16_rope"])


@pytest.fixture(scope="module")
def tokenizer(mini_checkpoint: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(mini_checkpoint / "Qwen2.5-VL-mini" / "tokenizer.json"))


def image_embeds(star: Star, rope_bf16: bool, case: str) -> tuple[Tensor, tuple[int, int]]:
    """Vision encoder output for a case's pixels, and its grid of merged patches."""
    _, grid_h, grid_w = golden(rope_bf16, f"{case}.grid_thw")[0].tolist()
    config, pixels = star.config.vision, golden(rope_bf16, f"{case}.pixel_values").reshape(-1, 1176)
    rotary = vision.rotary_cos_sin(config, grid_h=grid_h, grid_w=grid_w, rope_bf16=rope_bf16)
    windows = vision.window_ids(config, grid_h=grid_h, grid_w=grid_w)
    return star.vision_encoder(pixels, *rotary, windows), (grid_h // 2, grid_w // 2)


def check_generated(drawn: tasks.Generated, rope_bf16: bool, case: str) -> None:
    for name in ("prefill_embeds", "base_hidden", "head_in", "cfg_logits"):
        assert error(getattr(drawn, name), golden(rope_bf16, f"{case}.{name}")) <= LIMIT, name
    expected = (
        golden(rope_bf16, f"{case}.cfg_logits").argmax(-1).T
    )  # an edit's ids are not stored by themselves
    assert torch.equal(drawn.image_ids, expected)
    assert error(drawn.image.permute(0, 2, 3, 1), golden(rope_bf16, f"{case}.images")) <= LIMIT


@BOTH
@pytest.mark.parametrize("case", names("vq"))
def test_vq_encodes_and_decodes(stars: dict[bool, Star], rope_bf16: bool, case: str) -> None:
    star, indices = stars[rope_bf16], golden(rope_bf16, f"{case}.indices")
    image = golden(rope_bf16, f"{case}.image").permute(2, 0, 1)[None].float() / 127.5 - 1
    assert error(star.vq_encoder.latents(image), golden(rope_bf16, f"{case}.latent")) <= LIMIT
    assert torch.equal(star.vq_encoder(image), indices)
    assert error(star.vq_decoder(indices), golden(rope_bf16, f"{case}.decoded")) <= LIMIT


@BOTH
@pytest.mark.parametrize("case", names("generate"))
def test_generates(stars: dict[bool, Star], rope_bf16: bool, case: str) -> None:
    prompt = torch.cat([golden(rope_bf16, f"{case}.prompt_ids"), torch.tensor([SPECIAL.vision_start])])
    rows = tasks.guidance_rows(prompt.repeat(CASES[case]["num_images"], 1), SPECIAL)
    drawn = tasks.generate(
        stars[rope_bf16], rows, guidance=CASES[case]["cfg"], top_k=0, top_p=1.0, noise=None
    )
    assert torch.equal(drawn.image_ids, golden(rope_bf16, f"{case}.tokens"))
    check_generated(drawn, rope_bf16, case)


@BOTH
@pytest.mark.parametrize("case", names("reason"))
def test_reasons_and_generates(stars: dict[bool, Star], tokenizer, rope_bf16: bool, case: str) -> None:
    star, stored_rows = stars[rope_bf16], golden(rope_bf16, f"{case}.input_ids")
    question = torch.tensor([tokenizer.encode(TEMPLATE.format(CASES[case]["prompt"])).ids[:-1]])
    positions = tasks.mrope_position_ids(question[0], [], SPECIAL)
    assert torch.equal(positions, golden(rope_bf16, f"{case}.prefill_position_ids"))
    answer = tasks.answer(star, question, positions, None, max_new_tokens=CASES[case]["answer_tokens"])
    text = tokenizer.decode(answer.tolist())
    magic = tokenizer.encode(" Ultra HD, 4K, cinematic composition").ids
    prompt = [
        *question[0, :14].tolist(),
        *tokenizer.encode(text).ids,
        *magic,
        *question[0, -5:].tolist(),
        SPECIAL.vision_start,
    ]
    rows = tasks.guidance_rows(torch.tensor([prompt]), SPECIAL)
    assert torch.equal(rows, stored_rows)
    check_generated(
        tasks.generate(star, rows, guidance=CASES[case]["cfg"], top_k=0, top_p=1.0, noise=None),
        rope_bf16,
        case,
    )


@BOTH
@pytest.mark.parametrize("case", names("edit"))
def test_edits(stars: dict[bool, Star], tokenizer, rope_bf16: bool, case: str) -> None:
    from PIL import Image

    star, vq = stars[rope_bf16], stars[rope_bf16].config.vq
    embeds, grid = image_embeds(star, rope_bf16, case)
    assert error(embeds, golden(rope_bf16, f"{case}.image_embeds")) <= LIMIT
    prompt = torch.tensor([tokenizer.encode(TEMPLATE.format(CASES[case]["prompt"])).ids])
    rows = tasks.edit_ids(
        tasks.guidance_rows(prompt, SPECIAL),
        SPECIAL,
        insert_at=14,
        newline=198,
        image_tokens=vq.image_tokens,
        merged_patches=grid[0] * grid[1],
    )
    positions = tasks.mrope_position_ids(rows[0], [grid], SPECIAL, trailing=vq.image_tokens)
    assert torch.equal(positions[:, :, : rows.shape[1]], golden(rope_bf16, f"{case}.prefill_position_ids"))
    squashed = Image.fromarray(golden(rope_bf16, f"{case}.image").numpy()).resize(
        (vq.image_size,) * 2, Image.Resampling.BILINEAR
    )
    image = torch.from_numpy(np.array(squashed)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mixed = tasks.edit_embeds(star, rows, image_ids=star.vq_encoder(image)[0], image_embeds=embeds)
    drawn = tasks.generate(
        star,
        rows,
        guidance=CASES[case]["cfg"],
        top_k=0,
        top_p=1.0,
        noise=None,
        inputs_embeds=mixed,
        position_ids=positions,
    )
    check_generated(drawn, rope_bf16, case)


@BOTH
@pytest.mark.parametrize("case", names("understand"))
def test_answers(stars: dict[bool, Star], rope_bf16: bool, case: str) -> None:
    star, input_ids = stars[rope_bf16], golden(rope_bf16, f"{case}.input_ids")
    embeds, grid = image_embeds(star, rope_bf16, case)
    positions = tasks.mrope_position_ids(input_ids[0], [grid], SPECIAL)
    assert torch.equal(positions, golden(rope_bf16, f"{case}.position_ids"))
    mixed = tasks.prompt_embeds(star, input_ids, {SPECIAL.image_pad: embeds})
    assert error(mixed, golden(rope_bf16, f"{case}.prefill_embeds")) <= LIMIT
    hidden = tasks.decode(
        star.base_ar, mixed, positions, 0, star.base_ar.new_cache(1, capacity_tokens=input_ids.shape[1])
    )
    assert error(hidden, golden(rope_bf16, f"{case}.base_hidden")) <= LIMIT
    assert error(star.text_head(hidden[:, -1]), golden(rope_bf16, f"{case}.logits")) <= LIMIT
    new = tasks.answer(star, input_ids, positions, embeds, max_new_tokens=CASES[case]["new_tokens"])
    assert torch.equal(torch.cat([input_ids[0], new]), golden(rope_bf16, f"{case}.output_ids")[0])


@pytest.mark.parametrize("case", names("sampler"))
def test_filters_probabilities(case: str) -> None:
    logits, expected = golden(False, f"{case}.logits"), golden(False, f"{case}.probs")
    probabilities = tasks.filtered_probabilities(
        logits, int(golden(False, f"{case}.k")), float(golden(False, f"{case}.p"))
    )
    assert torch.equal(probabilities > 0, expected > 0)
    assert error(probabilities, expected) <= 1e-5


@pytest.mark.parametrize("case", names("edit"))
@pytest.mark.parametrize("angles_bf16", [False, True])
def test_the_vision_encoder_must_round_cosines_too(
    stars: dict[bool, Star], angles_bf16: bool, case: str
) -> None:
    """Exact angles fail, and so do rounded angles with exact cosines,
    on the released numbers: the switch is needed."""
    exact, expected = stars[False], golden(True, f"{case}.image_embeds")
    _, grid_h, grid_w = golden(True, f"{case}.grid_thw")[0].tolist()
    angles = vision.rotary_angles(exact.config.vision, grid_h=grid_h, grid_w=grid_w, rope_bf16=angles_bf16)
    windows = vision.window_ids(exact.config.vision, grid_h=grid_h, grid_w=grid_w)
    embeds = exact.vision_encoder(
        golden(True, f"{case}.pixel_values")[0], angles.cos(), angles.sin(), windows
    )
    assert error(embeds, expected) > LIMIT
