"""The gate catches planted faults, refuses references that prove nothing, and raises no false alarm."""

from __future__ import annotations

import numpy as np
import pytest

from engines.errors import InputError, ParityError
from star_export.golden.compare import check, compare, excess

TOLERANCES = {"hidden_states": 2e-4, "present": 2e-4, "logits": 2e-4, "image": 2e-4, "image_ids": 0.0}
H, HEADS, D, C, S, LAYERS = 16, 4, 4, 12, 5, 2  # hidden, heads, head dim, capacity, tokens, layers


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def failing(candidate, reference):
    return [r.tensor for r in compare(candidate, reference, tolerances=TOLERANCES) if not r.passed]


def bf16(array):
    return ((array.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)


def decoder(seed, *, fault=None, dtype=np.float32, order=slice(None)):
    """A small numpy decoder with faults planted by name; `order` permutes sums, as another executor would."""
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return (rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32).astype(dtype)

    x, weights = draw(S, H) * 4, [[draw(H, H) for _ in range(4)] for _ in range(LAYERS)]
    outputs = {}
    mask = np.tril(np.ones((S, S), bool)) if fault != "mask dropped" else np.ones((S, S), bool)
    for i, (q, k, v, o) in enumerate(weights):
        if fault == "weight transposed" and i == 1:
            q = q.T
        if fault == "bf16 twice":
            q, k, v = (
                bf16(bf16(w.astype(np.float32)) * np.float32(1.1)).astype(dtype) / dtype(1.1)
                for w in (q, k, v)
            )
        projected = [
            (x[:, order] @ w[order]).reshape(S, HEADS, D).transpose(1, 0, 2) for w in (q, k, v)
        ]  # [h,S,D]
        angles = (np.arange(S) + (fault == "rope off by one" and i == 1) * np.eye(1, S, 2)[0])[
            :, None
        ] / np.array([1, 30.0])

        def rotate(t, angles=angles):
            a, b = t[..., :2], t[..., 2:]
            cos, sin = np.cos(angles), np.sin(angles)
            return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(dtype)

        query, key, value = rotate(projected[0]), rotate(projected[1]), projected[2]
        for name, new in (("key", key), ("value", value)):
            cache = np.zeros((HEADS, C, D), dtype)
            cache[:, :S] = new
            if fault == "last slot not written" and i == 0:
                cache[:, S - 1] = 0
            outputs[f"present.{i}.{name}"] = cache.astype(np.float32)
        scores = np.where(mask, query @ key.transpose(0, 2, 1) / dtype(2), -np.inf)
        weights_of = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (weights_of / weights_of.sum(-1, keepdims=True)) @ value
        update = mixed.transpose(1, 0, 2).reshape(S, H) @ o
        x = x if fault == "layer zeroed" and i == 1 else x + update
    outputs["hidden_states"] = x.astype(np.float32)
    if fault == "k and v swapped":
        outputs |= {"present.1.key": outputs["present.1.value"], "present.1.value": outputs["present.1.key"]}
    return outputs


IMAGE = np.random.default_rng(5).uniform(0.1, 0.9, (1, 3, 8, 8)).astype(np.float32)
ARRAY_FAULTS = {
    "channels bgr": lambda image: image[:, ::-1],
    "wrong mean and std": lambda image: (image - np.float32(0.48)) / np.float32(0.27),
    "fp16 overflow": lambda image: (image * 1e5).astype(np.float16).astype(np.float32) / np.float32(1e5),
}


DECODER_FAULTS = (
    "k and v swapped",
    "rope off by one",
    "mask dropped",
    "layer zeroed",
    "weight transposed",
    "bf16 twice",
    "last slot not written",
)


@pytest.mark.parametrize("fault", DECODER_FAULTS)
def test_faults_planted_in_a_decoder_fail(fault):
    assert not failing(decoder(0), decoder(0, dtype=np.float64))
    assert failing(decoder(0, fault=fault), decoder(0, dtype=np.float64))


@pytest.mark.parametrize("fault", ARRAY_FAULTS)
def test_faults_planted_in_a_image_fail(fault):
    with np.errstate(over="ignore"):
        assert failing({"image": ARRAY_FAULTS[fault](IMAGE)}, {"image": IMAGE}) == ["image"]


def test_no_false_alarm_in_200_clean_seeds():
    rng = np.random.default_rng(1)
    for seed in range(200):
        assert not failing(decoder(seed, order=rng.permutation(H)), decoder(seed, dtype=np.float64)), seed


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["candidate", "reference", "both"])
def test_numbers_that_are_not_finite_fail_on_either_side_and_on_both(bad, side):
    good, broken = normal(4, 8), normal(4, 8)
    broken[1, 2] = bad
    candidate = good if side == "reference" else broken
    reference = good if side == "candidate" else broken
    (result,) = compare({"logits": candidate}, {"logits": reference}, tolerances=TOLERANCES)
    assert not result.passed and "NaN or Inf" in result.fault and excess(result) == np.inf


