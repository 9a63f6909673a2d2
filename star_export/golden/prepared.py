"""What the host prepares of a fixed image and fixed words, recorded at export for `validate` to compare.

Pixels, ids and positions come before every graph, so no golden tensor of a graph shows a change of them. They
are recorded by the code that prepares them, which the tests compare with the release's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engines.inputs.preprocess import ask_inputs, edit_inputs
from engines.inputs.prompt import Chat, Prompt
from engines.runtime.sampler import penalise_repetition

from ..tensor_files import save_tensors
from .cases import Tensors

PREPARED = "prepared.safetensors"  # at the bundle's root
IMAGE = (61, 90, 3)
WORDS = {"prompt": "a red circle to the left of two blue squares", "answer": "a circle and squares"}
PENALTY = 1.05  # of the release; a checkpoint's own may be 1, which changes nothing


def given_inputs() -> dict[str, Tensors]:
    """The inputs of each case by name; words are their bytes in UTF-8."""
    words = {name: np.frombuffer(text.encode(), np.uint8).astype(np.int64) for name, text in WORDS.items()}
    rng = np.random.Generator(np.random.Philox(7))
    image: Tensors = {"image": rng.integers(0, 256, IMAGE)}
    asked = {"prompt": words["prompt"]}
    penalty: Tensors = {
        "logits": rng.standard_normal(40, dtype=np.float32),
        "seen": rng.integers(0, 40, 12),
        "penalty": np.array([PENALTY], np.float32),
    }
    return {
        "generate": asked,
        "reason": words,
        "edit": asked | image,
        "ask": asked | image,
        "penalty": penalty,
    }


def prepared(chat: Chat, case: str, given: Tensors) -> Tensors:
    """What the host prepares of the inputs of a case."""
    if case == "penalty":
        logits = given["logits"].copy()
        penalise_repetition(logits, given["seen"], float(given["penalty"][0]))
        return {"logits": logits}
    text = {name: _text(given[name]) for name in WORDS if name in given}
    if case == "generate":
        return _rows(chat.generate_prompt(text["prompt"], num_images=2))
    if case == "reason":
        return _rows(chat.reason_prompt(text["prompt"], text["answer"], num_images=1))
    image = given["image"].astype(np.uint8)
    if case == "edit":
        vision, square = edit_inputs(image, chat.model)
        prompt = chat.edit_prompt(text["prompt"], grid_h=vision.grid_h, grid_w=vision.grid_w)
        return _rows(prompt) | vision.feeds() | {"image": square}
    vision = ask_inputs(image, chat.model)
    prompt = chat.ask_prompt(text["prompt"], grid_h=vision.grid_h, grid_w=vision.grid_w)
    return _rows(prompt) | vision.feeds()


def record_prepared(chat: Chat, path: Path) -> None:
    """Record what the host that exports prepares to `path`."""
    recorded: Tensors = {}
    for case, given in given_inputs().items():
        recorded |= {f"{case}/in/{name}": array for name, array in given.items()}
        recorded |= {f"{case}/out/{name}": array for name, array in prepared(chat, case, given).items()}
    save_tensors({key: np.ascontiguousarray(array) for key, array in recorded.items()}, path)


def _text(codes: np.ndarray) -> str:
    return bytes(codes.astype(np.uint8)).decode()


def _rows(prompt: Prompt) -> Tensors:
    return {"input_ids": prompt.input_ids, "position_ids": prompt.position_ids}
