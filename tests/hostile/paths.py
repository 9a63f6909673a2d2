"""Names of files and folders that cannot be read or written, for every verb that takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .harness import Case

LONG = "x" * 300
DEEP = "a/" * 2500
READ = {
    "inspect": ("inspect", "{}"),
    "export": ("export", "{}", "--out", "new"),
    "export --base": ("export", "{checkpoint}", "--base", "{}", "--out", "new"),
    "export --checkpoint": ("export", "{checkpoint}", "--checkpoint", "{}", "--out", "new"),
    "export --vq": ("export", "{checkpoint}", "--vq", "{}", "--out", "new"),
    "export --from": ("export", "star-3b", "--from", "{}", "--out", "new"),
    "export --calibration": (
        *("export", "{checkpoint}", "--precision", "int4", "--calibrate", "--calibration"),
        *("{}", "--out", "new"),
    ),
    "plan": ("plan", "{}"),
    "build": ("build", "{}", "--target", "rtx-4090"),
    "validate": ("validate", "{}"),
    "validate --source": ("validate", "{bundle}", "--bisect", "base_ar", "--source", "{}"),
    "certificate": ("certificate", "{}"),
    "generate": ("generate", "{}", "a cat", "-o", "out.png"),
    "edit": ("edit", "{bundle}", "{}", "blue", "-o", "out.png"),
    "ask": ("ask", "{bundle}", "{}", "what?"),
    "bench": ("bench", "{}"),
    "score": ("score", "{}"),
    "score --compare": ("score", "{bundle}", "--compare", "{}"),
}
WRITTEN = {
    "export --out": ("export", "{checkpoint}", "--out", "{}"),
    "generate -o": ("generate", "{bundle}", "a cat", "-o", "{}.png"),
    "generate --save-ids": ("generate", "{bundle}", "a cat", "-o", "out.png", "--save-ids", "{}.npy"),
    "edit -o": ("edit", "{bundle}", "cat.png", "blue", "-o", "{}.png"),
    "ask --save-ids": ("ask", "{bundle}", "cat.png", "what?", "--save-ids", "{}.npy"),
    "validate --report": ("validate", "{bundle}", "--report", "{}.html"),
    "score --pictures": ("score", "{bundle}", "--pictures", "{}"),
    "inspect --polygraphy": ("inspect", "{bundle}", "--polygraphy", "{}"),
}


def file(folder: Path) -> None:
    (folder / "file").write_text("no bundle")


def circle(folder: Path) -> None:
    (folder / "circle").symlink_to("circle")
    for suffix in (".png", ".npy", ".html"):
        (folder / f"circle{suffix}").symlink_to(f"circle{suffix}")


def folders(folder: Path) -> None:
    for name in ("taken", "taken.png", "taken.npy", "taken.html", "taken-1.png"):
        (folder / name).mkdir()
    (folder / "taken" / "file").write_text("old")


def old(folder: Path) -> None:
    for name in ("old.png", "old.npy", "two-1.png"):
        (folder / name).write_text("old")


def reading(what: str, name: str, spoil: Callable[[Path], None] | None = None) -> list[Case]:
    return [
        Case(
            f"{verb} of {what}",
            tuple(name if word == "{}" else word for word in words),
            3,
            spoil=spoil,
        )
        for verb, words in READ.items()
    ]


def writing(what: str, name: str, spoil: Callable[[Path], None] | None = None) -> list[Case]:
    return [
        Case(f"{verb} to {what}", tuple(word.replace("{}", name) for word in words), 3, spoil=spoil)
        for verb, words in WRITTEN.items()
    ]


CASES = [
    *reading("a name of 300 letters", LONG),
    *reading("a path of 5,000 letters", DEEP),
    *reading("a name in a file", "file/x", file),
    *reading("a link to itself", "circle", circle),
    *writing("a name of 300 letters", LONG),
    *(
        case
        for case in writing("a folder that is not there", "nowhere/x")
        if not case.name.startswith("inspect")  # which creates it
    ),
    *writing("a name in a file", "file/x", file),
    *writing("a link to itself", "circle", circle),
    *writing("a place where nothing can be", "/proc/x"),
    *(
        Case(f"{verb} to a folder", tuple(word.replace("{}", "taken") for word in words), 3, spoil=folders)
        for verb, words in WRITTEN.items()
        if verb != "score --pictures"
    ),
    *(
        Case(
            f"{verb} into the bundle",
            tuple(word.replace("{}", "{bundle}/x") for word in words),
            3,
            "bundle",
            spoil=lambda folder: None,
        )
        for verb, words in WRITTEN.items()
        if verb not in ("export --out", "score --pictures")
    ),
    Case(
        "the second of three images is a folder",
        ("generate", "{bundle}", "a cat", "-o", "taken.png", "--num-images", "3", "--force"),
        3,
        "taken",
        spoil=lambda folder: (folder / "taken-1.png").mkdir(),
    ),
    Case(
        "an image that is there", ("generate", "{bundle}", "a cat", "-o", "old.png"), 2, "--force", spoil=old
    ),
    Case(
        "the second of two images is there",
        ("generate", "{bundle}", "a cat", "-o", "two.png", "--num-images", "2"),
        2,
        "two-1.png",
        spoil=old,
    ),
    Case(
        "ids that are there",
        ("generate", "{bundle}", "a cat", "-o", "new.png", "--save-ids", "old.npy"),
        2,
        "--force",
        spoil=old,
    ),
]
