"""`plan` answers what fits, how fast, and what would make it fit; the bundle's answer is the source's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engines.errors import UsageError
from engines.fit import machine
from star_export.planner.plan import Place, plan


def place(source: str, target: str, precision: str, **options) -> Place:
    (found,) = plan(source, targets=[target], precisions=[precision], **options).places
    return found


def states(found: Place) -> dict[str, str]:
    return {task.task: task.fits for task in found.tasks}


def remedies(found: Place, task: str) -> tuple[str, ...]:
    return next(t.remedies for t in found.tasks if t.task == task)


def test_3b_fits_a_large_gpu_and_a_small_one_only_in_int4() -> None:
    assert set(states(place("star-3b", "rtx-4090", "bf16")).values()) == {"resident"}
    assert set(states(place("star-3b", "rtx-4060", "int4")).values()) == {"resident"}
    small = place("star-3b", "rtx-4060", "bf16")
    assert states(small) == {"generate": "no", "edit": "no", "ask": "in turn", "reason": "no"}
    assert any("--memory" in remedy for remedy in remedies(small, "ask"))


def test_what_would_make_it_fit_fits() -> None:
    """Each remedy, taken alone."""
    found = place("star-3b", "rtx-4060", "bf16")
    assert "--precision int4" in remedies(found, "generate")
    assert states(place("star-3b", "rtx-4060", "int4"))["generate"] == "resident"
    many = place("star-3b", "rtx-4060", "int4", rows=64)
    assert states(many)["generate"] == "no" and "2 rows" in remedies(many, "generate")
    long = place("star-3b", "rtx-4060", "int4", capacity_tokens=32_000)
    assert states(long)["generate"] == "no"
    assert any("a capacity of 640 tokens" in remedy for remedy in remedies(long, "generate"))
    huge = place("star-7b", "orin-nano-jp62", "int4", capacity_tokens=576)
    assert all("GB" in remedy or "--" in remedy for task in huge.tasks for remedy in task.remedies)


def test_a_device_that_does_not_run_a_precision_says_which_it_runs() -> None:
    turing = place("star-3b", "rtx-2080-ti", "bf16")
    assert turing.reason == "runs fp16"
    assert all("int4" not in remedy for task in turing.tasks for remedy in task.remedies)


def test_the_time_on_the_h200_is_near_what_was_measured_there() -> None:
    """docs/figures.md: 8.39 and 11.0 ms in bf16. What was measured in int4 had other formats then."""
    for source, measured_ms in (("star-3b", 8.39), ("star-7b", 11.0)):
        found = place(source, "h200", "bf16")
        assert found.measured is not None and found.limit is not None
        assert found.measured.image_token_ms == pytest.approx(measured_ms, rel=0.08)
        assert found.limit.image_token_ms < found.measured.image_token_ms
    assert place("star-3b", "rtx-4090", "bf16").measured is None
    assert place("star-3b", "h200", "int4").measured is None


def test_a_bundle_is_answered_as_its_source(
    mini_checkpoint: Path, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 10**10)
    options = {"targets": ("cpu", "rtx-4090"), "cpu_bandwidth_bytes_per_s": 1e10}
    bundle = plan(str(mini_bundle), **options)
    source = plan(str(mini_checkpoint), precisions=["fp32"], **options)
    assert bundle.places == source.places and bundle.model == source.model
    (stored,), (exported,) = bundle.stores, source.stores
    assert stored.weights == exported.weights
    assert stored.export is None and exported.export and exported.export.seconds > 0
    assert bundle.places[1].reason and "bf16" in bundle.places[1].reason


def test_a_bundle_is_planned_without_torch_and_onnx(mini_bundle: Path) -> None:
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['onnx'] = None\n"
        f"from star_export.planner.plan import plan\nplan({str(mini_bundle)!r}, targets=['rtx-4090'])"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"targets": ["rtx-1"]}, "rtx-4090"),
        ({"precisions": ["fp7"]}, "fp7"),
        ({"rows": 1}, "rows"),
        ({"capacity_tokens": 10**7}, "capacity_tokens"),
    ],
)
def test_unknown_names_and_sizes_out_of_range_are_refused(options: dict, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        plan("star-3b", **options)
    assert said in caught.value.where


def test_a_bundle_has_no_other_precision(mini_bundle: Path) -> None:
    with pytest.raises(UsageError, match="one precision"):
        plan(str(mini_bundle), precisions=["int4"])
