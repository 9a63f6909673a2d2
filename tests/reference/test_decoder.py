"""The static cache gives the numbers of one prefill,
whatever the order of writing; unused slots never matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from reference.decoder import Cache, Decoder, kv_cache_attention, rotary_frequencies
from reference.model import Star
from tests.helpers.official import error

CAPACITY, LENGTH, LIMIT = 24, 17, 1e-5  # measured: 2e-6


def poisoned(decoder: Decoder, rows: int, *, capacity_tokens: int = CAPACITY) -> Cache:
    cache = decoder.new_cache(rows, capacity_tokens=capacity_tokens)
    return [(key.fill_(torch.nan), value.fill_(torch.nan)) for key, value in cache]


def inputs(rows: int, length: int = LENGTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    embeds = torch.randn(rows, length, 64, generator=generator)
    return embeds, torch.randint(
        0, 300, (3, rows, length), generator=generator
    )  # positions need not be slots


def run(decoder: Decoder, embeds: Tensor, positions: Tensor, first: int | list[int], cache: Cache) -> Tensor:
    writes = torch.tensor([first] * embeds.shape[0] if isinstance(first, int) else first)
    return decoder(embeds, positions, writes, cache)[0]


@pytest.fixture(params=["base_ar", "stacked_ar"])
def decoder(request: pytest.FixtureRequest, star: Star) -> Decoder:
    return getattr(star, request.param)


def test_poison_does_not_leak(decoder: Decoder) -> None:
    embeds, positions = inputs(2)
    clean = run(decoder, embeds, positions, 0, decoder.new_cache(2, capacity_tokens=LENGTH))
    assert torch.equal(
        run(decoder, embeds, positions, 0, poisoned(decoder, 2, capacity_tokens=LENGTH)), clean
    )
    assert error(run(decoder, embeds, positions, 0, poisoned(decoder, 2)), clean) <= LIMIT


@pytest.mark.parametrize("steps", [[1] * LENGTH, [5, 1, 1, 4, 6], [16, 1]])
def test_incremental_equals_prefill(decoder: Decoder, steps: list[int]) -> None:
    embeds, positions = inputs(3)
    whole_cache, cache = poisoned(decoder, 3), poisoned(decoder, 3)
    whole, parts, first = run(decoder, embeds, positions, 0, whole_cache), [], 0
    for length in steps:
        new = slice(first, first + length)
        parts.append(run(decoder, embeds[:, new], positions[:, :, new], first, cache))
        first += length
    assert error(torch.cat(parts, dim=1), whole) <= LIMIT
    for pair, whole_pair in zip(cache, whole_cache):
        for part, expected in zip(pair, whole_pair):
            assert error(part[:, :, :LENGTH], expected[:, :, :LENGTH]) <= LIMIT
            assert part[:, :, LENGTH:].isnan().all()  # nothing was written behind


def test_rewind_forgets_what_came_later(decoder: Decoder) -> None:
    embeds, positions = inputs(2)
    cache = poisoned(decoder, 2)
    expected = run(decoder, embeds, positions, 0, poisoned(decoder, 2))
    run(decoder, embeds, positions, 0, cache)
    run(decoder, embeds[:, :6].flip(1), positions[:, :, 5:11], 9, cache)  # a wrong continuation
    again = run(
        decoder, embeds[:, 9:12], positions[:, :, 9:12], 9, cache
    )  # slots from 12 on still hold the wrong one
    assert error(again, expected[:, 9:12]) <= LIMIT


def test_rows_may_be_at_different_slots(decoder: Decoder) -> None:
    embeds, positions = inputs(2)
    lengths, cache, expected = [7, 11], poisoned(decoder, 2), []
    for row, length in enumerate(lengths):
        alone = run(
            decoder,
            embeds[row : row + 1, : length + 1],
            positions[:, row : row + 1, : length + 1],
            0,
            poisoned(decoder, 1),
        )
        expected.append(alone[0, -1])
        row_cache = [(key[row : row + 1], value[row : row + 1]) for key, value in cache]
        run(decoder, embeds[row : row + 1, :length], positions[:, row : row + 1, :length], 0, row_cache)
    last = torch.stack([embeds[row, length] for row, length in enumerate(lengths)])[:, None]
    last_positions = torch.stack([positions[:, row, length] for row, length in enumerate(lengths)], dim=1)[
        ..., None
    ]
    assert error(run(decoder, last, last_positions, lengths, cache)[:, 0], torch.stack(expected)) <= LIMIT


def test_the_cache_is_written_in_place(decoder: Decoder) -> None:
    embeds, positions = inputs(1)
    cache = decoder.new_cache(1, capacity_tokens=CAPACITY)
    _, present = decoder(embeds, positions, torch.tensor([0]), cache)
    for pair, past in zip(present, cache):
        assert pair[0] is past[0] and pair[1] is past[1]


def test_the_last_slot_fits_and_the_next_is_refused(decoder: Decoder) -> None:
    embeds, positions = inputs(1, CAPACITY)
    cache = decoder.new_cache(1, capacity_tokens=CAPACITY)
    run(decoder, embeds[:, :-1], positions[:, :, :-1], 0, cache)
    assert run(decoder, embeds[:, -1:], positions[:, :, -1:], CAPACITY - 1, cache).isfinite().all()
    with pytest.raises(IndexError):
        run(decoder, embeds[:, -1:], positions[:, :, -1:], CAPACITY, cache)


def test_attention_is_softmax_over_visible_slots() -> None:
    """Against the formula written out, heads sharing keys and values in groups."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, 4, 2, 8, generator=generator)
    key, value = (torch.randn(1, 2, 2, 8, generator=generator) for _ in range(2))
    past_key, past_value = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(2))
    mask = (torch.arange(6) <= torch.tensor([3, 4])[:, None])[None, None]
    output, present_key, present_value = kv_cache_attention(
        query, key, value, past_key, past_value, torch.tensor([3]), mask
    )
    assert torch.equal(present_key[:, :, 3:5], key) and torch.equal(present_value[:, :, 3:5], value)
    for head in range(4):
        for i in range(2):
            scores = present_key[0, head // 2, : 4 + i] @ query[0, head, i] / 8**0.5
            torch.testing.assert_close(
                output[0, head, i], scores.softmax(-1) @ present_value[0, head // 2, : 4 + i]
            )


def test_rotary_constants_survive_casts(stars: dict[bool, Star]) -> None:
    config = stars[True].base_ar.config
    for rope_bf16 in (False, True):
        decoder = Decoder(config, rope_bf16=rope_bf16).to(torch.bfloat16)
        expected = rotary_frequencies(config, rope_bf16=rope_bf16)
        assert decoder.rotary.inv_freq.dtype == torch.float32 and torch.equal(
            decoder.rotary.inv_freq, expected
        )
        assert decoder.norm.weight.dtype == torch.bfloat16
    rounded, exact = (rotary_frequencies(config, rope_bf16=rope_bf16) for rope_bf16 in (True, False))
    assert torch.equal(rounded, exact.bfloat16().float()) and not torch.equal(rounded, exact)


def test_bfloat16_stays_near_float32(star: Star) -> None:
    embeds, positions = inputs(2)
    expected = run(star.base_ar, embeds, positions, 0, star.base_ar.new_cache(2, capacity_tokens=LENGTH))
    half = Decoder(star.base_ar.config, rope_bf16=False)
    half.load_state_dict(star.base_ar.state_dict())
    half = half.to(torch.bfloat16).requires_grad_(False)
    got = run(half, embeds.bfloat16(), positions, 0, half.new_cache(2, capacity_tokens=LENGTH))
    assert got.dtype == torch.bfloat16 and error(got.float(), expected) <= 0.1  # measured: 0.043


def test_positions_turn_their_own_dimensions(star: Star) -> None:
    """Moving one axis changes exactly the dimensions that mrope_section gives it."""
    rotary, sections = star.base_ar.rotary, star.base_ar.config.mrope_section
    base = torch.zeros(3, 1, 1, dtype=torch.int64)
    bounds = [0, sections[0], sections[0] + sections[1], sum(sections)]
    for axis in range(3):
        moved = base.clone()
        moved[axis] = 5
        changed = (rotary(moved)[1] != rotary(base)[1])[0, 0]
        assert changed.tolist() == [bounds[axis] <= d < bounds[axis + 1] for d in range(sum(sections))]
