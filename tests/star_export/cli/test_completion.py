"""Shells complete verbs, options and their values."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines.targets import TARGETS
from star_export.cli.commands import SHELLS
from star_export.cli.parser import main
from star_export.cli.verbs import completion


def completed(script: str, *words: str, folder: Path) -> list[str]:
    """What bash offers for the last of `words`."""
    asked = f"""{script}
COMP_WORDS=({" ".join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}; _shtab_star_export
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True, cwd=folder)
    return found.stdout.split()


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_bash_completes_verbs_options_targets_and_folders(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    script = completion("bash").text
    for words, offered in (
        (["va"], ["validate"]),
        (["generate", "b", "p", "--thr"], ["--threads"]),
        (["build", "b", "--target", "rtx-40"], [name for name in TARGETS if name.startswith("rtx-40")]),
        (["export", "nano", "--precision", "in"], ["int8", "int4"]),
        (["validate", "b", "--backend", "onnxruntime-e"], ["onnxruntime-exact"]),
        (["ask", "bun"], ["bundle"]),
        (["help", "gen"], ["generate"]),
    ):
        assert completed(script, "star-export", *words, folder=tmp_path) == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_gets_a_script_with_the_verbs(shell: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["completion", shell]) == 0
    assert {"generate", "--num-images" if shell != "fish" else "num-images"} <= set(
        capsys.readouterr()
        .out.replace("'", " ")
        .replace('"', " ")
        .replace("[", " ")
        .replace("(", " ")
        .split()
    )


def test_without_shtab_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 5
    assert "[completion]" in capsys.readouterr().err
