"""What people install: the three packages, nothing else, and a base install without an executor."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in the wheel, built in a copy so that nothing is left in the tree."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--quiet",
            "--no-deps",
            "--no-build-isolation",
            "-w",
            str(out),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    return zipfile.ZipFile(next(out.glob("*.whl"))).namelist()


def test_the_wheel_holds_the_three_packages_and_no_tests(wheel: list[str]) -> None:
    tops = {name.partition("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"reference", "star_export", "engines"}
    assert {
        "engines/runtime/star.py",
        "engines/sessions/onnxruntime.py",
        "star_export/cli/parser.py",
        "reference/model.py",
    } <= set(wheel)
    assert {
        "engines/plugins/plugin.cpp",
        "engines/plugins/kv_attention.cuh",
        "engines/plugins/CMakeLists.txt",
        "engines/tensorrt/loop.cu",
        "engines/serve/page.html",
        "star_export/calibration/prompts.txt",
    } <= set(wheel)
    assert {f"reference/release_configs/STAR_Qwen2.5-VL-{size}.json" for size in ("3B", "7B")} <= set(wheel)
    assert any(name.endswith("LICENSE") for name in wheel)


def test_of_star_nano_the_wheel_holds_what_a_user_needs(wheel: list[str]) -> None:
    """Checkpoint, sampling, prompts and score; training logs, images and the sweep stay in the repository."""
    folder = "reference/nano/weights/"
    base = ("config", "generation_config", "preprocessor_config", "tokenizer", "tokenizer_config")
    assert {name.removeprefix(folder) for name in wheel if name.startswith(folder)} == {
        *("STAR-Nano.json", "STAR-Nano.pt", "VQ-Model.pt", "sampling.json", "score.json"),
        "calibration.txt",
        *(f"Qwen2.5-VL-nano/{name}.json" for name in base),
        "Qwen2.5-VL-nano/model.safetensors",
    }
    assert not [name for name in wheel if name.endswith((".jsonl", ".done", ".png"))]


def test_the_base_install_has_no_executor_and_no_torch() -> None:
    names = " ".join(PROJECT["dependencies"])
    assert not any(word in names for word in ("torch", "onnx", "tensorrt", "transformers", "cuda"))


def test_every_range_admits_the_version_that_make_installs() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    pinned = {canonicalize_name(name): version for name, version in CONSTRAINTS.items()}
    extras = PROJECT["optional-dependencies"]
    installed = ("cpu", "rtx", "export", "debug", "completion", "dev")
    wanted = [
        Requirement(r) for r in (*PROJECT["dependencies"], *(r for extra in installed for r in extras[extra]))
    ]
    for requirement in wanted:
        if requirement.name != "star-export":
            assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), str(
                requirement
            )
