"""Tolerances in 16 bits are three times the reference's own error in that type, recorded at export.

Drawn ids are held to the logits of the same run.
"""

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.runtime.sampler import sample
from star_export.components import COMPONENTS, DIFFUSION, FLIPPED_IDS
from star_export.golden.cases import component_cases
from star_export.golden.run_case import redrawn, run_case
from star_export.golden.tolerances import MARGIN, largest_noise, tolerances_of


def noise_of(bundle: Bundle) -> dict[str, dict[str, float]]:
    """Component -> output -> its noise in the case where that is largest."""
    return {
        name: {
            k: float(v)
            for k, v in largest_noise(
                component_cases(bundle.file(spec.golden), spec).values(), "bf16"
            ).items()
        }
        for name, spec in bundle.manifest.components.items()
    }


def test_a_16_bit_bundle_records_how_far_the_reference_itself_is_off(bundle_of) -> None:
    fp32, fp16, bf16 = (noise_of(Bundle.open(bundle_of(precision))) for precision in ("fp32", "fp16", "bf16"))
    assert not any(fp32.values())
    for name, row in COMPONENTS.items():
        if row.table or name in DIFFUSION:  # the rows of a table are exact
            continue
        assert (
            bf16[name].keys()
            == fp16[name].keys()
            == {output for output, tolerance in row.tolerances.items() if tolerance > 0}
        )
        for output, value in bf16[name].items():
            assert (
                1e-3 < value < 0.5 and value / 20 < fp16[name][output] < value / 3
            )  # three bits more: about an eighth


def test_graphs_with_quantised_products_record_the_noise_of_int8_activations(bundle_of) -> None:
    """Convolutions are computed in float32 on their stored kernels."""
    for precision, products in (("int4", True), ("bf16", False)):
        bundle = Bundle.open(bundle_of(precision))
        for name, spec in bundle.manifest.components.items():
            found = largest_noise(component_cases(bundle.file(spec.golden), spec).values(), "int8")
            measured = {output for output, tolerance in COMPONENTS[name].tolerances.items() if tolerance > 0}
            assert found.keys() == (measured if products and not name.startswith("vq_") else set()), name
            assert all(1e-4 < value < 0.5 for value in found.values()), f"{name}: {found}"


def test_the_limit_is_the_margin_times_the_noise_of_the_case() -> None:
    noise = {"image_ids": np.float32(0.5), "logits": np.float32(0.02)}
    assert tolerances_of("image_head", "fp32", {}) == COMPONENTS["image_head"].tolerances
    for compute in ("bf16", "fp16"):
        found = tolerances_of("image_head", compute, noise)
        assert (
            MARGIN == 3
            and found["logits"] == pytest.approx(0.06)
            and found["image_ids"] == found["inputs_embeds"] == 0
        )
    assert tolerances_of("vq_encoder", "bf16", {}) == {"image_ids": FLIPPED_IDS}


def test_what_a_coarser_arithmetic_leaves_alone_is_held_as_in_float32() -> None:
    """The embedding of the time has no products with activations in int8, so its recorded noise is 0."""
    noise = {name: np.float32(0.02) for name in ("caption_states", "image_states")}
    noise["time_states"] = np.float32(0)
    wanted = {"caption_states": 0.06, "image_states": 0.06, "time_states": 2e-4}
    assert tolerances_of("dit/0", "int8", noise) == pytest.approx(wanted)


def test_without_noise_nothing_is_judged_in_16_bits() -> None:
    with pytest.raises(
        InputError, match="stacked_ar: expected the reference's own noise in bf16 of present, got none"
    ):
        tolerances_of("stacked_ar", "bf16", {"hidden_states": np.float32(0.1)})


def test_drawn_ids_are_held_to_the_executors_own_logits() -> None:
    logits = np.random.Generator(np.random.Philox(3)).standard_normal((4, 500), dtype=np.float32)
    feeds = {
        "top_k": np.array([300]),
        "top_p": np.array([0.9], np.float32),
        "noise": np.random.default_rng(4).gumbel(size=logits.shape).astype(np.float32),
    }
    wanted = redrawn({"logits": logits}, feeds)["image_ids"]
    assert (
        np.array_equal(wanted, sample(logits, top_k=300, top_p=0.9, noise=feeds["noise"]))
        and len(set(wanted.tolist())) > 1
    )
    assert not np.array_equal(redrawn({"logits": np.flip(logits, -1)}, feeds)["image_ids"], wanted)
    assert not redrawn({"logits": logits}, {}) and not redrawn(
        {"logits": logits * np.nan}, feeds
    )  # text_head; NaN fails by itself


class Buffer:
    dtype = "float32"

    def __init__(self, array: np.ndarray):
        self.array, self.shape = array, array.shape

    def write(self, array: np.ndarray) -> None:
        self.array = array

    def read(self) -> np.ndarray:
        return self.array


class Head:
    """An `image_head` that returns these outputs, whatever it is given."""

    capacity_tokens = prefill_tokens = None

    def __init__(self, bundle: Bundle, outputs: dict[str, np.ndarray]):
        self.spec, self.outputs = bundle.component("image_head"), outputs

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        return Buffer(np.zeros(shape, dtype))

    def close(self) -> None:
        pass

    def bind(self, buffers: dict[str, Buffer]):
        return lambda: [buffers[name].write(array) for name, array in self.outputs.items()]


def test_a_head_in_16_bits_is_judged_by_its_own_logits(bundle_of) -> None:
    """Logits that differ a little may draw another id;
    ids that these logits do not draw fail, recorded or not."""
    bundle = Bundle.open(bundle_of("bf16"))
    spec = bundle.component("image_head")
    case = component_cases(bundle.file(spec.golden), spec)["open"]
    tolerances = tolerances_of("image_head", "bf16", case.noise)
    recorded = case.outputs["logits"]
    noise = np.random.Generator(np.random.Philox(5)).uniform(-1, 1, recorded.shape).astype(np.float32)
    logits = recorded + noise * 0.9 * tolerances["logits"] * recorded.std()
    for seed in range(500):  # the first whose draws are near enough to change, and not all of them
        case.inputs["noise"] = np.random.default_rng(seed).gumbel(size=recorded.shape).astype(np.float32)
        ids, drawn = (redrawn({"logits": array}, case.inputs)["image_ids"] for array in (recorded, logits))
        if (drawn == ids).any() and not (drawn == ids).all():
            break
    assert not np.array_equal(drawn, ids)
    case.outputs["image_ids"] = ids

    def fails(given: np.ndarray, *, own_draws: bool = True) -> set[str]:
        head = Head(bundle, case.outputs | {"logits": logits, "image_ids": given})
        return {
            r.tensor for r in run_case(head, case, tolerances=tolerances, own_draws=own_draws) if not r.passed
        }

    assert fails(drawn) == set() and fails(drawn, own_draws=False) == {"image_ids"}
    assert fails(drawn + 1) == {"image_ids"} and fails(ids) == {"image_ids"}
