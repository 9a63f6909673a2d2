"""ONNX Runtime writes nothing under HOME (docs/bad_inputs.md 107)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_bundle import write_tiny_bundle

RUN = """
import sys
import numpy as np
from engines import Bundle
from engines.sessions import open_session, run
session = open_session(Bundle.open(sys.argv[1]), "token_embedding")
print(run(session, {"input_ids": np.array([[1]])})["inputs_embeds"].sum())
"""


@pytest.mark.parametrize("mode", [0o700, 0o500], ids=["fresh", "unwritable"])
def test_a_session_leaves_nothing_under_home(tmp_path: Path, mode: int) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=mode)
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    words = [sys.executable, "-c", RUN, str(write_tiny_bundle(tmp_path / "b"))]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert float(ended.stdout) == 22 and list(home.iterdir()) == []
