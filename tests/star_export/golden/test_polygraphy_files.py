"""Polygraphy, which others wrote, comes to the gate's verdict on clean runs and on twelve planted faults."""

from __future__ import annotations

import numpy as np
import pytest

from engines.errors import MissingError
from star_export.golden import polygraphy_files
from star_export.golden.compare import compare, tolerance_of
from star_export.golden.polygraphy_files import atol_of

from .test_compare import ARRAY_FAULTS, DECODER_FAULTS, IMAGE, TOLERANCES, H, decoder

pytest.importorskip("polygraphy")


def not_a_number(outputs):
    outputs["hidden_states"][1, 2] = np.nan
    return outputs


def one_missing(outputs):
    del outputs["present.1.value"]
    return outputs


def faulty(fault):
    """(candidate, reference) with one of the twelve planted faults."""
    if fault in ARRAY_FAULTS:
        with np.errstate(over="ignore"):
            return {"image": ARRAY_FAULTS[fault](IMAGE)}, {"image": IMAGE}
    if fault in OUTPUT_FAULTS:
        return OUTPUT_FAULTS[fault](decoder(0)), decoder(0, dtype=np.float64)
    return decoder(0, fault=fault), decoder(0, dtype=np.float64)


OUTPUT_FAULTS = {"a number that is not one": not_a_number, "an output missing": one_missing}
TWELVE = (*DECODER_FAULTS, *ARRAY_FAULTS, *OUTPUT_FAULTS)


def verdicts(candidate, reference):
    """What Polygraphy says of the tensors that `compare` compares: whether each one passes, by name.

    It skips a tensor that only one side has, and takes any type for any other, so names and types are looked
    at here.
    """
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
    from polygraphy.logger import G_LOGGER

    atol = {name: atol_of(array, tolerance_of(name, TOLERANCES)) for name, array in reference.items()}
    results = RunResults()
    for side, tensors in (("candidate", candidate), ("reference", reference)):
        whole = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
        results.add([whole], runner_name=side)
    judge = SimpleCompareFunc(rtol=0.0, atol=atol | {"": 0.0}, check_error_stat="max")
    found = {}
    if candidate.keys() & reference.keys():
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
            (accuracy,) = Comparator.compare_accuracy(results, compare_func=judge)
        ((_, (by_name,)),) = accuracy.items()
        found = {name: bool(result) for name, result in by_name.items()}
    same = {n for n in candidate if n in reference and candidate[n].dtype == reference[n].dtype}
    return {name: name in same and found[name] for name in {**reference, **candidate}}


def both(candidate, reference):
    """Tensor by tensor, what the gate says and what Polygraphy says."""
    ours = {r.tensor: r.passed for r in compare(candidate, reference, tolerances=TOLERANCES)}
    return ours, verdicts(candidate, reference)


@pytest.mark.parametrize("fault", TWELVE)
def test_polygraphy_agrees_tensor_by_tensor_on_each_planted_fault(fault):
    ours, theirs = both(*faulty(fault))
    assert ours == theirs and not all(ours.values())


def test_there_are_twelve_planted_faults():
    assert len(TWELVE) == 12


def test_polygraphy_agrees_on_20_clean_runs():
    rng = np.random.default_rng(1)
    for seed in range(20):
        ours, theirs = both(decoder(seed, order=rng.permutation(H)), decoder(seed, dtype=np.float64))
        assert ours == theirs and all(ours.values()), seed


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:1],
        lambda x: x[None],
        lambda x: x.astype(np.float16),
        lambda x: x * np.inf,
        lambda x: x + np.float32(1e-4),
        lambda x: x + np.float32(3e-4),
    ],
    ids=["row", "rank", "fp16", "infinite", "within", "beyond"],
)
def test_polygraphy_agrees_on_other_shapes_types_and_near_the_tolerance(change):
    x = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    ours, theirs = both({"logits": change(x)}, {"logits": x})
    assert ours == theirs


def test_polygraphy_agrees_on_ids():
    ids = np.arange(16)
    assert both({"image_ids": ids.copy()}, {"image_ids": ids}) == ({"image_ids": True},) * 2
    assert both({"image_ids": ids ^ 1}, {"image_ids": ids}) == ({"image_ids": False},) * 2


def test_without_polygraphy_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(polygraphy_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="not installed") as caught:
        polygraphy_files.check_polygraphy()
    assert ".[debug]" in caught.value.fix
