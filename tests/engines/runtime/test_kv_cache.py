"""The numpy cache is the reference's, and never wraps."""

import numpy as np
import pytest
import torch

from engines.errors import InputError
from engines.runtime.kv_cache import Slots, kv_cache_attention
from reference.decoder import kv_cache_attention as reference

RNG = np.random.default_rng(0)


def tensors(rows, tokens, capacity, *, heads=4, kv_heads=2, size=8):
    normal = RNG.standard_normal
    return [
        x.astype(np.float32)
        for x in (
            normal((rows, heads, tokens, size)),
            normal((rows, kv_heads, tokens, size)),
            normal((rows, kv_heads, tokens, size)),
            normal((rows, kv_heads, capacity, size)),
            normal((rows, kv_heads, capacity, size)),
        )
    ]


@pytest.mark.parametrize("tokens, indices", [(1, [0, 0]), (1, [7, 3]), (3, [2, 5]), (8, [0, 0])])
def test_the_numpy_definition_is_the_references(tokens, indices):
    arrays, indices = tensors(2, tokens, 8), np.array(indices)
    output, key, value = kv_cache_attention(*arrays, indices)
    mask = torch.tensor(np.arange(8) <= (indices[:, None] + np.arange(tokens))[..., None])[:, None]
    expected = reference(*(torch.tensor(x) for x in arrays), torch.tensor(indices), mask)
    for got, wanted in zip((output, key, value), expected):
        np.testing.assert_allclose(got, wanted.numpy(), atol=1e-6)


def test_steps_equal_one_prefill_and_unused_slots_do_not_matter():
    query, key, value, past_key, past_value = tensors(1, 5, 9)
    whole, *_ = kv_cache_attention(query, key, value, past_key, past_value, np.array([0]))
    past_key, past_value = np.full_like(past_key, np.nan), np.full_like(past_value, np.nan)
    for i in range(5):
        step = np.s_[:, :, i : i + 1]
        output, past_key, past_value = kv_cache_attention(
            query[step], key[step], value[step], past_key, past_value, np.array([i])
        )
        np.testing.assert_allclose(output, whole[step], atol=1e-6)
    assert np.isnan(past_key[:, :, 5:]).all()


@pytest.mark.parametrize("index, tokens", [(8, 1), (7, 2), (0, 9), (-1, 1)])
def test_a_write_beyond_the_capacity_is_refused_with_both_numbers(index, tokens):
    with pytest.raises(InputError, match=rf"0 to 8, got {tokens} from {index} on"):
        kv_cache_attention(*tensors(1, tokens, 8), np.array([index]))


# Row 42
def test_slots_fill_to_the_capacity_and_not_beyond():
    slots = Slots(8)
    assert [slots.take(5), slots.take(2), slots.take(1)] == [0, 5, 7]
    with pytest.raises(InputError, match="0 to 8, got 1 from 8 on"):
        slots.take(1)
    assert slots.used_tokens == 8
    slots.rewind(6)
    assert slots.take(2) == 6
    with pytest.raises(InputError):
        Slots(8).take(9)
    with pytest.raises(InputError):
        Slots(8).take(0)


@pytest.mark.parametrize("to", [-1, 6])
def test_a_rewind_to_what_was_never_written_is_refused(to):
    slots = Slots(8)
    slots.take(5)
    with pytest.raises(InputError, match=f"0 to 5 tokens, got {to}"):
        slots.rewind(to)
