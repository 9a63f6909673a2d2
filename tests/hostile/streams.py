"""Streams and surroundings: closed, full, in another encoding, without a home."""

from __future__ import annotations

from pathlib import Path

from .harness import Case

INSPECT = ("inspect", "{bundle}")
ENCODINGS = ("ascii", "cp1252", "gbk")


def named(folder: Path) -> None:
    (folder / "bild-\u732b-\u20ac").write_text("x")


CASES = [
    Case("a closed stdout", INSPECT, 0, stdout="closed"),
    Case("a full stdout", INSPECT, 3, "stdout", stdout="/dev/full"),
    Case("a full stdout for JSON", (*INSPECT, "--json"), 3, "stdout", stdout="/dev/full"),
    Case("a closed stderr", INSPECT, 0, stderr="closed"),
    Case("a full stderr", INSPECT, 0, stderr="/dev/full"),
    Case("an error on a closed stderr", ("inspect", "nothing"), 3, stderr="closed"),
    Case("an error on a full stderr", ("inspect", "nothing"), 3, stderr="/dev/full"),
    *(
        Case(
            f"an error in {encoding}",
            ("inspect", "bild-\u732b-\u20ac"),
            3,
            "bild-",
            environment={"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
            spoil=named,
        )
        for encoding in ENCODINGS
    ),
    Case("control characters in a name", ("inspect", "\x1b[31mred\x07"), 3, r"\\x1b"),
    Case("a terminal without width", INSPECT, 0, environment={"COLUMNS": "0", "LINES": "0"}),
    Case("no home", INSPECT, 0, environment={"HOME": "/nowhere"}),
    Case(
        "a run without a home",
        ("generate", "{bundle}", "a cat", "-o", "out.png"),
        0,
        environment={"HOME": "/nowhere"},
        creates=("out.png",),
    ),
    Case("a home that is not known", ("inspect", "~nobody-of-this-name/x"), 3, "nobody"),
]
