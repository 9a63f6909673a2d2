"""README is true: its commands parse, its paths exist, its make targets are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from star_export.cli.parser import build_parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith(("star-export ", "make ", ".venv/bin/"))
]


def test_there_are_commands_to_check() -> None:
    assert {"make demo", "make test"} <= set(COMMANDS) and sum(
        c.startswith("star-export ") for c in COMMANDS
    ) >= 6


@pytest.mark.parametrize("command", [c for c in COMMANDS if "star-export " in c])
def test_commands_parse(command: str) -> None:
    words = shlex.split(command)
    arguments = build_parser().parse_args(words[1:])
    if hasattr(arguments, "target") and arguments.target:
        from engines.targets import TARGETS

        assert (
            {arguments.target} <= set(TARGETS)
            if isinstance(arguments.target, str)
            else set(arguments.target) <= set(TARGETS)
        )


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_make_targets_exist(command: str) -> None:
    assert re.search(rf"^{command.split()[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("row", [line for line in README.splitlines() if re.match(r"\| `[a-z]", line)])
def test_the_file_map_is_of_this_tree(row: str) -> None:
    names = re.findall(r"`([^`]+)`", row.split("|")[1])
    folder = Path(names[0]).parent if "." in Path(names[0]).name else Path(names[0])
    for name in names:
        assert (ROOT / name).exists() or (ROOT / folder / name).exists(), name


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`((?:tests|engines|reference|star_export)/[\w./]+)`", README)))
)
def test_named_paths_exist(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_parity_figures_are_those_of_a_run(mini_bundle: Path) -> None:
    """Largest differences in the table, within a factor of 3: another processor rounds otherwise."""
    from engines.bundle.reader import Bundle
    from star_export.validator.ladder import Subject, decoder_steps, golden_tensors

    subject = Subject(Bundle.open(mini_bundle), "onnxruntime", "fp32")
    for words, rung in (
        ("any output of any component", golden_tensors),
        ("single steps against its prefill", decoder_steps),
    ):
        [row] = [line for line in README.splitlines() if words in line and line.startswith("|")]
        stated, measured = (
            float(row.split("|")[2]),
            max(r.worst.value for r in rung(subject, lambda *_: None)[0]),
        )
        assert stated / 3 <= measured <= stated * 3
