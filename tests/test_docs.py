"""The documents hold together: whatever they, the code or the tests point to is in this repository."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.targets import TARGETS
from star_export.cli.parser import build_parser

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
LISTED = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
FILES = subprocess.run(LISTED, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
DOCUMENTS = [name for name in FILES if name.endswith(".md") and (ROOT / name).exists()]
SOURCES = [
    name for name in FILES if name.endswith((".py", ".cu", ".cuh", ".h", ".cpp")) and (ROOT / name).exists()
]
LINK = re.compile(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"")
PATH = re.compile(r"(?<![\w./-])((?:docs|examples|engines|reference|star_export|tests)/[\w./-]*[\w/])")
SUFFIX = re.compile(r"\.(py|md|npz|json|tsv|cuh?)$")
OUTSIDE = re.compile(r"(?<![\w.:/])(?:/(?:work|tmp|home|root|opt|mnt|usr)\b|\.\./shared|~/)")
NUMBERS = r"(\d+(?:\.\d+)*)"


def text(name: str) -> str:
    return (ROOT / name).read_text()


def prose(name: str) -> str:
    """A document without its blocks of code, and without the table that tests/test_layout.py checks."""
    blocks = r"^```.*?^```|<!-- imports -->.*?<!-- /imports -->"
    return re.sub(blocks, "", text(name), flags=re.MULTILINE | re.DOTALL)


def commands(name: str) -> Iterator[str]:
    """The command lines in a document's blocks, without what makes room for them and without comments."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text(name), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = line.partition("  #")[0].strip().removeprefix(".venv/bin/")
            if words.startswith(("star-export ", "make ", "python ")):
                yield words


COMMANDS = [(name, command) for name in DOCUMENTS for command in commands(name)]


def test_there_are_documents_and_commands_to_check() -> None:
    assert {"README.md", "docs/architecture.md", "CHANGELOG.md"} <= set(DOCUMENTS) and len(COMMANDS) > 20


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_to_a_file_of_this_repository(name: str) -> None:
    targets = [next(filter(None, found)).partition("#")[0] for found in LINK.findall(prose(name))]
    local = [target for target in targets if target and not target.startswith("https://")]
    broken = [target for target in local if not ((ROOT / name).parent / target).exists()]
    assert not broken
    assert all(((ROOT / name).parent / target).resolve().is_relative_to(ROOT) for target in local)


def test_every_path_that_is_named_exists() -> None:
    """In documents those in backticks, in sources those with a suffix."""
    words = {name: re.findall(r"`([^`\n]+)`", prose(name)) for name in DOCUMENTS}
    words |= {name: [text(name)] for name in SOURCES}
    found = [(name, path) for name in words for word in words[name] for path in PATH.findall(word)]
    found = [(name, path) for name, path in found if name in DOCUMENTS or SUFFIX.search(path)]
    assert len(found) > 100
    absent = [(name, path) for name, path in found if not (ROOT / path).exists()]
    assert not [(name, path) for name, path in absent if not path.startswith("engines/plugins/build")]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_document_names_a_path_outside_of_the_repository(name: str) -> None:
    assert not OUTSIDE.findall(text(name))


def test_what_is_outside_is_seen() -> None:
    assert OUTSIDE.findall("in `/tmp/x`, ../shared/a.md and ~/x") == ["/tmp", "../shared", "~/"]
    assert not OUTSIDE.findall("https://a.b/home/x, docs/tmp/x, a/usr")


def test_every_section_of_the_specification_that_is_cited_exists() -> None:
    page = text("docs/star.md")
    sections = set(re.findall(rf"^#+ {NUMBERS}\b", page, re.MULTILINE))
    first = page.partition("## 0.")[2].partition("\n## ")[0]
    sections |= {f"0.{item}" for item in re.findall(r"^(\d+)\. ", first, re.MULTILINE)}
    cited = {
        (name, number)
        for name in SOURCES
        for words in re.findall(rf"(?i)star\.md[),]? {NUMBERS}(?: (?:to|and) {NUMBERS})?", text(name))
        for number in filter(None, words)
    }
    assert len(cited) > 20
    assert not [(name, number) for name, number in cited if number not in sections]


def test_every_row_of_bad_inputs_that_is_cited_exists() -> None:
    rows = {int(number) for number in re.findall(r"^\| (\d+) \|", text("docs/bad_inputs.md"), re.MULTILINE)}
    assert rows == set(range(1, max(rows) + 1))
    cited = [
        int(number)
        for name in SOURCES
        for words in re.findall(r"(?i)bad_inputs(?:\.md)?[\s,]+(?:rows?)?([\d\s,toand]+)", text(name))
        for number in re.findall(r"\d+", words)
    ]
    assert cited and set(cited) <= rows


@pytest.mark.parametrize(("name", "command"), COMMANDS, ids=lambda value: value[:60])
def test_every_command_can_be_given(name: str, command: str) -> None:
    """The parser takes it, the Makefile has it, or the module is there."""
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", text("Makefile"), re.MULTILINE)
    elif words[0] == "star-export":
        target = vars(build_parser().parse_args(words[1:])).get("target") or []
        assert set([target] if isinstance(target, str) else target) <= set(TARGETS)
    elif words[1] == "-m" and words[2] != "pytest":
        assert (ROOT / (words[2].replace(".", "/") + ".py")).exists()
    else:
        assert all((ROOT / word).exists() for word in words[1:] if word.endswith(".py"))


@pytest.mark.parametrize("section", re.split(r"^## ", text("docs/figures.md"), flags=re.MULTILINE)[1:])
def test_every_table_of_figures_stands_below_its_command(section: str) -> None:
    before, table, _ = section.partition("\n|")
    assert table and re.search(r"^```\n.*?^```", before, re.MULTILINE | re.DOTALL)


def test_security_is_short() -> None:
    assert len(text("SECURITY.md").splitlines()) <= 60


def test_the_vocabulary_has_a_line_per_word() -> None:
    table = text("docs/style.md").partition("## Vocabulary")[2]
    words = re.findall(r"^\| ([a-zA-Z, ]+) \|", table, re.MULTILINE)[1:]
    assert len(words) > 30 and len(set(words)) == len(words)
