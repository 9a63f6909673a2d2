"""Progress is a bar or two for people and sparse lines for logs, with rate and time left."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace

import pytest

from engines.progress import adder
from star_export.cli import progress_bar
from star_export.cli.progress_bar import ProgressBar, duration


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_bar, "time", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    terminal = Terminal()
    monkeypatch.setattr(progress_bar, "sys", SimpleNamespace(stderr=terminal))
    return terminal


def test_a_log_is_told_each_step_and_what_takes_long_within_it(clock: Clock, capsys) -> None:
    with ProgressBar("export") as bar:
        bar("export vision", 0, 2)
        clock.now += 3
        bar("export base_ar", 1, 2)
        for second in range(16):
            bar("write the weights, in bytes", second * 10**8, 4 * 10**9)
            clock.now += 1
    assert capsys.readouterr().err.splitlines() == [
        "export: export base_ar (1 of 2) [3 s]",
        "export: export base_ar (1 of 2), write the weights: 200.0 MB of 4.0 GB, 100.0 MB/s, 38 s left [5 s]",
        "export: export base_ar (1 of 2), write the weights: 1.2 GB of 4.0 GB, 100.0 MB/s, 28 s left [15 s]",
    ]


def test_a_log_counts_tokens_without_steps(clock: Clock, capsys) -> None:
    with ProgressBar("generate") as bar:
        clock.now += 42  # to the first token
        for token in range(1, 577):
            bar("draw, in tokens", token, 576)
            clock.now += 1.65
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "generate: draw: 1 of 576 tokens [42 s]"
    assert lines[1] == "generate: draw: 8 of 576 tokens, 0.606 tokens/s, 15 min 37 s left [54 s]"
    assert len(lines) == pytest.approx(576 * 1.65 / progress_bar.LINE_EVERY_S, abs=20)


def test_a_remark_changes_without_starting_the_count_again(clock: Clock, capsys) -> None:
    """The rate and the time left go on, whatever is remarked at each token."""
    bar = ProgressBar("generate")
    for done in range(1, 31):
        bar(f"draw, in tokens, {done / 7:.1f} a forward", done, 60)
        clock.now += 1
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 4
    assert lines[-1].startswith("generate: draw: ") and " of 60 tokens, " in lines[-1]
    assert " a forward, 1" in lines[-1] and " tokens/s, " in lines[-1] and " left" in lines[-1]


def test_short_work_is_not_mentioned_in_a_log(clock: Clock, capsys) -> None:
    with ProgressBar("build") as bar:
        for step in range(20):
            bar(f"build {step}", step, 20)
            bar("hash, in bytes", step, 20)
            clock.now += 0.09
    assert capsys.readouterr().err == ""


def test_a_rate_counts_from_where_the_work_began(clock: Clock, capsys) -> None:
    """A download that goes on is not faster for what was there already."""
    with ProgressBar("export") as bar:
        bar("download STAR-3B.pt, in bytes", 7 * 10**9, 8 * 10**9)
        clock.now += 10
        bar("download STAR-3B.pt, in bytes", 7_500_000_000, 8 * 10**9)
    assert "7.5 GB of 8.0 GB, 50.0 MB/s, 10 s left" in capsys.readouterr().err


def test_a_count_that_starts_again_has_a_rate_of_its_own(clock: Clock, capsys) -> None:
    with ProgressBar("validate") as bar:
        for _ in range(2):
            bar("hash, in bytes", 0, 10**9)
            clock.now += 20
            bar("hash, in bytes", 5 * 10**8, 10**9)
    assert capsys.readouterr().err.count("25.0 MB/s, 20 s left") == 2


def test_a_terminal_has_a_bar_for_the_steps_and_one_within(clock: Clock, terminal: Terminal) -> None:
    with ProgressBar("export") as bar:
        bar("export base_ar", 3, 10)
        tick = adder(bar, "write the weights, in bytes", 2 * 10**9)
        for _ in range(4):
            clock.now += 1
            tick(5 * 10**8)
    drawn = terminal.getvalue()
    assert "export: export base_ar:  30%" in drawn and "| 3/10 [" in drawn
    assert "  write the weights:  50%" in drawn and "1.00G/2.00G" in drawn and "B/s]" in drawn
    assert drawn.rindex("\r") >= len(drawn.rstrip()), "the bars are wiped at the end"


def test_a_terminal_is_not_redrawn_for_every_token(clock: Clock, terminal: Terminal) -> None:
    with ProgressBar("generate") as bar:
        for token in range(1, 1001):
            clock.now += 0.001
            bar("draw, in tokens", token, 1000)
    assert 5 < terminal.getvalue().count("tokens/s") < 40


def test_nothing_is_shown_where_it_is_not_wanted(clock: Clock, capsys) -> None:
    with ProgressBar("export", shown=False) as bar:
        clock.now += 100
        bar("export base_ar", 1, 2)
    assert capsys.readouterr().err == ""


def test_several_threads_may_report(capsys) -> None:
    with ProgressBar("hash") as bar:
        bar.started -= 10
        ticks = [adder(bar, f"hash {name}, in bytes", 1000) for name in "abcd"]
        threads = [threading.Thread(target=lambda t=t: [t(1) for _ in range(1000)]) for t in ticks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(line.startswith("hash: hash ") for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.6, "1 min 0 s"), (156, "2 min 36 s"), (3900, "1 h 5 min")]
)
def test_durations_read_like_speech(seconds: float, text: str) -> None:
    assert duration(seconds) == text
