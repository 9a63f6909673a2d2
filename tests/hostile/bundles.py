"""Bundles that were damaged, edited by hand, or that do not hold together."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.helpers.sealed import edit_sealed

from .harness import Case, put

DRAW = ("generate", "{bundle}", "a cat", "-o", "out.png")
VALIDATE = ("validate", "{bundle}")
INSPECT = ("inspect", "{bundle}")
HUGE = int("9" * 400)


def text(data: str | bytes) -> Callable[[Path], None]:
    """Another manifest altogether."""
    raw = data.encode() if isinstance(data, str) else data
    return lambda folder: (folder / "bundle" / "manifest.json").write_bytes(raw) and None


def edited(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """The manifest after `change`, with a hash that is right again."""
    return lambda folder: edit_sealed(folder / "bundle" / "manifest.json", change)


def flipped(folder: Path) -> None:
    """Another number of the manifest's, and its old hash."""
    path = folder / "bundle" / "manifest.json"
    path.write_text(path.read_text().replace('"top_k": 1000', '"top_k": 1001', 1))


def at(*keys: str | int, value: object) -> Callable[[Path], None]:
    return edited(lambda manifest: put(manifest, *keys, value=value))


def without(key: str) -> Callable[[Path], None]:
    return edited(lambda manifest: manifest.pop(key))


def renamed_file(name: str) -> Callable[[Path], None]:
    """The manifest lists its first file under another name."""

    def change(manifest: dict) -> None:
        files = manifest["files"]
        files[name] = files.pop("tokenizer.json")

    return edited(change)


