"""An export that cannot succeed is refused before it writes; what it demands is less than it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from engines.bundle.reader import Bundle
from engines.errors import MissingError
from engines.fit import machine
from engines.fit.sizes import sizes_from_bundle
from engines.fit.work import EXPORT_FLOOR_BYTES, check_export
from star_export.exporter.export import export


# Row 51
@pytest.mark.parametrize("probe", ["free_disk", "free_memory"])
def test_too_little_disk_or_memory_is_refused_and_nothing_is_left(
    probe: str, mini_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, probe, lambda *_: 1_000_000)
    with pytest.raises(MissingError, match=f"too little {probe.removeprefix('free_')} to export") as caught:
        export(str(mini_checkpoint), out=tmp_path / "b", precision="int4")
    assert "1000000 bytes" in caught.value.where and caught.value.exit_code == 5
    assert not list(tmp_path.iterdir())


def test_what_is_staged_already_needs_no_disk(
    mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sizes_from_bundle(Bundle.open(mini_bundle))
    weights = sizes.weights_bytes
    monkeypatch.setattr(machine, "free_disk", lambda folder: weights - 1000)
    with pytest.raises(MissingError):
        check_export(sizes, tmp_path / "b", converted_bytes=0)
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/part").write_bytes(bytes(1000))
    check_export(sizes, tmp_path / "b", converted_bytes=0, staged=tmp_path / "stage")


TAKEN = """
import re, sys
import star_export.exporter.export as exporter

def memory(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

check_room = exporter.check_room
def watched(*arguments, **options):
    check_room(*arguments, **options)
    print(memory("VmRSS"), memory("VmSize"))
exporter.check_room = watched
exporter.export(sys.argv[1], out=sys.argv[2], components=["base_ar"])
print(memory("VmHWM"), memory("VmPeak"))
"""


def test_an_export_takes_more_than_a_refusal_demands(mini_checkpoint: Path, tmp_path: Path) -> None:
    code = [sys.executable, "-c", TAKEN, str(mini_checkpoint), str(tmp_path / "b")]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    resident, virtual, peak_resident, peak_virtual = map(int, done.stdout.split())
    assert peak_resident - resident > EXPORT_FLOOR_BYTES and peak_virtual - virtual > EXPORT_FLOOR_BYTES
