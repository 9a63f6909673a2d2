"""Twelve subtle faults, each really planted: in a bundle's weights or graphs, or in the host's code.

A function plants one in the copy of a bundle at `root`, whose manifest is made true again, or through
`patch`, pytest's monkeypatch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from engines.inputs import preprocess
from engines.runtime import decode, gumbel
from tests.helpers.spoilt_bundle import patch as patch_bytes
from tests.helpers.spoilt_bundle import rehash, spoil_graph, spoil_weight

HEAD_DIM, BLOCK_BYTES = 16, 16  # of the miniature; of a block of 32 codes in int4
LAYER = "layers.2"


def one_head_of_one_layer(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The outputs of two heads go where the other's belong."""

    def swapped(weight: np.ndarray) -> np.ndarray:  # [heads * D, H], as a MatMul reads it
        first, second, rest = np.split(weight, [HEAD_DIM, 2 * HEAD_DIM])
        return np.concatenate([second, first, rest])

    spoil_weight(root, "base_ar", f"{LAYER}.self_attn.o_proj.weight", swapped)


def one_block_of_int4_codes_shifted(root: Path, patch: pytest.MonkeyPatch) -> None:
    folder = root / "base_ar"
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    weight = next(
        w for w in model.graph.initializer if f"{LAYER}.mlp.down_proj" in w.name and w.data_type == INT4
    )

    def shifted(data: bytes) -> bytes:
        at = len(data) // 2 // BLOCK_BYTES * BLOCK_BYTES
        block = data[at : at + BLOCK_BYTES]
        return data[:at] + block[1:] + block[:1] + data[at + BLOCK_BYTES :]

    patch_bytes(folder, weight, shifted)
    rehash(root)


INT4 = onnx.TensorProto.INT4


def rotary_frequencies_in_float32(root: Path, patch: pytest.MonkeyPatch) -> None:
    def exact(frequencies: np.ndarray) -> np.ndarray:
        exponents = np.arange(0, HEAD_DIM, 2, dtype=np.float32) / HEAD_DIM
        found = (1 / np.float32(1e6) ** exponents).astype(np.float32).reshape(frequencies.shape)
        np.testing.assert_allclose(found, frequencies, rtol=2**-8)
        return found

    spoil_weight(root, "base_ar", "rotary.inv_freq", exact)


def epsilon_of_a_norm(root: Path, patch: pytest.MonkeyPatch) -> None:
    """That of the first norm: after it the stream is too large for an epsilon to matter."""

    def larger(graph: onnx.GraphProto) -> None:
        node = next(n for n in graph.node if "layers.0.input_layernorm.weight" in " ".join(n.input))
        [epsilon] = [a for a in node.attribute if a.name == "epsilon"]
        epsilon.f = 1e-5

    spoil_graph(root, "base_ar", larger)


def top_p_off_by_one_candidate(root: Path, patch: pytest.MonkeyPatch) -> None:
    """The candidate that crosses top-p is left out."""

    def one_less(graph: onnx.GraphProto) -> None:
        sums = next(node.output[0] for node in graph.node if node.op_type == "CumSum")
        node = next(n for n in graph.node if n.op_type == "LessOrEqual" and "top_p" in n.input)
        node.input[0] = sums

    spoil_graph(root, "image_head", one_less)


def noise_of_the_wrong_step(root: Path, patch: pytest.MonkeyPatch) -> None:
    at = gumbel.Noise.at
    patch.setattr(gumbel.Noise, "at", lambda self, steps: at(self, steps + (steps > 2)))


def position_of_the_second_window(root: Path, patch: pytest.MonkeyPatch) -> None:
    made = decode.ImageLoop.__init__

    class OneLate:
        def __init__(self, buffer) -> None:
            self.buffer, self.writes = buffer, 0

        def write(self, array: np.ndarray) -> None:
            self.writes += 1
            self.buffer.write(array + (self.writes == 2))

    def init(self, *arguments, **options) -> None:
        made(self, *arguments, **options)
        if self.window > 1:
            self.position_ids = OneLate(self.position_ids)

    patch.setattr(decode.ImageLoop, "__init__", init)


