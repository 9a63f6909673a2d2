"""The runner: a step that hangs, crashes or lacks something ends by itself alone, and what was seen by then
is on disk.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import __main__ as command
from tests.gpu import machine
from tests.gpu.report import Report
from tests.gpu.runner import PAGE, PREDICTIONS, RECORD, STEPS, run_steps

TOYS = {
    "fine": "report.figure('speed', [3, 1, 2], 'us', rows=2)\n"
    "    report.fact('out', json.load(open(os.environ['TOY_OUT'])))",
    "hangs": "report.figure('early', [1.0], 'ms')\n    print('before it hangs')\n"
    "    sleeps = [sys.executable, '-c', 'import time; time.sleep(60)']\n"
    "    child = subprocess.Popen(sleeps, start_new_session=True)\n"
    "    report.fact('child', child.pid)\n    time.sleep(60)",
    "crashes": "report.fact('seen', 1)\n    print('last words')\n    os.kill(os.getpid(), signal.SIGSEGV)",
    "raises": "raise RuntimeError('a bug')",
    "lacks": "import no_such_package",
    "lacks_gpu": "from engines.errors import MissingError\n"
    "    raise MissingError('no GPU', where='here', fix='none')",
    "breaks": "report.check('holds', True)\n    report.check('equal ids', False, '3 differ')",
    "partly": "report.fact('seen', 1)\n    report.not_run('too large', part='7B')",
    "silent": "pass",
}
HEAD = (
    "import json, os, signal, subprocess, sys, time\nNAME, LIMIT_SECONDS = {name!r}, {limit}\n"
    "def run(folder, report):\n    {body}\n"
)


@pytest.fixture
def toys(tmp_path, monkeypatch) -> Path:
    """A package of toy steps that the runner and its children find; the folder for the record."""
    package = tmp_path / "toys"
    package.mkdir()
    for name, body in TOYS.items():
        (package / f"{name}.py").write_text(
            HEAD.format(name=name, limit=2 if name == "hangs" else 20, body=body)
        )
    (package / "wrong.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.partition(".")[0] == "toys"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setenv("TOY_OUT", str(tmp_path / "out" / RECORD))
    return tmp_path / "out"


def steps_of(out: Path, *names: str, **options) -> dict:
    run_steps(list(names), out, package="toys", tell=lambda line: None, **options)
    return json.loads((out / RECORD).read_text())["steps"]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_step_that_hangs_is_killed_with_its_children_and_keeps_its_figures(toys) -> None:
    began = time.monotonic()
    step = steps_of(toys, "hangs", "partly")["hangs"]
    assert time.monotonic() - began < 12 and step["status"] == "failed" and "limit of 2 s" in step["reason"]
    assert step["figures"]["early"]["median"] == 1.0 and "before it hangs" in step["output_tail"]
    assert not alive(step["facts"]["child"])
    assert "killed at its limit" in (toys / PAGE).read_text()


def test_each_end_is_recorded_with_its_reason_and_the_next_step_goes_on(toys) -> None:
    steps = steps_of(toys, "crashes", "raises", "lacks", "lacks_gpu", "wrong", "breaks", "silent", "partly")
    found = {name: (step["status"], step["reason"]) for name, step in steps.items()}
    assert found["crashes"] == ("failed", "crashed: signal SIGSEGV") and steps["crashes"]["facts"] == {
        "seen": 1
    }
    assert "last words" in steps["crashes"]["output_tail"]
    assert found["raises"][0] == "failed" and "RuntimeError: a bug" in steps["raises"]["output_tail"]
    assert found["lacks"][0] == "not run" and "no_such_package" in found["lacks"][1]
    assert found["lacks_gpu"] == ("not run", "MissingError: no GPU where: here fix: none")
    assert found["wrong"][0] == "not run" and "no_such_package" in found["wrong"][1]
    assert (
        found["breaks"] == ("failed", "equal ids")
        and steps["breaks"]["checks"]["equal ids"]["detail"] == "3 differ"
    )
    assert found["silent"] == ("not run", "it reported nothing")
    assert found["partly"] == ("done", "7B not run: too large")
    assert all(reason in (toys / PAGE).read_text() for _, reason in found.values())


def test_the_record_is_whole_after_each_step_and_a_later_run_replaces_only_its_own(toys) -> None:
    first = steps_of(toys, "partly", "fine", commit="abc")
    seen = first["fine"]["facts"]["out"]  # what was on disk while `fine` ran
    assert seen["steps"]["partly"]["status"] == "done" and seen["steps"]["fine"]["status"] == "running"
    assert first["fine"]["figures"]["speed"] == {
        "median": 2.0,
        "min": 1.0,
        "max": 3.0,
        "number": 3,
        "unit": "us",
        "context": {"rows": 2},
    }
    again = steps_of(toys, "fine", commit="def")
    record = json.loads((toys / RECORD).read_text())
    assert [run["commit"] for run in record["runs"]] == ["abc", "def"]
    assert again["partly"] == first["partly"] and (again["fine"]["run"], again["partly"]["run"]) == (1, 0)


def test_without_time_left_a_step_is_not_run(toys) -> None:
    step = steps_of(toys, "fine", budget_seconds=0.0)["fine"]
    assert (step["status"], step["reason"]) == ("not run", "the time of the whole run is used up")


def test_a_run_that_is_killed_keeps_what_it_had_and_its_step_ends_too(toys, tmp_path) -> None:
    code = (
        "from pathlib import Path\nfrom tests.gpu.runner import run_steps\n"
        f"run_steps(['partly', 'slow'], Path({str(toys)!r}), package='toys')"
    )
    (tmp_path / "toys" / "slow.py").write_text(
        HEAD.format(name="slow", limit=60, body="report.fact('me', os.getpid())\n    time.sleep(60)")
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=machine.ROOT,
        env=os.environ | {"PYTHONPATH": f"{machine.ROOT}:{tmp_path}"},
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if (toys / RECORD).exists() and (
            me := json.loads((toys / RECORD).read_text())["steps"].get("slow", {}).get("facts", {}).get("me")
        ):
            break
        time.sleep(0.1)
    runner.kill()
    runner.wait()
    assert json.loads((toys / RECORD).read_text())["steps"]["partly"]["status"] == "done"
    while alive(me) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(me)
    assert steps_of(toys, "silent")["slow"]["reason"] == "the run was cut off in this step"


def test_a_report_refuses_what_is_no_measurement_and_stays_whole(tmp_path) -> None:
    report = Report(tmp_path / "report.json")
    report.figure("good", [1, 2], "s")
    for values in ([], [math.nan], [1, math.inf]):
        with pytest.raises(ValueError, match="finite"):
            report.figure("bad", values, "s")
    with pytest.raises(ValueError, match="there already"):
        report.figure("good", [3], "s")
    with pytest.raises(TypeError):
        report.fact("no JSON", object())
    report.fact("later", [1])
    assert json.loads((tmp_path / "report.json").read_text()) == report.record and list(
        report.record["facts"]
    ) == ["later"]


def test_the_command_lists_every_step_and_each_has_its_predictions(capsys) -> None:
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(STEPS) and not any(
        "cannot" in line for line in lines
    ), lines
    for name in STEPS:
        predictions = json.loads((PREDICTIONS / f"{name}.json").read_text())
        assert predictions
        for what, one in predictions.items():
            assert one["why"] and ("expected" in one) != (
                one.keys() >= {"low", "high", "unit"} and one["low"] <= one["high"]
            ), what


def test_the_exit_status_tells_failed_from_not_run() -> None:
    entries = [{"status": status} for status in ("done", "not run", "failed")]
    assert [command.status_of(entries[:n]) for n in (1, 2, 3)] == [0, 5, 4]


def test_without_git_the_commit_is_what_a_file_says(tmp_path, monkeypatch) -> None:
    assert machine.commit_of(tmp_path) is None
    monkeypatch.setattr(machine, "COMMIT_FILE", tmp_path / "COMMIT")
    (tmp_path / "COMMIT").write_text("0123abc\n")
    assert machine.commit_of(tmp_path) == "0123abc" and machine.machine(commit="given")["commit"] == "given"
