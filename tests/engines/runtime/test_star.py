"""The runtime checks settings and lengths, names its state, and runs the reference's loops.

tests/test_end_to_end.py compares the ids themselves.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError, MissingError, UsageError
from engines.inputs.prompt import Prompt, text_positions
from engines.runtime.decode import check_window
from engines.runtime.star import Star
from engines.sessions import open_session


@pytest.fixture(scope="module")
def star(mini_bundle):
    with Star(mini_bundle) as opened:
        yield opened


def rows(length: int) -> np.ndarray:
    return np.arange(2 * length, dtype=np.int64).reshape(2, length)


def draw(star: Star, ids: np.ndarray, tokens: int = 3, **changes) -> np.ndarray:
    settings = {
        "guidance": 3.0,
        "top_k": 1,
        "top_p": 1.0,
        "seed": None,
        "tokens": tokens,
    } | changes
    return star.generate_ids(ids, **settings)


def test_the_same_seed_gives_the_same_images_and_another_others(star):
    first, again, other = (star.generate("a photo of a red cat", seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.images, again.images)
    assert (first.image_ids != other.image_ids).any() and first.images.shape == (1, 64, 64, 3)


def test_images_of_one_call_do_not_depend_on_each_other(star):
    """Each of N images has its own noise; greedy ones are all alike, and alike the image drawn alone."""
    alone, three = (star.generate("a red dog", greedy=True, num_images=n) for n in (1, 3))
    np.testing.assert_array_equal(three.image_ids, np.repeat(alone.image_ids, 3, axis=0))
    drawn = star.generate("a red dog", num_images=2)
    assert (drawn.image_ids[0] != drawn.image_ids[1]).any()


def test_an_empty_answer_draws_the_prompt_itself(star, monkeypatch):
    monkeypatch.setattr(star.chat, "text", lambda ids: "")
    reasoned = star.generate("a red dog", greedy=True, reason=True, max_new_tokens=1)
    np.testing.assert_array_equal(reasoned.image_ids, star.generate("a red dog", greedy=True).image_ids)


def test_a_image_is_a_file_or_an_array(star, tmp_path):
    from engines.inputs.image_io import write_image

    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    write_image(tmp_path / "p.png", image)
    by_file, by_array = (
        star.ask(given, "what is a dog?", max_new_tokens=3).ids for given in (tmp_path / "p.png", image)
    )
    np.testing.assert_array_equal(by_file, by_array)


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"cfg": float("nan")}, "cfg"),
        ({"cfg": float("inf")}, "cfg"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"num_images": 0}, "num_images"),
        ({"num_images": 10**6}, "num_images"),
        ({"reason": True, "max_new_tokens": 0}, "max_new_tokens"),
        ({"reason": True, "max_new_tokens": 10**9}, "max_new_tokens"),
        ({"seed": 1.5}, "seed"),
        ({"seed": True}, "seed"),
        ({"seed": "7"}, "seed"),
        ({"top_k": True}, "top_k"),
        ({"top_k": 7.0}, "top_k"),
        ({"num_images": 1.0}, "num_images"),
        ({"num_images": True}, "num_images"),
    ],
)
def test_a_setting_out_of_range_is_named(star, changes, name):
    with pytest.raises(UsageError) as caught:
        star.generate("a cat", **changes)
    assert name in caught.value.where


@pytest.mark.parametrize("threads", [0, -1, 10**6, 1.0, True, "2"])
def test_a_number_of_threads_is_one_that_the_machine_has(mini_bundle, threads):
    with pytest.raises(UsageError, match="threads is out of range"):
        Star(mini_bundle, threads=threads)
    with pytest.raises(UsageError, match="threads is out of range"):
        open_session(Bundle.open(mini_bundle), "vq_decoder", threads=threads)


def test_only_a_backend_on_the_cpu_has_a_number_of_threads(mini_bundle):
    with pytest.raises(UsageError, match="no number of threads") as caught:
        Star(mini_bundle, backend="tensorrt:rtx-4090", threads=1)
    assert "tensorrt:rtx-4090" in caught.value.where


def test_one_thread_draws_the_same_image(star, mini_bundle):
    with Star(mini_bundle, threads=1) as single:
        drawn = single.generate("a red dog", seed=3)
        session = single.session("vq_decoder").inference_session
    assert session.get_session_options().intra_op_num_threads == 1
    np.testing.assert_array_equal(drawn.images, star.generate("a red dog", seed=3).images)


def test_top_k_beyond_the_codebook_is_all_of_it(star):
    np.testing.assert_array_equal(
        star.generate("a cat", top_k=10**6).image_ids, star.generate("a cat", top_k=1024).image_ids
    )


# Row 42
@pytest.mark.parametrize("prompt", ["", "   ", "\n"])
def test_an_empty_prompt_is_refused(star, prompt):
    image = np.full((56, 56, 3), 9, np.uint8)
    for call in (
        lambda: star.generate(prompt),
        lambda: star.edit(image, prompt),
        lambda: star.ask(image, prompt),
    ):
        with pytest.raises(InputError, match="empty"):
            call()


@pytest.mark.parametrize("id", [-1, 151_936, 2**62])
def test_an_id_outside_the_vocabulary_is_refused(star, id):
    ids = rows(4)
    ids[1, 2] = id
    with pytest.raises(InputError, match="vocabulary") as caught:
        draw(star, ids)
    assert "151935" in caught.value.where and str(id) in caught.value.where
    with pytest.raises(InputError, match="vocabulary"):
        star.answer_ids(ids[1:], np.zeros((3, 1, 4), np.int64), max_new_tokens=1)


@pytest.mark.parametrize(
    "ids",
    [
        np.zeros((2, 0), np.int64),
        np.zeros(4, np.int64),
        np.zeros((2, 4), np.int32),
        np.zeros((2, 4), ">i8"),
        np.zeros((4, 8), np.int64)[:, ::2],
        [[1, 2]],
    ],
)
def test_rows_of_another_kind_are_refused(star, ids):
    with pytest.raises(InputError) as caught:
        draw(star, ids)
    assert "expected" in caught.value.where and "got" in caught.value.where


def test_a_sequence_fits_up_to_the_positions_and_not_one_more(star):
    limit = star.model.max_positions
    assert draw(star, rows(limit - 2)).shape == (1, 3)  # L + n - 1 slots: the last id is not fed back
    with pytest.raises(InputError) as caught:
        draw(star, rows(limit - 1))
    assert str(limit) in caught.value.where and str(limit + 1) in caught.value.where


def test_a_long_prompt_is_refused_with_both_numbers_before_anything_is_loaded(mini_bundle):
    with Star(mini_bundle) as star, pytest.raises(InputError, match="too long") as caught:
        star.generate("cat " * star.model.max_positions)
    assert str(star.model.max_positions) in caught.value.where and not star.loaded.open


# Row 43
def test_use_after_close_names_the_state(mini_bundle):
    star = Star(mini_bundle)
    star.close()
    star.close()
    with pytest.raises(InputError, match="closed"):
        star.generate("a cat")


def test_an_unknown_backend_lists_the_valid_ones(mini_bundle):
    with pytest.raises(UsageError, match="No such backend") as caught:
        Star(mini_bundle, backend="cuda")
    assert "onnxruntime-cuda" in caught.value.where


def test_a_bundle_of_some_components_says_which_are_missing(tmp_path):
    from tests.helpers.tiny_bundle import write_tiny_bundle

    with pytest.raises(InputError):  # its tokenizer is none
        Star(write_tiny_bundle(tmp_path / "b"))


def test_progress_is_told_step_by_step(star, mini_bundle):
    seen = []
    star.generate("a cat", progress=lambda what, done, total: seen.append((what, done, total)))
    assert seen[0] == ("draw, in tokens", 1, 16) and seen[-1][1:] == (16, 16)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert all(re.fullmatch(r"draw, in tokens, \d+\.\d a forward", what) for what, *_ in seen[1:])
    seen.clear()
    with Star(mini_bundle, window=1) as one:
        one.generate("a cat", progress=lambda what, done, total: seen.append((what, done, total)))
    assert seen == [("draw, in tokens", i + 1, 16) for i in range(16)]


@pytest.mark.parametrize("window", [2, 4, 8, 16])
def test_the_window_changes_the_forwards_and_not_the_ids(star, mini_bundle, window):
    """Of images at their own pace, of edits with their three axes of positions, sampled and greedy."""
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    with Star(mini_bundle, window=1) as one, Star(mini_bundle, window=window) as more:
        for draw_ids in (
            lambda star: star.generate("a cat", seed=3, num_images=3).image_ids,
            lambda star: star.generate("a cat", seed=3, top_k=2, num_images=2).image_ids,
            lambda star: star.generate("a cat", greedy=True).image_ids,
            lambda star: star.edit(image, "make it blue", seed=5, top_k=3).image_ids,
        ):
            np.testing.assert_array_equal(draw_ids(more), draw_ids(one))


def test_the_benchmark_says_how_many_tokens_a_forward_gives(mini_bundle):
    from engines.bench import bench

    with Star(mini_bundle, window=4) as star:
        measured = bench(star, repeats=2)
    assert measured.window == 4 and 1 <= measured.tokens_per_forward <= 4 and len(measured.ratios) == 1


def test_a_window_takes_fewer_forwards(mini_bundle):
    """The miniature repeats itself when it is greedy, so guesses come true."""
    with Star(mini_bundle, window=8) as star:
        loop = star.image_loop(num_images=1, length=4, tokens=16)
        embeds = star.embedded(Prompt.of_text(rows(4)))
        loop.draw(embeds, text_positions(2, 4), guidance=1.0, top_k=1, top_p=1.0, seed=None)
        assert loop.forwards < 15


# Row 61
@pytest.mark.parametrize("window", [0, -1, 17])
def test_a_window_out_of_range_is_named(mini_bundle, window):
    with pytest.raises(UsageError, match="window: expected a whole number from 1 to 16"):
        Star(mini_bundle, window=window)


def test_a_plan_for_fewer_positions_refuses_the_window_by_name():
    head = SimpleNamespace(prefill_tokens=1, spec=SimpleNamespace(graph="image_head/model.onnx"))
    check_window(1, head)
    with pytest.raises(UsageError, match="window: expected 1 to 1, got 4, as the plan of image_head"):
        check_window(4, head)


# Row 62
def test_noise_that_exceeds_the_memory_is_refused_before_the_work(mini_bundle):
    """128 images of 16 tokens per forward have 8.4 MB of noise each way with 1,024 ids."""
    with Star(mini_bundle, window=16, memory=20_000_000) as star, pytest.raises(MissingError, match="memory"):
        star.generate("a cat", num_images=128)


def test_the_benchmark_measures_what_it_says(mini_bundle):
    from engines.bench import PROMPT, bench

    with Star(mini_bundle, window=1) as star:
        measured = bench(star, repeats=3)
    slots = star.chat.generate_prompt(PROMPT, num_images=1).input_ids.shape[1] + 16 // 2
    assert measured.window == 1 and measured.tokens_per_forward == 1
    timings = {timing.name: timing for timing in measured.timings}
    assert {"base_ar", "stacked_ar", "image_head", "decode step", "vq_decoder"} <= set(
        timings
    ) and measured.bandwidth > 1e9
    weights = sum(star.bundle.manifest.files[name].size for name in star.bundle.weights("base_ar"))
    assert (
        timings["base_ar"].read_bytes == weights + 2 * slots * 4 * 2 * (2 * 16) * 4
    )  # rows, slots, layers, key and value, heads x size, float32
    step = timings["decode step"]
    assert (
        step.share == pytest.approx(step.read_bytes / measured.bandwidth / (step.ms / 1e3))
        and len(measured.ratios) == 2
    )
