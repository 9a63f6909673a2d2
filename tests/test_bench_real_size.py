"""What the bench of real size measures: memory, times, reads; and how its table judges."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import bench_real_size
from tests.helpers import real_size_limits
from tests.helpers.measured import run_measured, seconds_to_read

MIB = 1 << 20
MEMORY = """
import multiprocessing, sys, time
def hold(count):
    kept = bytearray(b"x") * (count << 20)
    time.sleep(0.5)
if __name__ == "__main__":
    hold(50)
    spawn = multiprocessing.get_context("spawn")
    children = [spawn.Process(target=hold, args=(count,)) for count in (60, 90)]
    [child.start() for child in children]
    [child.join() for child in children]
"""


@pytest.fixture
def script(tmp_path: Path):
    def command(text: str) -> list[str]:
        (tmp_path / "script.py").write_text(text)
        return [sys.executable, str(tmp_path / "script.py")]

    return command


def test_memory_is_that_of_all_processes_at_once(script) -> None:
    run = run_measured(script(MEMORY))
    assert run.exit_code == 0
    assert 150 * MIB < run.peak_bytes < 250 * MIB  # 60 and 90 together, with their interpreters


def test_mapped_files_are_not_own_pages(script, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(200 * MIB))
    run = run_measured(
        script(
            "import mmap, time\n"
            f"file = open({str(tmp_path / 'file')!r}, 'rb')\n"
            "m = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)\n"
            "total = sum(m[i] for i in range(0, len(m), 4096))\n"
            "time.sleep(0.3)\n"
        )
    )
    assert run.exit_code == 0 and run.peak_bytes < 100 * MIB


def test_a_command_that_takes_too_much_is_killed(script) -> None:
    run = run_measured(
        script("import time; kept = bytearray(b'x') * (300 << 20); time.sleep(60)"), stop_bytes=200 * MIB
    )
    assert run.exit_code == -9 and run.seconds < 30


def test_what_is_said_has_its_time(script) -> None:
    run = run_measured(
        script(
            "import sys, time\n"
            "assert sys.stderr.isatty()\n"
            "print('out'); print('begin', file=sys.stderr, flush=True); time.sleep(0.5)\n"
            "print('the end', file=sys.stderr)\n"
        )
    )
    assert run.stdout == "out\n" and run.first("absent") is None
    assert 0.4 < run.first("the end") - run.first("begin") < 5


def test_a_text_on_the_terminal_interrupts(script) -> None:
    run = run_measured(
        script(
            "import sys, time\n"
            "try:\n"
            "    print('first token', file=sys.stderr, flush=True); time.sleep(60)\n"
            "except KeyboardInterrupt:\n"
            "    sys.exit(130)\n"
        ),
        stop_text="first token",
    )
    assert run.exit_code == 130 and run.seconds < 30


def test_reading_takes_all_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(bytes(40 * MIB))
    assert 0 < seconds_to_read([tmp_path / "a"], cold=False) < 10
    assert 0 < seconds_to_read([tmp_path / "a"] * 2, cold=True) < 20


def step(**more) -> dict:
    return {"seconds": 60.0, "peak_bytes": 10**9, "exit_code": 0, "commit": "c", "date": "today"} | more


GENERATE = step(
    tokens=101,
    first_token_s={"at first": 9.0, "cold": 6.0, "warm": 4.0},
    last_token_s=16.0,
    read_s={"at first": 3.0, "cold": 3.0, "warm": 1.0},
    step_bytes=10**9,
    bandwidth=20e9,
)


def test_figures_follow_from_what_was_measured() -> None:
    steps = {
        "export": step(bundle_bytes=102, distinct_bytes=100),
        "generate": GENERATE,
        "validate": step(exit_code=4),
    }
    found = real_size_limits.figures(steps)
    assert found["export: peak memory"] == 1 and found["export: time"] == 1
    assert found["bundle / its distinct weights"] == 1.02
    assert found["share of read bandwidth in decode"] == pytest.approx(
        0.5
    )  # 0.1 s a token, 0.05 at the limit
    assert found["first token / reading its files, cold"] == 2
    assert found["validate: time"] == "exit code 4"


def test_the_table_says_what_misses_its_limit() -> None:
    steps = {
        "export": step(peak_bytes=4 * 10**9, bundle_bytes=102, distinct_bytes=100),
        "generate": GENERATE,
        "build": step(peak_bytes=4 * 10**9, seconds=299),
    }
    machine = {"cpu": "a CPU", "cores": 2}
    record = {"size": "3B", "machine": machine, "fewer": {}, "steps": {"int4": steps, "bf16": {}}}
    lines = real_size_limits.table(record)
    assert "| 3B | int4 | limit | bf16 | limit |" in lines
    assert "| export: peak memory | 4 GB (missed) | 3 GB | - | - |" in lines
    assert "| bundle / its distinct weights | 1.02 | 1.02 | - | - |" in lines
    assert "| build: peak memory | 4 GB | 4 GB | - | - |" in lines
    assert "| share of read bandwidth in decode | 0.5 (missed) | 0.6 | - | - |" in lines
    fewer = real_size_limits.table(record | {"fewer": {"layers": "1"}})
    assert "| export: peak memory | 4 GB | - | - | - |" in fewer  # no limit for a smaller model


def test_every_row_has_the_limits_of_the_table() -> None:
    columns = [("3B", "int4"), ("7B", "int4"), ("7B", "bf16")]
    assert {row.name: [row.limits.get(column) for column in columns] for row in real_size_limits.LIMITS} == {
        "export: peak memory": [3, 4, 4],
        "export: time": [12, 30, 30],
        "bundle / its distinct weights": [1.02, 1.02, 1.02],
        "build: peak memory": [4, 5, 8],
        "build: time": [5, 12, 15],
        "validate: peak memory": [8, 14, 8],
        "validate: time": [15, 35, None],
        "read-back: peak memory": [6, 8, 8],
        "share of read bandwidth in decode": [0.6, 0.6, None],
        "first token / reading its files, at first": [None, None, None],
        "first token / reading its files, cold": [2.5, 2.5, None],
        "first token / reading its files, warm": [None, None, None],
    }


def test_a_step_of_the_same_commit_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(bench_real_size, "commit", lambda: "c")
    monkeypatch.setattr(
        bench_real_size.Bench, "plan", lambda self, precision: ran.append(precision) or step()
    )
    (tmp_path / "bundle-int4").mkdir()
    monkeypatch.setattr(sys, "argv", ["bench", "nano", str(tmp_path), "--steps", "plan"])
    bench_real_size.main()
    bench_real_size.main()
    assert ran == ["int4"]
    monkeypatch.setattr(bench_real_size, "commit", lambda: "d")
    bench_real_size.main()
    assert ran == ["int4"] * 2
    record = json.loads((tmp_path / "bench-nano.json").read_text())
    assert record["steps"]["int4"]["plan"]["exit_code"] == 0 and record["machine"]["cores"]


def test_the_distinct_weights_of_nano_are_counted_once() -> None:
    weights = bench_real_size.distinct_weights("nano", "bf16")
    assert "text_head.weight" not in weights  # tied
    assert "image_table.weight" in weights and not any(name.startswith("pixel_adapter") for name in weights)
    assert sum(weights.values()) > 1e7
