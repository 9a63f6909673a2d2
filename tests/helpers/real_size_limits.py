"""The limits of the whole line at real size, and what a record of `tests.bench_real_size` says of them."""

from __future__ import annotations

import dataclasses
from typing import Any

GB, MINUTE = 1e9, 60


@dataclasses.dataclass(frozen=True)
class Limit:
    """A row of the table: a figure, what it may be at most (or at least, for `share`), and its unit."""

    name: str
    unit: str
    limits: dict[tuple[str, str], float]

    @property
    def at_least(self) -> bool:
        return self.name.startswith("share")


def limits(int4_3b: float | None, int4_7b: float | None, bf16_7b: float | None) -> dict:
    columns = {("3B", "int4"): int4_3b, ("7B", "int4"): int4_7b, ("7B", "bf16"): bf16_7b}
    return {column: limit for column, limit in columns.items() if limit is not None}


LIMITS = (
    Limit("export: peak memory", "GB", limits(3, 4, 4)),
    Limit("export: time", "min", limits(12, 30, 30)),
    Limit("bundle / its distinct weights", "", limits(1.02, 1.02, 1.02)),
    Limit("build: peak memory", "GB", limits(4, 5, 8)),
    Limit("build: time", "min", limits(5, 12, 15)),
    Limit("validate: peak memory", "GB", limits(8, 14, 8)),
    Limit("validate: time", "min", limits(15, 35, None)),
    Limit("read-back: peak memory", "GB", limits(6, 8, 8)),
    Limit("share of read bandwidth in decode", "", limits(0.6, 0.6, None)),
    Limit("first token / reading its files, at first", "", {}),
    Limit("first token / reading its files, cold", "", limits(2.5, 2.5, None)),
    Limit("first token / reading its files, warm", "", {}),
)


def figures(steps: dict[str, Any]) -> dict[str, float | str]:
    """Name of a row of `LIMITS` -> its figure, or how its step failed."""
    found: dict[str, float | str] = {}
    for step, result in steps.items():
        if result["exit_code"]:
            found |= {
                row.name: f"exit code {result['exit_code']}" for row in LIMITS if row.name.startswith(step)
            }
            continue
        found[f"{step}: peak memory"] = result["peak_bytes"] / GB
        found[f"{step}: time"] = result["seconds"] / MINUTE
        if step == "export":
            found["bundle / its distinct weights"] = result["bundle_bytes"] / result["distinct_bytes"]
        if step == "generate":
            seconds = (result["last_token_s"] - result["first_token_s"]["cold"]) / (result["tokens"] - 1)
            found["share of read bandwidth in decode"] = result["step_bytes"] / seconds / result["bandwidth"]
            for state, read_s in result["read_s"].items():
                ratio = result["first_token_s"][state] / read_s
                found[f"first token / reading its files, {state}"] = ratio
    return found


def table(record: dict[str, Any]) -> list[str]:
    """The figures and limits of a record, in Markdown."""
    precisions = [name for name in record["steps"] if name != "checkpoint"]
    commits = sorted({step["commit"] for steps in record["steps"].values() for step in steps.values()})
    lines = [
        f"{record['machine']['cpu']}, {record['machine']['cores']} cores; commit {', '.join(commits)}",
        "",
        f"| {record['size']} | " + " | ".join(f"{precision} | limit" for precision in precisions) + " |",
        "|---" * (1 + 2 * len(precisions)) + "|",
    ]
    for row in LIMITS:
        cells = []
        for precision in precisions:
            value = figures(record["steps"][precision]).get(row.name, "-")
            limit = None if record["fewer"] else row.limits.get((record["size"], precision))
            met = "" if limit is None or isinstance(value, str) else verdict(value, limit, row.at_least)
            cells += [f"{shown(value, row.unit)}{met}", shown(limit, row.unit)]
        lines.append(f"| {row.name} | " + " | ".join(cells) + " |")
    return lines


def verdict(value: float, limit: float, at_least: bool) -> str:
    passed = value >= limit if at_least else value <= limit
    return "" if passed else " (missed)"


def shown(value: float | str | None, unit: str) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.3g} {unit}".rstrip()
