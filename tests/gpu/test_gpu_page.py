"""The page: every figure beside its prediction, and what did not run with its reason."""

from __future__ import annotations

from tests.gpu.page import page
from tests.gpu.report import Report

MACHINE = {
    "time": "2030-01-01",
    "commit": "abc",
    "nvcc": None,
    "python": "3.12",
    "system": "Linux",
    "cores": 16,
    "packages": {"torch": "2", "x": None},
    "gpus": [
        {
            "name": "H200",
            "compute_capability": "9.0",
            "driver": "580",
            "memory_mib": "1",
            "power_limit_w": "700",
        }
    ],
}


def shown(tmp_path, predictions: dict, **entry) -> str:
    report = Report(tmp_path / "report.json")
    report.figure("time", [2.0, 1.0, 4.0], "us", rows=2)
    report.fact("answer", "refused | because")
    report.check("equal", False, "2 of 3")
    step = (
        report.record
        | {"run": 0, "status": "done", "seconds": 1.0, "reason": "", "output_tail": "the\nend"}
        | entry
    )
    return page({"runs": [MACHINE], "steps": {"toy": step}, "predictions": {"toy": predictions}})


def test_a_figure_stands_beside_its_prediction(tmp_path) -> None:
    for low, high, word in ((1, 3, "as predicted"), (3, 4, "below"), (0.5, 1.5, "above")):
        text = shown(tmp_path, {"time": {"low": low, "high": high, "unit": "us", "why": "so"}})
        assert f"| time (rows 2) | 2 us | 1 to 4 | 3 | {low} to {high} | {word} |" in text
    assert "| time (rows 2) | 2 us | 1 to 4 | 3 | nothing | not predicted |" in shown(tmp_path, {})


def test_facts_and_checks_stand_beside_theirs_and_what_was_not_seen_is_named(tmp_path) -> None:
    text = shown(
        tmp_path,
        {
            "answer": {"expected": "refused", "why": "so"},
            "equal": {"expected": "held", "why": "so"},
            "score": {"expected": "as the CPU's", "why": "so"},
        },
    )
    assert (
        "| answer | refused \\| because | refused |" in text
        and "| equal | DID NOT HOLD | 2 of 3 | held |" in text
    )
    assert "Predicted and not seen: score." in text


def test_what_did_not_run_says_why_with_the_end_of_its_output(tmp_path) -> None:
    text = shown(tmp_path, {}, status="not run", reason="torch sees no CUDA device")
    assert "| toy | not run | 1 | 1 | torch sees no CUDA device |" in text and "\n    the\n    end\n" in text
    assert (
        "H200, SM 9.0, driver 580" in text
        and "commit abc" in text
        and "torch 2" in text
        and "x None" not in text
    )
