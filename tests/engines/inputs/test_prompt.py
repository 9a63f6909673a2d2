"""Prompt rows and positions are the official ones, id by id."""

import re
import resource

import numpy as np
import pytest

from engines.bundle.files import read_text
from engines.errors import InputError
from engines.inputs.prompt import MAGIC_SUFFIX, Chat, check_length, positions_with_grid, text_positions
from engines.inputs.template import _rendered as rendered
from engines.inputs.template import template_from_source
from engines.inputs.tokenizer import ids_from_text, tokenizer_from_json
from reference.mini import SPECIAL
from reference.mini_tensors import HIDDEN, VOCAB, tensor
from tests.helpers.tiny_bundle import MODEL, TOKENS


@pytest.fixture(scope="module")
def table():
    return tensor("llm.model.embed_tokens.weight", (VOCAB, HIDDEN))


@pytest.mark.parametrize("name", ["gen0", "gen1"])
def test_generate_rows_are_the_official_ones(chat, official, cases, table, name):
    case = cases[name]
    rows = chat.generate_prompt(case["prompt"], num_images=case["num_images"]).input_ids
    np.testing.assert_array_equal(rows[0], [*official[f"{name}.prompt_ids"], TOKENS.vision_start])
    np.testing.assert_array_equal(
        table[rows], official[f"{name}.prefill_embeds"]
    )  # both rows, by their embeddings


def test_the_unconditional_row_keeps_the_first_and_the_last_four(chat):
    cond, uncond = chat.generate_prompt("a red cat", num_images=1).input_ids
    assert uncond[0] == cond[0] == TOKENS.im_start
    assert (uncond[1:-4] == TOKENS.fim_pad).all() and (uncond[-4:] == cond[-4:]).all()
    assert [chat.tokenizer.id_to_token(i) for i in cond[-4:]] == [
        "<|im_start|>",
        "assistant",
        "Ċ",
        "<|vision_start|>",
    ]


def test_prefix_and_suffix_are_measured_on_the_template(tokenizer_files):
    assert (Chat(*tokenizer_files, MODEL).prefix_length, len(Chat(*tokenizer_files, MODEL).suffix)) == (14, 6)
    tokenizer, template = tokenizer_files
    other = Chat(tokenizer, template.replace("You are a helpful assistant.", "the star"), MODEL)
    assert other.prefix_length == 14 - len(other.ids("You are a helpful assistant.")) + len(
        other.ids("the star")
    )
    rows = other.reason_prompt("cat", "dog", num_images=1).input_ids
    assert other.text(rows[0]) == "system\nthe star\nuser\ndog" + MAGIC_SUFFIX + "\nassistant\n"


def test_reason_rows_are_the_official_ones(chat, official, cases):
    answer = str(official["reason0.answer_text"])
    rows = chat.reason_prompt(cases["reason0"]["prompt"], answer, num_images=1).input_ids
    np.testing.assert_array_equal(rows, official["reason0.input_ids"])
    ids = chat.question_prompt(cases["reason0"]["prompt"]).input_ids
    assert ids.shape == official["reason0.prefill_position_ids"].shape[1:]


def test_an_empty_answer_draws_the_prompt(chat):
    np.testing.assert_array_equal(
        chat.reason_prompt("a cat", "", num_images=2).input_ids,
        chat.generate_prompt("a cat", num_images=2).input_ids,
    )


