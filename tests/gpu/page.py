"""The record as a page of Markdown: what ran where, then per step its checks, facts and figures, each beside
its prediction.
"""

from __future__ import annotations

import json

FIGURE_HEAD = ("figure", "median", "min to max", "of", "predicted", "")


def page(record: dict) -> str:
    """All of a record (`gpu_check.json`) for people."""
    head = ("step", "status", "seconds", "run", "why")
    rows = [
        (name, entry["status"], f"{entry['seconds']:.0f}", str(entry["run"] + 1), entry["reason"])
        for name, entry in record["steps"].items()
    ]
    used = sorted({entry["run"] for entry in record["steps"].values()})
    parts = [
        "# What a GPU showed",
        *table(head, rows),
        *(part for run in used for part in machine_part(run, record["runs"][run])),
    ]
    for name, entry in record["steps"].items():
        parts += step_part(name, entry, record["predictions"].get(name, {}))
    return "\n".join(parts) + "\n"


def machine_part(run: int, machine: dict) -> list[str]:
    """Where and when a run was made."""
    gpus = "; ".join(
        f"{g['name']}, SM {g['compute_capability']}, driver {g['driver']}, "
        f"{g['memory_mib']} MiB, {g['power_limit_w']} W"
        for g in machine["gpus"]
    )
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
    return [
        "",
        f"## Run {run + 1}",
        "",
        f"{machine['time']}, commit {machine['commit'] or 'unknown'}",
        "",
        f"* {gpus or 'no GPU'}",
        f"* nvcc: {machine['nvcc'] or 'none'}",
        f"* Python {machine['python']} on {machine['system']}, {machine['cores']} cores",
        f"* {packages}",
    ]


def step_part(name: str, entry: dict, predictions: dict) -> list[str]:
    """One step: why it did not run or failed, then what it saw."""
    parts = ["", f"## {name}: {entry['status']}", ""]
    parts += [entry["reason"] + "."] if entry["reason"] else []
    seen = {"checks": [], "facts": []}
    for what, check in entry["checks"].items():
        seen["checks"].append(
            (
                what,
                "held" if check["passed"] else "DID NOT HOLD",
                check["detail"],
                expected(predictions.get(what)),
            )
        )
    for what, value in entry["facts"].items():
        seen["facts"].append((what, shown(value), expected(predictions.get(what))))
    parts += table(("check", "", "", "predicted"), seen["checks"]) + table(
        ("fact", "seen", "predicted"), seen["facts"]
    )
    parts += table(
        FIGURE_HEAD,
        [figure_row(what, figure, predictions.get(what)) for what, figure in entry["figures"].items()],
    )
    unseen = [
        what
        for what in predictions
        if not any(what in entry[kind] for kind in ("figures", "facts", "checks"))
    ]
    parts += ["", f"Predicted and not seen: {', '.join(unseen)}."] if unseen else []
    if entry["status"] != "done" and entry["output_tail"].strip():
        parts += [
            "",
            "The end of its output:",
            "",
            *("    " + line for line in entry["output_tail"].strip().splitlines()[-25:]),
        ]
    return parts


def figure_row(what: str, figure: dict, prediction: dict | None) -> tuple[str, ...]:
    """A figure's median and spread, and whether the median is what was predicted."""
    unit, context = (
        f" {figure['unit']}".rstrip(),
        ", ".join(f"{k} {shown(v)}" for k, v in figure["context"].items()),
    )
    spread = f"{number(figure['min'])} to {number(figure['max'])}" if figure["number"] > 1 else ""
    return (
        f"{what}{f' ({context})' if context else ''}",
        number(figure["median"]) + unit,
        spread,
        str(figure["number"]),
        expected(prediction),
        judged(figure["median"], prediction),
    )


def expected(prediction: dict | None) -> str:
    """What was predicted, in words."""
    if prediction is None:
        return "nothing"
    if "expected" in prediction:
        return shown(prediction["expected"])
    return f"{number(prediction['low'])} to {number(prediction['high'])}"


def judged(median: float, prediction: dict | None) -> str:
    """Whether a median lies where it was predicted."""
    if prediction is None or "low" not in prediction:
        return "not predicted"
    if median < prediction["low"]:
        return "below"
    return "above" if median > prediction["high"] else "as predicted"


def number(value: float) -> str:
    """Three significant digits, whole numbers whole."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"


def shown(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    """Lines of a Markdown table behind an empty one; none without rows."""
    if not rows:
        return []
    lines = [head, ("---",) * len(head), *rows]
    return [
        "",
        *(
            "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |"
            for line in lines
        ),
    ]
