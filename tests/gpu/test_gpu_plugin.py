"""The plugin's step: the benchmark's own lines and pytest's become figures and checks; on a machine without
a GPU it says so.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.gpu import plugin
from tests.gpu.report import Report
from tests.gpu.runner import PREDICTIONS

PASSED = [
    "test_gpu.py::test_the_models_shapes_are_as_defined[Case(rows=2, first=(1279, 640))]",
    "test_gpu.py::test_parts[3]",
]


@pytest.fixture
def benchmark(monkeypatch):
    """The benchmark's module, with times that are no GPU's: torch takes 20 us, the kernels 10, and the rest
    is not there.
    """
    monkeypatch.syspath_prepend(str(plugin.PLUGINS))
    spec = importlib.util.spec_from_file_location(
        "bench_kv_attention", plugin.PLUGINS / "bench_kv_attention.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)

    def absent(shape):
        raise ImportError("No module named 'flash_attn'")

    peers = {"star": SimpleNamespace(plan=(1, 3), us=10.0), "sdpa": SimpleNamespace(us=20.0)}
    monkeypatch.setattr(
        module,
        "PEERS",
        {name: (lambda shape, p=peer: p, None) for name, peer in peers.items()}
        | {"flash-attn": (absent, None)},
    )
    monkeypatch.setattr(
        module,
        "graph_of",
        lambda calls: SimpleNamespace(replay=SimpleNamespace(us=0.8 * calls[0].us * len(calls))),
    )
    monkeypatch.setattr(
        module, "timed", lambda call, before: [call.us * factor for factor in (0.9, 1.0, 1.2)]
    )
    return module


def test_every_line_of_the_benchmark_is_a_row_and_every_row_was_predicted(
    benchmark, capsys, tmp_path
) -> None:
    for shape in benchmark.SHAPES:
        benchmark.measure(shape, bandwidth=4e12, flush=None)
    lines = capsys.readouterr().out.splitlines()
    report = Report(tmp_path / "report.json")
    table = plugin.Table(report)
    table.take("a warning of torch")
    table.take(
        json.dumps({"gpu": "H200", "copy_bytes_per_s": 4e12, "copies_bytes_per_s": [3.9e12, 4e12, 4.1e12]})
    )
    for line in lines:
        table.take(line)
    figures, name = report.record["figures"], "STAR-7B decode, 2 rows, 4 key heads, 1 new, 1280 used"
    assert table.rows == 2 * len(benchmark.SHAPES)
    assert figures[f"{name}: star"] | {"context": 0} == {
        "median": 10,
        "min": 9,
        "max": 12,
        "number": 3,
        "unit": "us",
        "context": 0,
    }
    assert figures[f"{name}: star"]["context"] == {"configuration": 1, "splits": 3}
    assert (
        figures[f"{name}: sdpa in a graph"]["median"] == 16
        and figures[f"{name}: sdpa over star"]["median"] == 2
    )
    assert figures[f"{name}: share"]["median"] == pytest.approx(5242880 / 10e-6 / 4e12)
    assert "flash_attn" in report.record["facts"][f"{name}: flash-attn"]
    assert report.record["facts"][f"{name}: goals"] == {"not slower than sdpa": True}
    predicted = json.loads((PREDICTIONS / "plugin.json").read_text())
    assert {*figures, *report.record["facts"]} <= predicted.keys()


@pytest.mark.parametrize(
    "lines",
    [
        [f"tests/plugins/{PASSED[0]} PASSED [ 50%]", f"tests/plugins/{PASSED[1]} FAILED [100%]"],
        [
            f"[gw0] [ 50%] PASSED tests/plugins/{PASSED[0]} ",
            f"[gw13] [100%] FAILED tests/plugins/{PASSED[1]} ",
        ],
    ],
    ids=["alone", "in several processes"],
)
def test_each_test_is_a_check_and_what_is_not_done_in_time_is_not_run(monkeypatch, tmp_path, lines) -> None:
    monkeypatch.setattr(plugin, "program", lambda name: name)
    lines = [
        "============ test session starts ============",
        *lines,
        "125 cases, at most 0.4 of the limit",
        "2 cases, at most 0.8 of the limit",
    ]
    for status, reasons in ((1, []), (None, ["stopped after 9 s"])):
        monkeypatch.setattr(
            plugin, "lines_of", lambda command, seconds: iter([*lines, *([] if status is None else [status])])
        )
        report = Report(tmp_path / "report.json")
        plugin.run_tests(report, seconds=9)
        checks = {name: check["passed"] for name, check in report.record["checks"].items()}
        assert {name.partition("::")[2]: name == PASSED[0] for name in PASSED}.items() <= checks.items()
        assert ("pytest ended well" in checks) == (status is not None) and checks.get(
            "pytest ended well"
        ) is not True
        assert [item["reason"] for item in report.record["not_run"]] == reasons
        assert report.record["figures"]["largest error over what is allowed, of each test"]["max"] == 0.8


def test_pytest_prints_its_results_as_they_are_read(tmp_path) -> None:
    (tmp_path / "test_toy.py").write_text(
        "import pytest\n@pytest.mark.parametrize('x', ['a b', 'c'])\ndef test_x(x):\n    assert x == 'c'\n"
    )
    said = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", "test_toy.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    ).stdout
    found = {
        (match["other"], match["last"]) for match in map(plugin.RESULT.match, said.splitlines()) if match
    }
    assert found == {("test_toy.py::test_x[a b]", "FAILED"), ("test_toy.py::test_x[c]", "PASSED")}, said


def test_lines_come_until_the_time_is_over_and_nothing_is_left_behind(capsys) -> None:
    code = (
        "import subprocess, sys\nprint('first', flush=True)\n"
        "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    )
    assert list(plugin.lines_of([sys.executable, "-c", code], seconds=1)) == ["first"]
    assert list(plugin.lines_of([sys.executable, "-c", "print('x'); raise SystemExit(3)"], seconds=30)) == [
        "x",
        3,
    ]


@pytest.mark.parametrize(
    "lines, passed, words",
    [([0], True, "exit status 0, 0 rows"), ([1], False, "exit status 1"), ([], False, "stopped")],
)
def test_a_benchmark_that_is_stopped_did_not_run_to_its_end(
    monkeypatch, tmp_path, lines, passed, words
) -> None:
    monkeypatch.setattr(plugin, "lacks", lambda: "")
    monkeypatch.setattr(plugin, "lines_of", lambda command, seconds: iter(lines))
    monkeypatch.setattr(plugin, "run_tests", lambda report, seconds: None)
    report = Report(tmp_path / "report.json")
    plugin.run(tmp_path, report)
    check = report.record["checks"]["the benchmark ran to its end"]
    assert check["passed"] is passed and words in check["detail"]
