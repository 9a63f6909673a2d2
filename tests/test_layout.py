"""The import graph of the sources is the table in docs/architecture.md, read from top to bottom.

A room is a folder of a package, or a file beside the folders. The table lists, for each room, the rooms that
it may import; a room may import only rooms above it, so there is neither a circle nor an import that runs
upward.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("reference", "engines", "star_export")
TABLE = re.compile(r"<!-- imports -->\n(.*?)<!-- /imports -->", re.S)


def module_name(path: Path, root: Path) -> str:
    """`engines.bundle.reader` for engines/bundle/reader.py, `engines.bundle` for its `__init__.py`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """`engines/bundle` for what is in that folder, `engines/errors` for a file, `engines` for the package."""
    return "/".join(module.split(".")[:2])


def imported_modules(path: Path, root: Path, modules: set[str]) -> set[str]:
    """The project's modules that the file imports, at its top or inside functions."""
    package = module_name(path, root)
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names}
    return {name for name in found if name.partition(".")[0] in PACKAGES}


def import_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Room -> the other rooms that its files import."""
    files = [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]
    modules = {module_name(path, root) for path in files}
    graph: dict[str, set[str]] = {}
    for path in files:
        room = room_of(module_name(path, root))
        graph.setdefault(room, set()).update(map(room_of, imported_modules(path, root, modules)))
    return {room: rooms - {room} for room, rooms in graph.items()}


def allowed_imports() -> dict[str, set[str]]:
    """The table: room -> the rooms that it may import, in the table's order."""
    (table,) = TABLE.findall((ROOT / "docs" / "architecture.md").read_text())
    rows = [line.split("|")[1:3] for line in table.splitlines()[2:] if line.startswith("|")]
    return {re.findall(r"`([^`]+)`", room)[0]: set(re.findall(r"`([^`]+)`", rooms)) for room, rooms in rows}


def upward(allowed: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Pairs of a room and one that it may import although the table lists that one no higher than it."""
    order = list(allowed)
    return [(a, b) for a, rooms in allowed.items() for b in rooms if b not in order[: order.index(a)]]


def test_every_folder_imports_what_the_architecture_says_and_nothing_else() -> None:
    assert import_graph() == allowed_imports()


def test_no_import_runs_upward() -> None:
    assert upward(allowed_imports()) == []


def test_a_planted_import_is_seen(tmp_path: Path) -> None:
    for name in (
        "engines/bundle/__init__.py",
        "engines/bundle/reader.py",
        "engines/runtime/star.py",
        "engines/errors.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "engines/bundle/reader.py").write_text(
        "from ..errors import InputError\ndef f():\n    from ..runtime import star\n"
    )
    graph = import_graph(tmp_path)
    assert graph["engines/bundle"] == {"engines/errors", "engines/runtime"}
    assert upward(
        {"engines/errors": set(), **{r: graph[r] for r in ("engines/bundle", "engines/runtime")}}
    ) == [("engines/bundle", "engines/runtime")]


WITHOUT_NANO = """
import sys
from star_export.cli.parser import main
assert main(["export", {source!r}, "--out", {out!r}, "--components", "text_head", "--no-progress"]) == 0
assert main(["validate", {bundle!r}, "--no-progress"]) == 0
bad = [name for name in sys.modules if name.startswith("reference.nano")]
assert not bad, bad
"""


def test_a_released_model_is_exported_and_validated_without_star_nano(
    mini_checkpoint: Path, mini_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(mini_bundle, tmp_path / "bundle")  # validate writes its certificate
    code = WITHOUT_NANO.format(source=str(mini_checkpoint), out=str(tmp_path / "out"), bundle=str(bundle))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["Star", "Bundle", "build"])
def test_the_public_names_of_the_runtime_need_no_host_package(name: str) -> None:
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['onnx'] = None\n"
        f"from star_export import {name}\nfrom engines import {name} as same\nassert {name} is same"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
