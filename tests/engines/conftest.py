"""What the tests of the engines share: the official arrays and the miniature tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.tiny_bundle import MODEL

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="session")
def official():
    """Arrays that the official code computed, rotary frequencies rounded as in the release."""
    with np.load(GOLDEN / "official_bf16_rope.npz", allow_pickle=False) as arrays:
        return dict(arrays)


@pytest.fixture(scope="session")
def cases():
    """Name -> case of the official arrays."""
    return {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}


@pytest.fixture(scope="session")
def tokenizer_files(mini_checkpoint):
    """(tokenizer.json, chat template) of the miniature checkpoint, as texts."""
    folder = mini_checkpoint / "Qwen2.5-VL-mini"
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    return (folder / "tokenizer.json").read_text(), template


@pytest.fixture(scope="session")
def chat(tokenizer_files):
    """The miniature checkpoint's chat."""
    from engines.inputs.prompt import Chat

    return Chat(*tokenizer_files, MODEL)
