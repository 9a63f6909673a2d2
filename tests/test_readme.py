"""README is true: its code and commands run, its images show what it says, its figures are documented."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tomllib

from star_export.cli.parser import build_parser, main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIGURES = (ROOT / "docs" / "figures.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def block(heading: str) -> str:
    """The block of code below a heading."""
    (found,) = re.findall(r"^```\w*\n(.*?)^```", README.partition(f"## {heading}\n")[2], re.M | re.S)[:1]
    return found


@pytest.fixture
def after_make_demo(mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `demo/bundle`, of the miniature checkpoint in the place of STAR-Nano."""
    shutil.copytree(mini_bundle, tmp_path / "demo" / "bundle")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_a_front_door() -> None:
    assert len(README.splitlines()) <= 120


def test_the_two_commands_are_in_the_makefile() -> None:
    commands = block("Two commands").splitlines()
    assert commands == ["make demo", "make test"]
    assert all(re.search(rf"^{command.split()[1]}:", MAKEFILE, re.MULTILINE) for command in commands)


def test_the_python_runs(after_make_demo: Path, capsys: pytest.CaptureFixture) -> None:
    code = block("In Python")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert (after_make_demo / "edited.png").exists() and " | " in capsys.readouterr().out
    assert len(code.splitlines()) <= 12


def test_the_command_lines_run(after_make_demo: Path, capsys: pytest.CaptureFixture) -> None:
    commands = block("On the command line").splitlines()
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "star-export" and main(words[1:]) == 0, command
        assert capsys.readouterr().out.strip()
    assert {path.name for path in after_make_demo.glob("*.png")} == {"stars.png", "night.png"}


@pytest.mark.parametrize("command", block("With a released checkpoint").splitlines())
def test_the_command_lines_for_a_released_checkpoint_parse(command: str) -> None:
    words = shlex.split(command)
    assert words[0] == "star-export" and build_parser().parse_args(words[1:]).verb == words[1]


def test_the_extras_are_those_of_the_package() -> None:
    table = README.partition("## What to install where")[2].partition("\n## ")[0]
    named = {name for words in re.findall(r"`\[([a-z,]+)\]`", table) for name in words.split(",")}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert named == set(extras) - {"dev", "peers"}  # that of `make peers`, in an environment of its own


def test_the_images_show_what_the_demo_was_asked_for() -> None:
    """By the scorer of STAR-Nano's benchmark; and `make demo` asks for the same."""
    from engines.inputs.image_io import read_image
    from reference.nano.world.scorer import read

    def shown(name: str) -> tuple[str | None, list[tuple[str | None, str | None]]]:
        reading = read(read_image(ROOT / "docs" / "images" / name))
        things = sorted(reading.things, key=lambda thing: thing.x)
        return reading.background, [(thing.color, thing.shape) for thing in things]

    assert shown("image.png") == ("white", [("green", "triangle"), ("purple", "circle")])
    assert shown("image-edited.png") == ("white", [("red", "star"), ("purple", "circle")])
    assert shown("riddle.png") == ("blue", [("yellow", "star")] * 4)
    captions = re.findall(r'"([^"]+)"', README.partition("|---|---|---|\n")[2].splitlines()[0])
    assert len(captions) == 5
    assert all(f'"{caption}"' in MAKEFILE for caption in captions if caption != "red")  # the answer


def test_every_figure_stands_in_the_document_of_figures() -> None:
    figures = re.findall(r"\d[\d,.]* (?:of \d[\d,]*|million|seconds|GB|MB|ms|%|dB)", README)
    assert len(figures) >= 5 and not [figure for figure in figures if figure not in FIGURES]


def test_the_parity_figures_are_those_of_a_run(mini_bundle: Path) -> None:
    """Largest differences in the table, within a factor of 3: another processor rounds differently."""
    from engines.bundle.reader import Bundle
    from star_export.validator.rungs import decoder_steps, golden_tensors
    from star_export.validator.subject import Subject

    subject = Subject(Bundle.open(mini_bundle), "onnxruntime", "fp32")
    for words, rung in (
        ("any output of any component", golden_tensors),
        ("single steps against its prefill", decoder_steps),
    ):
        (row,) = [line for line in FIGURES.splitlines() if words in line and line.startswith("|")]
        stated = float(row.split("|")[2])
        measured = max(row.worst.value for row in rung(subject, lambda *_: None)[0])
        assert stated / 3 <= measured <= stated * 3