@pytest.mark.parametrize("name", ["edit0", "edit1"])
def test_edit_rows_and_positions_are_the_official_ones(chat, official, cases, table, name):
    _, h, w = official[f"{name}.grid_thw"][0]
    rows = chat.edit_prompt(cases[name]["prompt"], grid_h=h // 2, grid_w=w // 2)
    np.testing.assert_array_equal(
        rows.position_ids, np.repeat(official[f"{name}.prefill_position_ids"], 2, axis=1)
    )
    expected, got = official[f"{name}.prefill_embeds"], table[rows.input_ids]
    np.testing.assert_array_equal(
        expected[:, rows.vision_tokens], np.stack([official[f"{name}.image_embeds"]] * 2)
    )
    for part in (rows.vq_tokens, rows.vision_tokens):
        got[:, part] = expected[:, part]
    np.testing.assert_array_equal(got, expected)


def test_edit_positions_of_the_specification(chat):
    # docs/star.md 3.6: 576 image tokens, 24x16 merged grid, 7 prompt ids: L = 992, last position 631.
    positions = positions_with_grid(992, start=593, grid_h=24, grid_w=16)
    assert positions.shape == (3, 1, 992) and positions[:, 0, -1].tolist() == [631] * 3
    assert positions[:, 0, 593].tolist() == [593] * 3 and positions[:, 0, 593 + 17].tolist() == [
        593,
        594,
        594,
    ]


@pytest.mark.parametrize("name", ["und0", "und1"])
def test_ask_rows_and_positions_are_the_official_ones(chat, official, cases, name):
    _, h, w = official[f"{name}.grid_thw"][0]
    asked = chat.ask_prompt(cases[name]["prompt"], grid_h=h // 2, grid_w=w // 2)
    ids, positions, patches = asked.input_ids, asked.position_ids, asked.vision_tokens
    np.testing.assert_array_equal(ids, official[f"{name}.input_ids"])
    np.testing.assert_array_equal(positions, official[f"{name}.position_ids"])
    assert (ids[0, patches] == TOKENS.image_pad).all() and patches.stop - patches.start == h * w // 4


def test_text_positions_count_up_on_all_axes():
    assert text_positions(2, 3).tolist() == [[[0, 1, 2]] * 2] * 3


@pytest.mark.parametrize("prompt", ["", " ", "\n\t"])
@pytest.mark.parametrize("task", ["generate", "question", "edit", "ask", "reason"])
def test_an_empty_prompt_is_refused(chat, prompt, task):
    with pytest.raises(InputError, match="The prompt is empty"):
        {
            "generate": lambda: chat.generate_prompt(prompt, num_images=1).input_ids,
            "question": lambda: chat.question_prompt(prompt).input_ids,
            "edit": lambda: chat.edit_prompt(prompt, grid_h=2, grid_w=2),
            "ask": lambda: chat.ask_prompt(prompt, grid_h=2, grid_w=2),
            "reason": lambda: chat.reason_prompt(prompt, "x", num_images=1).input_ids,
        }[task]()


@pytest.mark.parametrize("mark", SPECIAL)
def test_the_models_own_marks_are_refused_in_a_prompt(chat, mark):
    with pytest.raises(InputError, match="special tokens of the model") as caught:
        chat.ask_prompt(f"what is{mark} this", grid_h=2, grid_w=2)
    assert mark in str(caught.value)


def test_text_that_is_not_unicode_is_refused(chat):
    with pytest.raises(InputError, match="lone surrogates"):
        chat.generate_prompt("a \udcff cat", num_images=1)


@pytest.mark.parametrize(
    "prompt", ["猫", "x", "a photo\nof a cat\n", "\n\nleading", "🐈 " * 50, "{{ 7 * 7 }}{% raw %}"]
)
def test_any_other_text_is_taken_as_it_is(chat, prompt):
    rows = chat.generate_prompt(prompt, num_images=1).input_ids
    assert chat.text(rows[0]) == f"system\nYou are a helpful assistant.\nuser\n{prompt}\nassistant\n"


def test_too_long_gives_both_numbers():
    check_length(text=96, image=1000, new=3000, limit_tokens=4096)
    with pytest.raises(InputError, match="at most 4096 tokens, got 4097: 97 of text, 4000 to come") as caught:
        check_length(text=97, image=0, new=4000, limit_tokens=4096)
    assert "max-pixels" not in caught.value.fix
    with pytest.raises(InputError, match="got 4097: 97 of text, 1000 of the image, 3000 to come") as caught:
        check_length(text=97, image=1000, new=3000, limit_tokens=4096)
    assert "--max-pixels" in caught.value.fix


ASKED = "{{ messages[0]['content'] }}<|im_start|>"  # the least that is taken for a template
LOOP = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99) %}X{% endfor %}{% endfor %}"
)
DEEP = "(" * 100_000


