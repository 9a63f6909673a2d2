"""The examples run as they are, from any folder, and say what they did."""

from __future__ import annotations

import inspect
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import star_export

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
STAR_NANO = ("demo/bundle", "nano")  # what the examples take without an argument


def run(name: str, argument: Path, folder: Path) -> str:
    """What an example prints when it is run in a folder."""
    command = [sys.executable, str(EXAMPLES / name), str(argument)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_draw(mini_bundle: Path, tmp_path: Path) -> None:
    printed = run("01_draw.py", mini_bundle, tmp_path)
    images = [tmp_path / name for name in ("draw-1.png", "draw-2.png", "riddle.png")]
    assert all(image.exists() and image.name in printed for image in images)
    assert images[0].read_bytes() != images[1].read_bytes()


def test_edit_and_ask(mini_bundle: Path, tmp_path: Path) -> None:
    printed = run("02_edit_and_ask.py", mini_bundle, tmp_path)
    assert "what color is the star?" in printed
    assert (tmp_path / "before.png").read_bytes() != (tmp_path / "after.png").read_bytes()


def test_export_and_build(
    mini_checkpoint: Path,
    bundle_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """An export takes long, so the script gets the one that all tests share, when it asks for it rightly."""
    pytest.importorskip("tensorrt_rtx")
    signature = inspect.signature(star_export.export)

    def shared_export(*arguments, **keywords) -> Path:
        asked = signature.bind(*arguments, **keywords).arguments
        assert asked["source"] == str(mini_checkpoint)
        return shutil.copytree(bundle_of(asked["precision"]), asked["out"])

    monkeypatch.setattr(star_export, "export", shared_export, raising=False)
    monkeypatch.setattr(sys, "argv", ["03_export_and_build.py", str(mini_checkpoint)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "03_export_and_build.py"), run_name="__main__")
    printed = capsys.readouterr().out
    plans = sorted(Path("bundle/plans/rtx-4090").glob("*.plan"))
    assert len(plans) == 7 and all(f"{plan}: " in printed for plan in plans)


def test_validate(mini_bundle: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(mini_bundle, tmp_path / "bundle")  # its certificate goes into the bundle
    printed = run("04_validate.py", bundle, tmp_path)
    assert "golden tensors: passed" in printed and "not proven: " in printed
    assert (tmp_path / "parity.html").exists() and list((bundle / "certificates").glob("*.json"))


def test_every_example_is_listed_and_tested() -> None:
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    listed = (EXAMPLES / "README.md").read_text()
    tested = Path(__file__).read_text()
    assert scripts and all(f"[{name}]({name})" in listed and f'"{name}"' in tested for name in scripts)
    defaults = [
        line for name in scripts for line in (EXAMPLES / name).read_text().splitlines() if "sys.argv" in line
    ]
    assert len(defaults) == len(scripts)
    assert all(any(f'"{default}"' in line for default in STAR_NANO) for line in defaults)
