"""Who imports whom (the design's one rule), and what the runtime may need."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
OURS = {"reference", "star_export", "engines"}
HOST_ONLY = {
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "ml_dtypes",
    "huggingface_hub",
    "polygraphy",
}
RUNTIME = {"numpy", "PIL", "tokenizers", "jinja2", "tqdm"}
SERVER = {"starlette", "uvicorn", "python_multipart"}  # of the extra `serve`, in engines/serve alone
EXECUTORS = {
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
}  # imported inside functions, where one is asked for


def imported(path: Path) -> dict[str, bool]:
    """Top-level package -> whether it is imported when the module is (not only inside a function)."""
    tree = ast.parse(path.read_text())
    found: dict[str, bool] = {}
    inside = {
        id(n)
        for f in ast.walk(tree)
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef)
        for n in ast.walk(f)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        for name in names:
            package = name.partition(".")[0]
            found[package] = found.get(package, False) or id(node) not in inside
    return found


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", modules("reference"), ids=str)
def test_the_reference_imports_nothing_else_of_ours(path: Path) -> None:
    assert not set(imported(path)) & (OURS - {"reference"})


@pytest.mark.parametrize("path", modules("engines"), ids=str)
def test_the_engines_import_no_host_package_and_executors_only_where_asked_for(path: Path) -> None:
    found = imported(path)
    outside = set(found) - set(sys.stdlib_module_names) - RUNTIME - EXECUTORS
    outside -= SERVER if path.parent.name == "serve" else set()
    assert outside <= {"engines"}, f"{path.name} imports {sorted(outside - {'engines'})}"
    assert not {name for name in EXECUTORS if found.get(name)}, (
        "an executor is imported at the top of the module"
    )


def test_the_rules_can_fail(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("import torch\ndef f():\n    import onnxruntime\n")
    assert imported(planted) == {"torch": True, "onnxruntime": False}


def test_every_module_runs_on_the_oldest_python_that_the_package_admits(tmp_path: Path) -> None:
    """JetPack 6 has TensorRT for its own Python only."""
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(
        ">="
    )
    planted = tmp_path / "planted.py"
    planted.write_text("import datetime\nnow = datetime.UTC\n")
    for paths, status in ((sorted(OURS), 0), ([str(planted)], 1)):  # `long` is torch's, not Python 2's
        command = [
            str(Path(sys.executable).with_name("vermin")),
            "--no-tips",
            "--exclude",
            "long",
            f"--target={oldest}-",
            *paths,
        ]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == status, result.stdout


REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in {blocked!r}:
            raise ModuleNotFoundError(f'{{name}} is not installed here', name=name)
sys.meta_path.insert(0, Refuse())
"""
BARE = (
    REFUSE
    + """
import engines.runtime.star, engines.tensorrt.build, engines.doctor, engines.bench, star_export.cli.parser
bad = set(sys.modules) & {blocked!r}
assert not bad, bad
"""
)


@pytest.mark.parametrize(
    "blocked",
    [HOST_ONLY, HOST_ONLY | EXECUTORS],
    ids=["without the host's packages", "without executors too"],
)
def test_the_runtime_and_the_command_line_import_bare(blocked: set[str]) -> None:
    result = subprocess.run(
        [sys.executable, "-c", BARE.format(blocked=blocked)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["engines", "star_export"])
def test_importing_a_package_loads_nothing_from_outside_of_the_standard_library(package: str) -> None:
    """The public names are imported on first use."""
    code = f"import sys; before = set(sys.modules); import {package}; print(*set(sys.modules) - before)"
    output = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True)
    loaded = {name.partition(".")[0] for name in output.split()}
    assert loaded - set(sys.stdlib_module_names) <= OURS


RUN = (
    REFUSE
    + """
from star_export.cli.parser import main
bundle, folder = {bundle!r}, {folder!r}
assert main(["generate", bundle, "a red cat", "-o", folder + "/a.png", "--no-progress"]) == 0
assert main(["edit", bundle, folder + "/a.png", "blue", "-o", folder + "/b.png", "--no-progress"]) == 0
asked = [folder + "/a.png", "what is a dog?", "--max-new-tokens", "2", "--no-progress"]
assert main(["ask", bundle, *asked]) == 0
bad = set(sys.modules) & {blocked!r}
assert not bad, bad
"""
)


def test_the_runtime_runs_bare(mini_bundle: Path, tmp_path: Path) -> None:
    blocked = HOST_ONLY | {"tensorrt", "tensorrt_rtx", "cuda"}
    code = RUN.format(blocked=blocked, bundle=str(mini_bundle), folder=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