def test_a_missing_an_extra_and_a_renamed_output_fail():
    x = normal(4, 8)
    assert failing({}, {"logits": x}) == ["logits"]
    assert failing({"logits": x, "hidden_states": x}, {"logits": x}) == ["hidden_states"]
    assert failing({"logit": x}, {"logits": x}) == ["logits", "logit"]


@pytest.mark.parametrize(
    "candidate",
    [
        normal(4, 8)[:1],
        normal(4, 8)[:, :1],
        normal(4, 8)[None],
        normal(4, 8).T,
        normal(4, 8).astype(np.float16),
        normal(4, 8).astype(np.float64),
        np.float32(0).reshape(()),
    ],
    ids=["row", "column", "rank", "transposed", "fp16", "fp64", "scalar"],
)
def test_broadcastable_shapes_and_other_types_fail(candidate):
    (result,) = compare({"logits": candidate}, {"logits": normal(4, 8)}, tolerances=TOLERANCES)
    assert not result.passed and "float32[4, 8]" in result.fault


def test_a_square_array_that_is_transposed_fails():
    assert failing({"logits": normal(8, 8).T.copy()}, {"logits": normal(8, 8)}) == ["logits"]


@pytest.mark.parametrize(
    "reference",
    [
        np.zeros((2, 3), np.float32),
        np.full((2, 3), 0.1, np.float32),
        np.zeros((0, 3), np.float32),
        np.ones(1, np.float32),
        np.zeros(4, np.int64),
        np.full(4, 7),
        np.zeros(1, np.int64),
    ],
)
def test_a_reference_that_proves_nothing_is_refused(reference):
    with pytest.raises(InputError, match="cannot prove anything"):
        compare({"logits": reference.copy()}, {"logits": reference}, tolerances=TOLERANCES)


def test_a_short_run_may_repeat_an_id():
    ids = np.full((1, 3), 21133)
    (result,) = compare({"image_ids": ids.copy()}, {"image_ids": ids}, tolerances=TOLERANCES)
    assert result.passed
    (other,) = compare({"image_ids": ids + 1}, {"image_ids": ids}, tolerances=TOLERANCES)
    assert not other.passed


def test_one_bad_element_in_a_million_fails_although_psnr_is_74_db():
    reference = np.random.default_rng(3).uniform(-1, 1, 10**6).astype(np.float32)
    candidate = reference.copy()
    candidate[123_456] += 0.2
    (result,) = compare({"image": candidate}, {"image": reference}, tolerances=TOLERANCES)
    assert not result.passed and result.psnr_db == pytest.approx(74, abs=0.5) and result.cosine > 0.999999


def test_ids_are_compared_one_by_one():
    ids = np.arange(16)
    other = ids.copy()
    other[3] = 9
    (result,) = compare({"image_ids": other}, {"image_ids": ids}, tolerances=TOLERANCES)
    assert not result.passed and result.value == 1 / 16
    assert compare({"image_ids": ids.copy()}, {"image_ids": ids}, tolerances=TOLERANCES)[0].passed


def test_a_limit_is_met_at_the_limit_and_not_above():
    reference = np.array([-1.0, 1.0])  # standard deviation 1
    at, above = (
        compare({"x": reference + e}, {"x": reference}, tolerances={"x": 0.25})[0] for e in (0.25, 0.2500001)
    )
    assert at.passed and at.value == 0.25 and not above.passed


def test_metrics_are_those_of_their_names():
    reference, candidate = np.array([3.0, -4.0]), np.array([3.0, -3.0])
    (result,) = compare({"x": candidate}, {"x": reference}, tolerances={"x": 1.0})
    assert (
        result.max_abs == 1
        and result.value == pytest.approx(1 / 3.5)
        and result.rel_rms == pytest.approx(1 / 5)
    )
    assert result.cosine == pytest.approx(21 / (5 * np.sqrt(18)))
    assert result.psnr_db == pytest.approx(20 * np.log10(4 * np.sqrt(2)))


def test_check_raises_the_worst_with_tensor_limit_and_value():
    x = normal(4, 8)
    candidate = {"logits": x + np.float32(1e-3), "hidden_states": x + np.float32(1)}
    results = compare(candidate, {"logits": x, "hidden_states": x}, tolerances=TOLERANCES)
    with pytest.raises(ParityError, match="differ from the reference") as caught:
        check(results, where="text_head: case 2")
    assert caught.value.exit_code == 4
    for part in ("text_head: case 2", "hidden_states", "at most 0.0002", "1 more of 2"):
        assert part in caught.value.where
    check(compare({"logits": x}, {"logits": x}, tolerances=TOLERANCES), where="text_head")
