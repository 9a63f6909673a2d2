"""What one step saw: figures, facts and checks, on disk as soon as they are known.

A step is a module of this folder with

    NAME = "plugin"                                the word for `--steps`
    LIMIT_SECONDS = 100                            after which its processes are killed
    def run(folder: Path, report: Report) -> None  the work; `folder` is empty and its own

The runner calls `run` in a process of its own. Every method of Report replaces the step's JSON file
atomically, so a step that is killed keeps what it had. Predictions lie in `predictions/<NAME>.json`, written
before the run: figure -> {low, high, unit, why}, fact or check -> {expected, why}.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from pathlib import Path


class Report:
    """The record of one step, kept in the JSON file `path`."""

    def __init__(self, path: Path):
        self.path = path
        self.record: dict = {"figures": {}, "facts": {}, "checks": {}, "not_run": []}
        self._write()

    def figure(self, name: str, values: list[float], unit: str, **context) -> None:
        """Measurements of one quantity in `unit`; shown as median, min, max and number. `context` (JSON
        values) says of what: rows, precision.

        A ratio is a figure too, of quotients that were each taken in one turn. Raises ValueError for no
        values, or one that is not finite, and for a name that is taken.
        """
        numbers = [float(value) for value in values]
        if not numbers or not all(map(math.isfinite, numbers)):
            raise ValueError(f"figure {name!r}: expected finite numbers, got {values!r}")
        self._add(
            "figures",
            name,
            {
                "median": statistics.median(numbers),
                "min": min(numbers),
                "max": max(numbers),
                "number": len(numbers),
                "unit": unit,
                "context": context,
            },
        )

    def fact(self, name: str, value) -> None:
        """Something seen that is no measurement: an answer of a library, a list of operators. `value` is a
        JSON value.
        """
        self._add("facts", name, value)

    def check(self, name: str, passed: bool, detail: str = "") -> None:
        """A promise that held or did not; one that did not makes the step "failed", and the step goes on."""
        self._add("checks", name, {"passed": bool(passed), "detail": detail})

    def not_run(self, reason: str, *, part: str = "") -> None:
        """`part` of the step (all of it, if none is named) cannot run here, and why. The caller returns or
        goes on with the rest.
        """
        self.record["not_run"].append({"part": part, "reason": reason})
        self._write()

    def take(self, record: dict) -> None:
        """Add what another Report's `record` has and this one has not: a part of the step that ran in a
        process of its own.
        """
        for kind in ("figures", "facts", "checks"):
            self.record[kind] |= {
                name: value for name, value in record[kind].items() if name not in self.record[kind]
            }
        self.record["not_run"] += [
            entry for entry in record["not_run"] if entry not in self.record["not_run"]
        ]
        self._write()

    def _add(self, kind: str, name: str, value) -> None:
        if name in self.record[kind]:
            raise ValueError(f"{kind}: {name!r} is there already")
        self.record[kind][name] = value
        try:
            self._write()
        except (TypeError, ValueError):  # not JSON: the record on disk stays whole, and so must this one
            del self.record[kind][name]
            raise

    def _write(self) -> None:
        write_json(self.path, self.record)


def write_json(path: Path, value) -> None:
    """Replace `path` by `value` in one move. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one move."""
    staged = path.with_name(path.name + ".part")
    staged.write_text(text)
    os.replace(staged, path)
