"""Every extra can be installed: the package index meets each range, for each Python that the extra is for.

pip is asked for versions only, so nothing is downloaded. Without a package index these tests skip.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PYTHONS = {
    "cpu": ("3.11", "3.12"),
    "cuda": ("3.11", "3.12"),
    "rtx": ("3.10", "3.12"),
    "tensorrt": ("3.10", "3.12"),
    "jetpack": ("3.10", "3.12"),  # JetPack 6 has the first, JetPack 7 the second
    "export": ("3.12",),
    "debug": ("3.11", "3.12"),
    "completion": ("3.10", "3.12"),
    "serve": ("3.10", "3.12"),
    "peers": ("3.11", "3.12"),
    "dev": ("3.12",),  # `make test` installs it on the Python at hand
}
BINDINGS = {  # NVIDIA's source packages, which only ask for wheels of the same version
    "tensorrt": "tensorrt-cu13-bindings",
    "tensorrt-rtx-cu13": "tensorrt-rtx-cu13-bindings",
}


@functools.cache
def versions(name: str, python: str) -> list[str]:
    """The versions of a package that have a wheel for a Python, as pip finds them; empty where none has."""
    asked = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    asked += ["--only-binary=:all:", "--python-version", python, "--retries", "1", "--timeout", "20"]
    answer = subprocess.run(asked, capture_output=True, text=True).stdout
    found = [line.partition(":")[2] for line in answer.splitlines() if line.startswith("Available versions:")]
    return [version.strip() for line in found for version in line.split(",")]


def missing(requirements: list[str], python: str) -> list[str]:
    """Those of the requirements that hold for a Python and that no version on the index meets."""
    wanted = [Requirement(text) for text in requirements]
    wanted = [r for r in wanted if r.marker is None or r.marker.evaluate({"python_version": python})]
    wanted = [r for r in wanted if r.name != PROJECT["name"]]
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda r: versions(BINDINGS.get(r.name, r.name), python), wanted)
    return [str(r) for r, has in zip(wanted, found, strict=True) if not list(r.specifier.filter(has))]


@pytest.fixture(scope="module", autouse=True)
def package_index() -> None:
    if not versions("numpy", "3.12"):
        pytest.skip("no package index can be reached")


@pytest.mark.parametrize(("extra", "python"), [(e, p) for e, pythons in PYTHONS.items() for p in pythons])
def test_the_index_has_what_an_extra_asks_for(extra: str, python: str) -> None:
    assert missing(EXTRAS[extra], python) == []


def test_the_index_has_what_the_base_install_asks_for_on_the_oldest_python() -> None:
    assert missing(PROJECT["dependencies"], PROJECT["requires-python"].removeprefix(">=")) == []


def test_a_range_that_the_index_cannot_meet_is_seen() -> None:
    assert missing(["onnxruntime>=1.30.1,<1.33"], "3.10") == ["onnxruntime<1.33,>=1.30.1"]
    assert missing(["numpy>=9999"], "3.12") == ["numpy>=9999"]


def test_every_extra_is_tried() -> None:
    assert set(PYTHONS) == set(EXTRAS)
