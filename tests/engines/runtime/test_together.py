"""Images that are drawn together are those that are drawn alone, and whoever watches may end a draw."""

from __future__ import annotations

import numpy as np
import pytest

from engines.errors import InputError
from engines.runtime.star import Star
from engines.runtime.together import Together

PROMPTS = ["a red cat", "a photo of a red cat on a white sofa in the sun", "two dogs"]
SETTINGS = {"guidance": 1.5, "top_k": 50, "top_p": 0.9}
IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=[1, 4])
def together(mini_bundle, request):
    with Star(mini_bundle, window=request.param) as star:
        yield Together(star)


@pytest.fixture(scope="module")
def prepared(together):
    return [*map(together.generation, PROMPTS), together.editing(IMAGE, "make it blue")]


def test_prompts_of_all_lengths_and_edits_are_drawn_together_as_alone(together, prepared):
    assert len({one.embeds.shape[1] for one in prepared}) == 4
    drawn = together.draw(prepared, [7, 8, 9, 7], **SETTINGS)
    for ids, one, seed in zip(drawn.image_ids, prepared, [7, 8, 9, 7]):
        np.testing.assert_array_equal(together.draw([one], [seed], **SETTINGS).image_ids[0], ids)
    assert len({ids.tobytes() for ids in drawn.image_ids}) == 4


def test_they_are_the_images_of_the_same_seed_from_the_command_line(together, prepared):
    star, names = together.star, {"cfg": 1.5, "top_k": 50, "top_p": 0.9}
    drawn = together.draw(prepared, [7, 8, 9, 10], **SETTINGS).image_ids
    for ids, prompt, seed in zip(drawn, PROMPTS, (7, 8, 9)):
        np.testing.assert_array_equal(star.generate(prompt, seed=seed, **names).image_ids[0], ids)
    edited = star.edit(IMAGE, "make it blue", seed=10, **names)
    np.testing.assert_array_equal(edited.image_ids[0], drawn[3])
    np.testing.assert_array_equal(edited.images, together.images(drawn[3:]))


def test_without_seeds_there_is_no_noise(together, prepared):
    greedy = {"guidance": 1.5, "top_k": 1, "top_p": 1.0}
    drawn = together.draw(prepared[:2], None, **greedy).image_ids
    alone = together.star.generate(PROMPTS[0], greedy=True, cfg=1.5).image_ids[0]
    np.testing.assert_array_equal(drawn[0], alone)


def test_a_watcher_sees_what_is_known_and_ends_the_draw_within_a_step(together, prepared):
    final = together.draw(prepared, [1, 2, 3, 4], **SETTINGS).image_ids
    seen = []

    def watch(known, ids):
        seen.append(known.copy())
        for row, count in enumerate(known):
            np.testing.assert_array_equal(ids()[row, :count], final[row, :count])
        if known.min() > 8:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        together.draw(prepared, [1, 2, 3, 4], **SETTINGS, watch=watch)
    assert seen[-1].min() > 8 >= seen[-2].min()
    again = together.draw(prepared, [1, 2, 3, 4], **SETTINGS).image_ids
    np.testing.assert_array_equal(again, final)


def test_an_answer_is_heard_token_by_token_and_fits_the_positions(together):
    heard = []
    answer = together.answer(IMAGE, "what is it?", max_new_tokens=10**6, on_token=heard.append)
    assert heard == answer.ids.tolist() and together.answer(None, "what?", max_new_tokens=3).ids.size <= 3
    reasoned = together.generation("a riddle", reason=True, max_new_tokens=4)
    assert isinstance(reasoned.answer, str)


def test_a_prompt_that_is_too_long_is_refused_before_it_is_embedded(together):
    with pytest.raises(InputError, match="too long"):
        together.generation("cat " * together.model.max_positions)


def test_warming_up_takes_one_step_of_the_largest_batch(together, monkeypatch):
    steps, draw = [], together.draw

    def drawing(prepared, seeds, **settings):
        watch = settings.pop("watch")

        def counting(known, ids):
            steps.append(len(known))
            watch(known, ids)

        return draw(prepared, seeds, watch=counting, **settings)

    monkeypatch.setattr(together, "draw", drawing)
    together.warm_up(images=3)
    assert steps == [3]


def test_only_a_plan_limits_a_batch(together):
    assert together.images_limit() is None