def stale_slot_inside_the_mask(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Each token sees the slot after its own, too."""

    def later(graph: onnx.GraphProto) -> None:
        node = next(n for n in graph.node if n.op_type == "LessOrEqual")
        graph.initializer.append(numpy_helper.from_array(np.array([1]), "one_more"))
        last = node.input[1]
        node.input[1] = "later"
        at = list(graph.node).index(node)
        graph.node.insert(at, helper.make_node("Add", [last, "one_more"], ["later"], name="later"))

    spoil_graph(root, "stacked_ar", later)


def bgr(root: Path, patch: pytest.MonkeyPatch) -> None:
    made = preprocess.patches_from_image
    patch.setattr(preprocess, "patches_from_image", lambda image, vision: made(image[..., ::-1], vision))


def bicubic_for_bilinear(root: Path, patch: pytest.MonkeyPatch) -> None:
    made = preprocess._resized
    other = {"BILINEAR": "BICUBIC"}
    patch.setattr(preprocess, "_resized", lambda image, h, w, name: made(image, h, w, other.get(name, name)))


def penalty_on_the_answer_only(root: Path, patch: pytest.MonkeyPatch) -> None:
    penalise, answered = decode.penalise_repetition, decode.TextLoop.answer
    length = 0

    def answer(self, input_ids: np.ndarray, *arguments, **options) -> np.ndarray:
        nonlocal length
        length = input_ids.shape[1]
        return answered(self, input_ids, *arguments, **options)

    patch.setattr(decode.TextLoop, "answer", answer)
    patch.setattr(decode, "penalise_repetition", lambda x, seen, by: penalise(x, seen[length:], by))


def guidance_on_the_wrong_pair(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Each image is guided away from the unconditional row of the other one."""

    def other_row(graph: onnx.GraphProto) -> None:
        node = next(n for n in graph.node if n.op_type == "Sub" and n.output[0] in guided(graph))
        row = node.input[1]
        for name, value in {"from_last": -1, "to_first": -(1 << 40), "images": 0, "backwards": -1}.items():
            graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
        for reader in graph.node:
            for i, read in enumerate(reader.input):
                if read == row:
                    reader.input[i] = "other_row"
        reverse = ["from_last", "to_first", "images", "backwards"]
        maker = next(i for i, n in enumerate(graph.node) if row in n.output)
        graph.node.insert(
            maker + 1, helper.make_node("Slice", [row, *reverse], ["other_row"], name="other_row")
        )

    spoil_graph(root, "image_head", other_row)


def guided(graph: onnx.GraphProto) -> list[str]:
    """What the guidance is multiplied with."""
    return [name for n in graph.node if n.op_type == "Mul" and "guidance" in n.input for name in n.input]


@dataclass(frozen=True)
class Fault:
    """What plants it, the rung and the rows that must catch it, and the precision of the bundle."""

    plant: Callable[[Path, pytest.MonkeyPatch], None]
    rung: str
    row: str
    precision: str = "fp32"


FAULTS = {
    "one head of one layer": Fault(one_head_of_one_layer, "golden tensors", "base_ar: case"),
    "one block of int4 codes shifted": Fault(
        one_block_of_int4_codes_shifted, "golden tensors", "base_ar: case", "int4"
    ),
    "rotary frequencies in float32": Fault(rotary_frequencies_in_float32, "golden tensors", "base_ar: case"),
    "a norm's epsilon": Fault(epsilon_of_a_norm, "golden tensors", "base_ar: case prefill"),
    "top-p off by one candidate": Fault(
        top_p_off_by_one_candidate, "golden tensors", "image_head: case narrow"
    ),
    "noise of the wrong step": Fault(noise_of_the_wrong_step, "whole runs", "runtime: sample"),
    "position of the second window": Fault(
        position_of_the_second_window, "other ways", "runtime: window of 8 tokens"
    ),
    "a stale cache slot inside the mask": Fault(
        stale_slot_inside_the_mask, "golden tensors", "stacked_ar: case"
    ),
    "BGR": Fault(bgr, "prepared inputs", "runtime: prepared for"),
    "bicubic for bilinear": Fault(bicubic_for_bilinear, "prepared inputs", "runtime: prepared for edit"),
    "repetition penalty on the answer only": Fault(
        penalty_on_the_answer_only, "whole runs", "runtime: repeat"
    ),
    "guidance on the wrong pair": Fault(guidance_on_the_wrong_pair, "golden tensors", "image_head: case"),
}