def file(act: Callable[[Path], object], name: str = "base_ar/model.onnx") -> Callable[[Path], None]:
    """Do something to one file of the bundle."""
    return lambda folder: act(folder / "bundle" / name) and None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def swap_for(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def act(path: Path) -> None:
        path.unlink()
        make(path)

    return act


NUMBERS = {
    "model hidden_size": ("model", "hidden_size"),
    "model vocab_size": ("model", "vocab_size"),
    "model codebook_size": ("model", "codebook_size"),
    "model image_tokens": ("model", "image_tokens"),
    "model image_size": ("model", "image_size"),
    "model max_positions": ("model", "max_positions"),
    "model top_k_limit": ("model", "top_k_limit"),
    "vision patch_size": ("model", "vision", "patch_size"),
    "vision window_size": ("model", "vision", "window_size"),
    "cache layers": ("model", "cache", "base_ar", "layers"),
    "part_bytes": ("part_bytes",),
}
VALUES = {"zero": 0, "negative": -1, "of 400 digits": HUGE, "true": True, "a word": "64", "a fraction": 1.5}
MANIFESTS = {
    "nothing": "",
    "half of one": '{"schema": 5, "precision": ',
    "no JSON": "manifest: 1",
    "a list": "[]",
    "null": "null",
    "no UTF-8": b"\xff\xfe\x00",
    "a mark at its start": "\ufeff{}",
    "a number of 6,000 digits": '{"schema": ' + "1" * 6000 + "}",
    "NaN": '{"schema": NaN}',
    "a key twice": '{"schema": 5, "schema": 5}',
    "200,000 lists in one another": "[" * 200_000,
    "a million empty lists": "[" + ",".join(["[]"] * 1_000_000) + "]",
    "another schema": '{"schema": 999}',
}
NAMES = {
    "above the bundle": "../tokenizer.json",
    "from the root": "/etc/passwd",
    "through a folder and back": "base_ar/../tokenizer.json",
    "with a drive": "C:\\tokenizer.json",
    "of nothing": "",
    "of a point": ".",
    "with a line break": "token\nizer.json",
    "of the manifest": "manifest.json",
    "among the plans": "plans/tokenizer.json",
}
SWAPS = {
    "a pipe": swap_for(os.mkfifo),
    "a folder": swap_for(os.mkdir),
    "a link to a device": swap_for(lambda path: path.symlink_to("/dev/zero")),
    "nothing": lambda path: path.unlink(),
    "an empty file": lambda path: path.write_bytes(b""),
    "a file with a byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a file with a byte less": lambda path: path.write_bytes(path.read_bytes()[:-1]),
}
FLIPPED = {
    "the graph": ("base_ar/model.onnx", DRAW),
    "weights": ("base_ar/model.onnx.data", DRAW),
    "the table": ("token_embedding/table.data", DRAW),
    "the tokenizer": ("tokenizer.json", DRAW),
    "the template": ("chat_template.jinja", DRAW),
    "golden tensors": ("vq_decoder/golden.safetensors", VALIDATE),
    "the runs": ("golden.safetensors", VALIDATE),
    "the classic graph": ("base_ar/classic.onnx", VALIDATE),
    "an image's weights": ("vq_decoder/model.onnx.data", DRAW),
}

CASES = [
    *(
        Case(f"a manifest of {name}", DRAW, 3, spoil=text(data), hollow=True)
        for name, data in MANIFESTS.items()
    ),
    *(
        Case(f"{name} that is {kind}", INSPECT, 3, spoil=at(*keys, value=value), hollow=True)
        for name, keys in NUMBERS.items()
        for kind, value in VALUES.items()
    ),
    *(
        Case(f"a manifest without {key}", DRAW, 3, spoil=without(key), hollow=True)
        for key in ("schema", "precision", "model", "components", "tables", "files", "golden")
    ),
    *(
        Case(f"a listed path {name}", DRAW, 3, spoil=renamed_file(path), hollow=True)
        for name, path in NAMES.items()
    ),
    *(Case(f"a graph that is {name}", DRAW, 3, spoil=file(act), hollow=True) for name, act in SWAPS.items()),
    *(
        Case(f"a bit of {name} flipped", words, 3, "sha256|hash", spoil=file(flip, path))
        for name, (path, words) in FLIPPED.items()
    ),
    Case("another number in the manifest", DRAW, 3, "sha256|hash", spoil=flipped, hollow=True),
    Case("an extra key", DRAW, 3, "extra", spoil=at("extra", value=1), hollow=True),
    Case("an unknown precision", DRAW, 3, spoil=at("precision", value="fp7"), hollow=True),
    Case(
        "a mean that is no number",
        DRAW,
        3,
        spoil=at("model", "vision", "image_mean", value=["a"] * 3),
        hollow=True,
    ),
    Case(
        "a deviation of zero", DRAW, 3, spoil=at("model", "vision", "image_std", value=[0, 0, 0]), hollow=True
    ),
    Case("two means", DRAW, 3, spoil=at("model", "vision", "image_mean", value=[0.5, 0.5]), hollow=True),
    Case("a top-p of 7", DRAW, 3, spoil=at("model", "sampling", "generate", "top_p", value=7), hollow=True),
    Case("a top-k of 0", DRAW, 3, spoil=at("model", "sampling", "generate", "top_k", value=0), hollow=True),
    Case("a penalty of 0", DRAW, 3, spoil=at("model", "repetition_penalty", value=0), hollow=True),
    Case(
        "an id beyond the vocabulary",
        DRAW,
        3,
        spoil=at("model", "tokens", "im_end", value=10**9),
        hollow=True,
    ),
    Case(
        "an axis over zero",
        DRAW,
        3,
        spoil=at("components", "base_ar", "inputs", 0, "shape", value=["B/0", "S", 64]),
        hollow=True,
    ),
    Case(
        "a file that is not listed",
        DRAW,
        3,
        "stranger",
        spoil=file(lambda path: path.write_text("x"), "stranger"),
        hollow=True,
    ),
    Case(
        "a folder without a manifest",
        DRAW,
        3,
        "manifest",
        spoil=file(lambda path: path.unlink(), "manifest.json"),
        hollow=True,
    ),
    Case(
        "an empty folder",
        ("generate", "empty", "p", "-o", "out.png"),
        3,
        "manifest",
        spoil=lambda folder: (folder / "empty").mkdir(),
    ),
    Case("a bundle of nothing but a name", ("generate", "nowhere", "p", "-o", "out.png"), 3, "nothing"),
    Case("a fp32 bundle for TensorRT", ("build", "{bundle}", "--target", "rtx-4090"), 3, "fp32"),
    Case("no plans", (*DRAW, "--backend", "tensorrt:rtx-4090"), 3, "star-export build"),
    Case(
        "a backend without its packages", (*DRAW, "--backend", "onnxruntime-cuda"), 5, "onnxruntime-gpu|CUDA"
    ),
    Case("too little memory", (*DRAW, "--memory", "1K"), 5, "1000 bytes"),
    Case(
        "a certificate that is not there",
        ("certificate", "{bundle}", "--backend", "onnxruntime"),
        3,
        "validate",
    ),
]
