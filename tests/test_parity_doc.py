"""docs/parity.md is true: its commands run, pass what is right, and fail what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from star_export.cli.parser import main

pytest.importorskip("polygraphy")
PAGE = (Path(__file__).parent.parent / "docs" / "parity.md").read_text()


def commands(heading: str) -> list[str]:
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def run(command: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a documented line as a shell does, with the programs of this environment."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": programs},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(bundle_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `demo/bundle`, the miniature checkpoint in bf16, and its golden tensors in `parity`."""
    root = tmp_path_factory.mktemp("parity")
    shutil.copytree(bundle_of("bf16"), root / "demo" / "bundle")
    (command,) = commands("Golden tensors in Polygraphy's files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(command.split()[1:]) == 0
    return root


@pytest.mark.parametrize("command", commands("A graph on ONNX Runtime"))
def test_a_documented_command_passes_on_onnx_runtime(folder: Path, command: str) -> None:
    done = run(command, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    if " run " in command:
        assert "PASSED" in done.stdout and "FAILED" not in done.stdout


def test_polygraphy_fails_a_graph_with_other_weights(folder: Path) -> None:
    first = commands("A graph on ONNX Runtime")[0]
    wrong = folder / "wrong" / "base_ar"
    shutil.copytree(folder / "demo" / "bundle" / "base_ar", wrong)
    data = wrong / "model.onnx.data"
    spoilt = bytearray(data.read_bytes())
    middle = len(spoilt) // 2
    spoilt[middle : middle + 4096] = bytes(4096)
    data.write_bytes(spoilt)
    done = run(first.replace("demo/bundle/base_ar", "wrong/base_ar"), folder)
    assert done.returncode == 1 and "FAILED" in done.stdout


def test_caches_of_bfloat16_are_read_back_in_that_type(folder: Path) -> None:
    import torch
    from polygraphy.json import load_json

    (feeds,) = load_json(str(folder / "parity" / "base_ar" / "prefill" / "model.inputs.json"))
    assert feeds["past_key_values.0.key"].dtype == torch.bfloat16
    assert str(feeds["inputs_embeds"].dtype) == "float32" and str(feeds["position_ids"].dtype) == "int64"


def test_a_place_that_is_taken_is_refused(folder: Path, capsys: pytest.CaptureFixture) -> None:
    bundle, taken = str(folder / "demo" / "bundle"), str(folder / "parity")
    assert main(["inspect", bundle, "--polygraphy", taken]) == 3
    assert main(["inspect", bundle, "--polygraphy", str(folder / "a b")]) == 2
    assert main(["inspect", bundle, "--polygraphy", str(folder / "c"), "--component", "paint"]) == 2
    assert main(["inspect", bundle, "--polygraphy", str(folder / "c"), "--target", "rtx-4090"]) == 2
    assert capsys.readouterr().err.count("  fix: ") == 4 and not (folder / "c").exists()