@pytest.mark.parametrize(
    "template, match",
    [
        ("{% for %}", "cannot be read: .*statement block"),
        ("{{" + DEEP, "cannot be read: .* recursion"),
        ("{{ messages.x.y }}", "cannot be rendered"),
        ("hello", "expected form"),
        ("{{ messages[0]['content'] }}" + ASKED, "expected form"),
        (ASKED.replace("}}", "| trim }}"), "expected form"),
        (ASKED.replace("}}", "| upper }}"), "expected form"),
        (ASKED.replace("}}", "| e }}"), "expected form"),
        (ASKED, "no place for the image"),
        ("{{ ''.__class__.__mro__ }}", "cannot be rendered: .* unsafe"),
        ("{{ messages.append(1) }}", "cannot be rendered: .* unsafe"),
        ("{% include '/etc/passwd' %}", "cannot be rendered: .* no loader"),
        ("{{ 1 / 0 }}" + ASKED, "cannot be rendered: .* division by zero"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot be rendered: .* recursion"),
        ("{% for i in range(10**12) %}{% endfor %}", "cannot be rendered: .* Range too big"),
        (LOOP.replace("X", "") + "{% endfor %}" + ASKED, "cannot be rendered: .* takes too long"),
        ("{{ 10 ** (10 ** 9) }}" + ASKED, "cannot be rendered: .* takes too long"),
        ("{% set x = 'a' * 2147483648 %}" + ASKED, "cannot be rendered: .* too much memory"),
        ("{{ '%2147483647d' % 3 }}" + ASKED, "cannot be rendered: .* too much memory"),
        (LOOP.replace("X", "a" * 4096) + "{% endfor %}", "cannot be rendered: .* (too much memory|too long)"),
        ("a" * (1 << 21) + ASKED, "cannot be rendered: .* too much memory"),
    ],
    ids=lambda text: text[:40],
)
def test_a_chat_template_that_is_wrong_or_hostile_is_refused(tokenizer_files, template, match):
    """It may use half a second of CPU time and 256 MiB, in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(InputError) as caught:
        template_from_source(template, where="x.jinja")
    what, where, fix = str(caught.value).splitlines()
    assert re.search(match, f"{what}: {where}") and where.startswith("  where: x.jinja: ") and fix
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_a_text_never_passes_through_the_template(chat):
    """A template sees only a placeholder, so its form cannot depend on what a user says."""
    text = "{{ 1 / 0 }} \ue000 {% for %}"
    assert chat.template.render(text) == chat.template.prefix + text + chat.template.suffix


def test_a_module_of_the_current_folder_is_not_imported(tokenizer_files, tmp_path, monkeypatch):
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported')")
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    rendered.cache_clear()
    assert template_from_source(tokenizer_files[1], where="x").suffix == "<|im_end|>\n<|im_start|>assistant\n"


def test_a_bundles_texts_that_are_no_utf_8_are_refused(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_text(tmp_path / "chat_template.jinja", limit_bytes=9, where="bundle")


class PanicException(BaseException):
    """As that of pyo3, which is no Exception either."""


def test_a_panic_of_the_tokenizers_library_is_the_users_error(tokenizer_files, monkeypatch):
    import tokenizers

    class Panics:
        from_str = staticmethod(tokenizers.Tokenizer.from_str)

        def encode(self, *_, **__):
            raise PanicException("index out of bounds")

    with pytest.raises(InputError, match="cannot encode this text") as caught:
        ids_from_text(Panics(), "a cat", where="tokenizer.json")
    assert "tokenizer.json: index out of bounds" in caught.value.where

    def panics(_):
        raise PanicException

    monkeypatch.setattr(tokenizers, "Tokenizer", type("Tokenizer", (), {"from_str": staticmethod(panics)}))
    with pytest.raises(InputError, match="The tokenizer cannot be read"):
        tokenizer_from_json("{}", where="tokenizer.json")


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_what_is_not_the_tokenizers_goes_on(error):
    class Interrupted:
        def encode(self, *_, **__):
            raise error

    with pytest.raises(InputError if issubclass(error, Exception) else error):
        ids_from_text(Interrupted(), "a cat", where="tokenizer.json")


def test_a_tokenizer_that_is_not_the_models_is_refused(tokenizer_files):
    tokenizer, template = tokenizer_files
    with pytest.raises(InputError, match="cannot be read"):
        Chat("{}", template, MODEL)
    with pytest.raises(InputError, match="expected id 151662, got None"):
        Chat(tokenizer.replace("<|fim_pad|>", "<|fim_pat|>"), template, MODEL)
