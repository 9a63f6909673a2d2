"""Checkpoints that are damaged, of another model, or dangerous."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from .harness import Case, put

EXPORT = ("export", "{checkpoint}", "--out", "new")
BASE = "Qwen2.5-VL-mini"
SHARD = f"{BASE}/model-00001-of-00002.safetensors"
PREPROCESSOR, TOKENIZER, TEMPLATE = (
    f"{BASE}/{name}" for name in ("preprocessor_config.json", "tokenizer.json", "chat_template.json")
)
CONFIGS = {"the config of the base": f"{BASE}/config.json", "the config of STAR": "STAR-mini.json"}


def at(name: str, data: bytes | str) -> Callable[[Path], None]:
    raw = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / "checkpoint" / name).write_bytes(raw) and None


def edited(name: str, *keys: str, value: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "checkpoint" / name
        whole = json.loads(path.read_text())
        put(whole, *keys, value=value)
        path.write_text(json.dumps(whole))

    return spoil


def without(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "checkpoint" / name).unlink()


def template(text: str) -> Callable[[Path], None]:
    return edited(TEMPLATE, "chat_template", value=text)


def safetensors(header: bytes, size: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if size is None else size) + header + bytes(64)


class Canary:
    """A pickle that writes a file when it is read."""

    def __reduce__(self):
        return (open, ("canary", "w"))


def canary_archive(folder: Path) -> None:
    with zipfile.ZipFile(folder / "checkpoint" / "STAR-mini.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Canary()))
        archive.writestr("archive/version", "3\n")


DAMAGED = {
    "empty": b"",
    "seven bytes": b"1234567",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a page": b"<!DOCTYPE html><html>",
    "a header of 2^63 bytes": safetensors(b"{}", 2**63),
    "a header of 200 MB": safetensors(b"{}", 200_000_000),
    "a header that is no JSON": safetensors(b"{nothing}"),
    "a shape of 6,000 digits": safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b"9" * 6000 + b'],"data_offsets":[0,4]}}'
    ),
    "a shape of 400,000 axes": safetensors(
        b'{"a":{"dtype":"F32","shape":[' + b",".join([b"1"] * 400_000) + b'],"data_offsets":[0,4]}}'
    ),
    "a negative axis": safetensors(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}'),
    "an unknown type": safetensors(b'{"a":{"dtype":"F7","shape":[1],"data_offsets":[0,4]}}'),
    "a pickle": pickle.dumps({"a": 1}),
}
JSONS = {
    "empty": "",
    "no JSON": "{",
    "a list": "[]",
    "no UTF-8": b"\xff\xfe",
    "200,000 deep": "[" * 200_000,
    "a million lists": "[" + ",".join(["[]"] * 1_000_000) + "]",
    "NaN": '{"hidden_size": NaN}',
}
TEMPLATES = {
    "that does not compile": "{% for %}",
    "that divides by zero": "{{ 1 // 0 }}",
    "that never ends": "{% for i in range(10**12) %}{% endfor %}",
    "that loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "that grows to gigabytes": "{{ 'x' * (2 * 10**9) }}",
    "that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "that reaches for Python": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "that imports": "{% include '/etc/passwd' %}",
    "without a place for an image": "{% for m in messages %}{{ m['role'] }}{% endfor %}",
    "that is empty": "",
}
PREPROCESSORS = {
    "without a mean": {"image_std": [0.5, 0.5, 0.5]},
    "with words for means": {"image_mean": ["a", "b", "c"], "image_std": [0.5, 0.5, 0.5]},
    "with two means": {"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    "with deviations of zero": {"image_mean": [0.5, 0.5, 0.5], "image_std": [0, 0, 0]},
    "with a negative deviation": {"image_mean": [0.5, 0.5, 0.5], "image_std": [-1, 1, 1]},
}
OF_BASE = {
    "a width of a word": (("hidden_size",), "64"),
    "a width of true": (("hidden_size",), True),
    "a width of zero": (("hidden_size",), 0),
    "no layers": (("num_hidden_layers",), 0),
    "10^9 layers": (("num_hidden_layers",), 10**9),
    "heads that do not divide the width": (("num_attention_heads",), 7),
    "more key heads than heads": (("num_key_value_heads",), 8),
    "another activation": (("hidden_act",), "relu"),
    "a vocabulary of another model": (("vocab_size",), 1000),
    "another architecture": (("model_type",), "llama"),
    "weights in AWQ": (("quantization_config",), {"quant_method": "awq", "bits": 4}),
    "weights in GPTQ": (("quantization_config",), {"quant_method": "gptq", "bits": 4}),
}

CASES = [
    *(Case(f"a shard that is {name}", EXPORT, 3, spoil=at(SHARD, data)) for name, data in DAMAGED.items()),
    *(
        Case(f"a STAR file that is {name}", EXPORT, 3, spoil=at("STAR-mini.pt", data))
        for name, data in DAMAGED.items()
    ),
    *(
        Case(f"{what} that is {name}", EXPORT, 3, spoil=at(path, data))
        for what, path in (*CONFIGS.items(), ("a preprocessor", PREPROCESSOR), ("a tokenizer", TOKENIZER))
        for name, data in JSONS.items()
    ),
    *(Case(f"a template {name}", EXPORT, 3, spoil=template(data)) for name, data in TEMPLATES.items()),
    *(
        Case(f"a preprocessor {name}", EXPORT, 3, spoil=at(PREPROCESSOR, json.dumps(data)))
        for name, data in PREPROCESSORS.items()
    ),
    *(
        Case(f"a base with {name}", EXPORT, 3, spoil=edited(f"{BASE}/config.json", *keys, value=value))
        for name, (keys, value) in OF_BASE.items()
    ),
    *(
        Case(f"a checkpoint without {name}", EXPORT, 3, name.rpartition("/")[2], spoil=without(name))
        for name in (SHARD, PREPROCESSOR, TOKENIZER, f"{BASE}/config.json")
    ),
    Case("a checkpoint without STAR's weights", EXPORT, 3, spoil=without("STAR-mini.pt")),
    Case("a pickle with a canary", EXPORT, 3, spoil=canary_archive),
    Case("a hub id of nothing", ("plan", "nobody/nothing"), 3, "downloads nothing"),
]
