"""A checkpoint's small files are read strictly, and the template is tried, before any weight is looked at."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from reference.weights import SHIPPED
from star_export.cli.parser import main
from star_export.exporter import export as exporter

NANO = SHIPPED["nano"]
BASE = "Qwen2.5-VL-nano"
TEMPLATE = json.loads((NANO / BASE / "tokenizer_config.json").read_text())["chat_template"]
TEXT_ONLY = (  # as in the tokenizer of early revisions of Qwen2.5-VL
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEEP = b"[" * 200_000


class Reached(Exception):
    """The export came to the weights."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """STAR-Nano's checkpoint as links, of which a test replaces some; its weights are not to be read."""
    for path in [*NANO.glob("*.json"), *NANO.glob("*.pt"), *(NANO / BASE).iterdir()]:
        link = tmp_path / "nano" / path.relative_to(NANO)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)

    def reached(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(exporter, "named_tensors", reached)
    return tmp_path / "nano"


def put(folder: Path, name: str, content: Any) -> None:
    """Replace a file: JSON, bytes, None to remove it, or a changed copy of its JSON."""
    path = folder / name if (folder / name).is_symlink() else folder / BASE / name
    old = json.loads(path.read_text()) if callable(content) else {}
    path.unlink(missing_ok=True)
    if content is not None:
        new = content(old) if callable(content) else content
        path.write_bytes(new if isinstance(new, bytes) else json.dumps(new).encode())


def export_of(folder: Path) -> int:
    return main(["export", str(folder), "--out", str(folder.parent / "out"), "--no-progress"])


def with_template(template: str):
    return lambda old: old | {"chat_template": template}


CASES = [
    ("preprocessor_config.json", None, "preprocessor_config.json does not exist"),
    (
        "preprocessor_config.json",
        lambda old: old | {"image_std": [0, 0, 0]},
        "image_std[0]: expected a number",
    ),
    ("preprocessor_config.json", lambda old: old | {"image_mean": [float("nan")] * 3}, "NaN"),
    ("preprocessor_config.json", lambda old: {"patch_size": 14}, "image_mean"),
    ("preprocessor_config.json", DEEP, "nested too deeply"),
    ("preprocessor_config.json", b'{"a": "\xff"}', "byte 7 is not valid UTF-8"),
    ("processor_config.json", {"image_processor": 3}, "image_processor: expected an object, got 3"),
    ("tokenizer_config.json", None, "has no chat template"),
    ("tokenizer_config.json", DEEP, "nested too deeply"),
    ("tokenizer_config.json", with_template("{% for %}"), "chat template cannot be read"),
    ("tokenizer_config.json", with_template(TEXT_ONLY), "has no place for the image"),
    ("tokenizer_config.json", with_template("{{ 1 / 0 }}" + TEMPLATE), "division by zero"),
    ("tokenizer_config.json", with_template(TEMPLATE.replace("a helpful", "an evil")), "You are an evil"),
    (
        "tokenizer_config.json",
        with_template(TEMPLATE.replace("<|vision_start|>", "Picture 1: <|vision_start|>")),
        "before a prompt with an image",
    ),
    (
        "tokenizer.json",
        lambda old: {k: v for k, v in old.items() if k != "model"},
        "model: expected an object",
    ),
    (
        "tokenizer.json",
        lambda old: old | {"pre_tokenizer": {"type": "Whitespace"}},
        "not the one that STAR was trained with",
    ),
    ("tokenizer.json", lambda old: old | {"decoder": {"type": "?"}}, "The tokenizer cannot be read"),
    ("sampling.json", {"generate": {"top_p": 7}}, "generate: top_p: expected 1e-06 to 1, got 7.0"),
    ("sampling.json", {"generate": {"top_k": 0}}, "generate: top_k: expected 1 to"),
    ("sampling.json", b"\xff", "not text in UTF-8"),
    ("sampling.json", DEEP, "cannot be read"),
    ("score.json", b"[]", "recorded score cannot be read"),
]


@pytest.mark.parametrize("name, content, told", CASES, ids=map(str, range(len(CASES))))
def test_what_is_wrong_is_named_before_a_weight_is_looked_at(
    folder: Path, name: str, content: Any, told: str, capsys: pytest.CaptureFixture
) -> None:
    put(folder, name, content)
    assert export_of(folder) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and told in "".join(lines), lines
    assert name in lines[1] or BASE in lines[1]
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    "name", ["sampling.json", "score.json", "preprocessor_config.json", "tokenizer.json"]
)
def test_a_pipe_does_not_hang(folder: Path, name: str, capsys: pytest.CaptureFixture) -> None:
    put(folder, name, None)
    os.mkfifo(folder / name if name in ("sampling.json", "score.json") else folder / BASE / name)
    assert export_of(folder) == 3
    assert f"{name} does not exist" in capsys.readouterr().err


def test_a_right_checkpoint_comes_to_its_weights_in_time(folder: Path) -> None:
    began = time.process_time()
    with pytest.raises(Reached):
        export_of(folder)
    assert time.process_time() - began < 2


def test_the_processors_template_wins_over_a_text_only_one(folder: Path) -> None:
    put(folder, "tokenizer_config.json", with_template(TEXT_ONLY))
    (folder / BASE / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    with pytest.raises(Reached):
        export_of(folder)
    (folder / BASE / "chat_template.json").unlink()
    (folder / BASE / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(Reached):
        export_of(folder)
