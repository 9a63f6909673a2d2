"""Configuration files are read strictly:
what is not understood is refused by file and key path (docs/bad_inputs.md 9)."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest

from reference.config import config_from_files
from tests.helpers.refusals import refused
from tests.helpers.released import (
    GENERATION,
    TOKENIZER,
    nested_qwen_json,
    qwen_json,
    star_json,
    write_configs,
)

DELETE = object()
GOOD = {"STAR.json": star_json("3B"), "config.json": qwen_json("3B"), "generation_config.json": GENERATION}


def changed(document: dict, path: str, value: Any) -> dict:
    document = copy.deepcopy(document)
    *parents, key = path.split(".")
    place = document
    for parent in parents:
        place = place[parent]
    if value is DELETE:
        del place[key]
    else:
        place[key] = value
    return document


def read_with(tmp_path: Path, file: str, document: dict) -> None:
    documents = GOOD | {file: document}
    write_configs(
        tmp_path, documents["STAR.json"], documents["config.json"], documents["generation_config.json"]
    )


def read_text(tmp_path: Path, file: str, text: bytes) -> None:
    write_configs(tmp_path, *GOOD.values())
    (tmp_path / ("" if file == "STAR.json" else "qwen") / file).write_bytes(text)
    config_from_files(tmp_path / "STAR.json", tmp_path / "qwen")


VALUES = [
    ("STAR.json", "stacked_ar.num_layers", "12"),
    ("STAR.json", "stacked_ar.num_layers", True),
    ("STAR.json", "stacked_ar.num_layers", 0),
    ("STAR.json", "stacked_ar.num_layers", 10**9),
    ("STAR.json", "stacked_ar.num_layers", -1),
    ("STAR.json", "stacked_ar.num_layers", 2.0),
    ("STAR.json", "stacked_ar.num_layers", None),
    ("STAR.json", "stacked_ar", 16),
    ("STAR.json", "stacked_ar", []),
    ("STAR.json", "pixel_encoder.num_heads", 7),
    ("STAR.json", "pixel_encoder.num_tokens", 575),
    ("STAR.json", "pixel_encoder.ch", 100),
    ("STAR.json", "pixel_encoder.ch_mult", []),
    ("STAR.json", "pixel_encoder.ch_mult", [1, "2"]),
    ("STAR.json", "pixel_encoder.ch_mult", [1] * 9),
    ("STAR.json", "pixel_encoder.model_name", "VQ_Model2"),
    ("STAR.json", "pixel_adapter.n_embed", 3584),
    ("STAR.json", "pixel_adapter.input_dim", 8),
    ("STAR.json", "pixel_output_head.image_token_size", 4096),
    ("STAR.json", "pixel_output_head.n_embed", 1),
    ("STAR.json", "language_model.model_name", "Llama"),
    ("STAR.json", "pixel_adapter.depth", 10**9),
    ("config.json", "num_hidden_layers", 0),
    ("config.json", "num_hidden_layers", 10**9),
    ("config.json", "num_hidden_layers", "36"),
    ("config.json", "num_attention_heads", 15),
    ("config.json", "num_key_value_heads", 3),
    ("config.json", "hidden_size", True),
    ("config.json", "rms_norm_eps", "1e-6"),
    ("config.json", "rms_norm_eps", 0),
    ("config.json", "rope_theta", False),
    ("config.json", "tie_word_embeddings", 1),
    ("config.json", "use_sliding_window", True),
    ("config.json", "hidden_act", "gelu"),
    ("config.json", "model_type", "qwen2_vl"),
    ("config.json", "vocab_size", 10**12),
    ("config.json", "rope_scaling.mrope_section", [16, 24]),
    ("config.json", "rope_scaling.mrope_section", [16, 24, 25]),
    ("config.json", "rope_scaling.type", "yarn"),
    ("config.json", "rope_scaling", None),
    ("config.json", "vision_config.depth", 0),
    ("config.json", "vision_config.num_heads", 24),
    ("config.json", "vision_config.fullatt_block_indexes", [7, 32]),
    ("config.json", "vision_config.fullatt_block_indexes", 7),
    ("config.json", "vision_config.out_hidden_size", 3584),
    ("config.json", "vision_config.window_size", 100),
    ("config.json", "vision_config", {}),
    ("generation_config.json", "eos_token_id", []),
    ("generation_config.json", "eos_token_id", [151645, -1]),
    ("generation_config.json", "eos_token_id", 151936),
    ("generation_config.json", "repetition_penalty", 0),
    ("generation_config.json", "repetition_penalty", "1.05"),
]


@pytest.mark.parametrize("file, path, value", VALUES, ids=lambda v: str(v)[:30])
def test_wrong_values(tmp_path: Path, file: str, path: str, value: Any) -> None:
    named = path + ".out_hidden_size" if value == {} else path.removesuffix("[1]")
    expected_path = {"vision_config.window_size": "vision_config.patch_size"}.get(path, named)
    with refused(file, expected_path, "expected", "got"):
        read_with(tmp_path, file, changed(GOOD[file], path, value))


@pytest.mark.parametrize(
    "file, path",
    [
        ("STAR.json", "model_name"),
        ("STAR.json", "stacked_ar"),
        ("STAR.json", "stacked_ar.num_layers"),
        ("STAR.json", "pixel_encoder.num_tokens"),
        ("STAR.json", "pixel_output_head.n_embed"),
        ("config.json", "hidden_size"),
        ("config.json", "rope_scaling"),
        ("config.json", "rope_scaling.mrope_section"),
        ("config.json", "rope_theta"),
        ("config.json", "tie_word_embeddings"),
        ("config.json", "vision_config"),
        ("generation_config.json", "eos_token_id"),
    ],
)
def test_missing_keys(tmp_path: Path, file: str, path: str) -> None:
    with refused(file, path, "no such key"):
        read_with(tmp_path, file, changed(GOOD[file], path, DELETE))


@pytest.mark.parametrize(
    "file, path",
    [
        ("STAR.json", "extra"),
        ("STAR.json", "stacked_ar.num_layer"),
        ("STAR.json", "pixel_encoder.dropout"),
        ("STAR.json", "language_model.revision"),
        ("STAR.json", "pixel_adapter.bias"),
        ("STAR.json", "pixel_output_head.bias"),
        ("config.json", "vision_config.head_dim"),
        ("config.json", "rope_scaling.factor"),
        ("generation_config.json", "length_penalty"),
    ],
)
def test_unknown_keys(tmp_path: Path, file: str, path: str) -> None:
    with refused(file, path, "an unknown key"):
        read_with(tmp_path, file, changed(GOOD[file], path, 1))


@pytest.mark.parametrize(
    "path, value",
    [
        ("text_config.num_hidden_layers", 0),
        ("text_config.extra", 1),
        ("extra", 1),
        ("text_config", 3),
        ("hidden_size", 4096),
        ("text_config.rope_parameters.rope_theta", "1e6"),
        ("text_config.rope_parameters.rope_type", "yarn"),
        ("vision_config.extra", 1),
    ],
)
def test_the_nested_layout_is_as_strict(tmp_path: Path, path: str, value: Any) -> None:
    with refused("config.json", path):
        read_with(tmp_path, "config.json", changed(nested_qwen_json(GOOD["config.json"]), path, value))


@pytest.mark.parametrize("file", GOOD)
@pytest.mark.parametrize(
    "text, told",
    [
        (b"", "line 1"),
        (b"{", "line 1"),
        (b"[]", "got a list"),
        (b"7", "got 7"),
        (b'"text"', "got"),
        (b"null", "null"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\xff"}', "byte 7 is not valid UTF-8"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": ' + b"9" * 5000 + b"}", "5000 digits"),
        (b'{"a": 1, "a": 1}', "'a' appears twice"),
        (b'{"x": {"a": 1, "a": 2}}', "'a' appears twice"),
        (b'{"a": ' * 200_000 + b"1" + b"}" * 200_000, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": [' + b"[]," * 1_000_000 + b"[]]}", "expected at most 262144 values"),
        (b"{} {}", "Extra data"),
        (b'{"a": 1,}', "line 1"),
    ],
    ids=lambda v: repr(v)[:24],
)
def test_what_is_not_a_strict_object(tmp_path: Path, file: str, text: bytes, told: str) -> None:
    with refused(file, told):
        read_text(tmp_path, file, text)


def test_numbers_beyond_the_range_of_json_are_refused_in_place(tmp_path: Path) -> None:
    text = json.dumps(GOOD["config.json"]).replace("1e-06", "1e999")
    with refused("config.json", "1e999"):
        read_text(tmp_path, "config.json", text.encode())


def test_what_is_no_file(tmp_path: Path) -> None:
    write_configs(tmp_path, *GOOD.values())
    (tmp_path / "STAR.json").unlink()
    with refused("STAR.json", "check the path"):
        config_from_files(tmp_path / "STAR.json", tmp_path / "qwen")
    os.mkfifo(tmp_path / "STAR.json")
    with refused("STAR.json does not exist", "expected a file"):  # and does not hang
        config_from_files(tmp_path / "STAR.json", tmp_path / "qwen")


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    write_configs(tmp_path, *GOOD.values())
    os.truncate(tmp_path / "STAR.json", 1 << 40)  # sparse
    with refused("STAR.json", "expected at most", str(1 << 40)):
        config_from_files(tmp_path / "STAR.json", tmp_path / "qwen")


def test_messages_stay_on_three_lines_whatever_a_key_holds(tmp_path: Path) -> None:
    with refused("an unknown key", "\\n", "\\x1b"):
        read_with(tmp_path, "STAR.json", GOOD["STAR.json"] | {"bad\nkey\x1b[31m\ud800": 1})


def test_one_end_token_may_stand_alone(tmp_path: Path) -> None:
    read_with(tmp_path, "generation_config.json", changed(GENERATION, "eos_token_id", 151645))
    config = config_from_files(tmp_path / "STAR.json", tmp_path / "qwen")
    assert config.eos_token_ids == (151645,)


@pytest.mark.parametrize("method, told", [("awq", "AWQ"), ("gptq", "GPTQ"), ("fp8", "FP8"), (3, "unnamed")])
def test_a_quantised_base_model_is_named_as_such(tmp_path: Path, method: object, told: str) -> None:
    with refused("config.json", f"quantised with {'an ' * (told == 'unnamed')}{told}", "--precision"):
        stated = {"quantization_config": {"quant_method": method, "bits": 4}}
        read_with(tmp_path, "config.json", GOOD["config.json"] | stated)


@pytest.mark.parametrize(
    "change, told",
    [
        ({"model": None}, "model: expected an object, got null"),
        ({"model": {"type": "WordLevel", "vocab": {}, "merges": []}}, "model.type"),
        ({"model": {"vocab": {"a": 2**32 - 1}, "merges": []}}, "model.vocab.a: expected an integer from 0"),
        ({"model": {"vocab": [], "merges": []}}, "model.vocab: expected an object, got a list"),
        ({"model": {"vocab": {}}}, "model.merges: expected a list, got no such key"),
        ({"added_tokens": {}}, "added_tokens: expected a list"),
        ({"added_tokens": [[1, "<|im_end|>"]]}, "added_tokens[0]: expected an object, got a list"),
        ({"added_tokens": [{"id": 2**32 - 1, "content": "x"}]}, "added_tokens[0].id: expected an integer"),
        ({"added_tokens": [{"id": 1, "content": ["x"]}]}, "added_tokens[0].content: expected a string"),
        ({"added_tokens": [{"id": 1, "content": "x"}, {"id": 2, "content": "x"}]}, "another token"),
        ({"added_tokens": [{"id": 1, "content": "x"}]}, "absent: <|im_start|>"),
    ],
)
def test_a_tokenizer_that_is_not_the_models_is_refused(tmp_path: Path, change: dict, told: str) -> None:
    write_configs(tmp_path, *GOOD.values())
    (tmp_path / "qwen" / "tokenizer.json").write_text(json.dumps(TOKENIZER | change))
    with refused("tokenizer.json", told):
        config_from_files(tmp_path / "STAR.json", tmp_path / "qwen")
