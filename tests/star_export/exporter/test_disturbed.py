"""Exports that lose their disk, memory or life in the middle; damaged checkpoints and bundles.

docs/bad_inputs.md 2, 12, 16, 21 and 22. `python -m tests.kill_export` does the first at any size.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.sessions import open_session
from star_export.cli.parser import main
from star_export.exporter.export import export
from star_export.exporter.publish import JOURNAL, stage_path
from tests.helpers.sealed import edit_sealed
from tests.kill_export import Undisturbed, compared, killed_export, undisturbed_export

SMALL = ["--components", "text_head,image_head"]  # two steps of a second each, and 40 MB
SHARDS = ("STAR-mini.pt", "VQ-Model.pt", "Qwen2.5-VL-mini/model-00001-of-00002.safetensors")


def three_lines(told: str) -> list[str]:
    """What, where and fix, of all that a command wrote to stderr."""
    lines = told.splitlines()
    assert len(lines) == 3, told
    return lines


@pytest.fixture(scope="module")
def undisturbed(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    return undisturbed_export(folder, [str(mini_checkpoint), *SMALL])


def started(checkpoint: Path, out: Path, *, at_start=None) -> subprocess.Popen:
    """`star-export export` in a process of its own; `at_start` runs in it first."""
    words = ["export", str(checkpoint), "--out", str(out), *SMALL, "--no-progress"]
    return subprocess.Popen(
        [sys.executable, "-m", "star_export", *words],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=at_start,
    )


def goes_on(checkpoint: Path, out: Path, undisturbed: Undisturbed) -> None:
    """The same command completes, leaves the bundle of an undisturbed export, and nothing else."""
    process = started(checkpoint, out)
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert compared(undisturbed.bundle, out) == [] and not stage_path(out).exists()


@pytest.mark.slow
def test_kills_change_no_byte_and_leave_nothing(
    mini_checkpoint: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    words = [str(mini_checkpoint), *SMALL]
    assert killed_export(tmp_path / "kills", words, undisturbed, kills=5, seed=1) == []


def test_a_difference_would_be_seen(undisturbed: Undisturbed, tmp_path: Path) -> None:
    again = shutil.copytree(undisturbed.bundle, tmp_path / "again")
    data = bytearray((again / "text_head/model.onnx.data").read_bytes())
    data[1000] ^= 1
    (again / "text_head/model.onnx.data").write_bytes(data)
    (again / "unknown").touch()
    assert compared(undisturbed.bundle, again) == ["text_head/model.onnx.data differs", "unknown differs"]


def test_a_disk_that_fills_up_stops_an_export_which_goes_on_later(
    mini_checkpoint: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """The system refuses to write more than 8 MB to a file, as it refuses any byte on a full disk."""
    out = tmp_path / "out"
    process = started(
        mini_checkpoint, out, at_start=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8 << 20, 8 << 20))
    )
    what, where, fix = three_lines(process.communicate(timeout=300)[1])
    assert process.returncode == 3 and what == "error: The bundle cannot be written"
    assert "bytes are free there" in where and not out.exists()
    goes_on(mini_checkpoint, out, undisturbed)


@pytest.mark.skipif(
    not hasattr(resource, "prlimit"), reason="only Linux lowers the limits of another process"
)
def test_memory_that_runs_out_stops_an_export_which_goes_on_later(
    mini_checkpoint: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started(mini_checkpoint, out)
    while not (stage_path(out) / JOURNAL).exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    used = int(Path(f"/proc/{process.pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(process.pid, resource.RLIMIT_AS, (used + (4 << 20), used + (4 << 20)))
    os.kill(process.pid, signal.SIGCONT)
    told = process.communicate(timeout=300)[1]
    if process.returncode != -signal.SIGABRT:  # a library in Rust aborts where it gets no memory
        assert process.returncode == 5 and "too little memory" in told and "Traceback" not in told, told
    assert not out.exists() and sorted(path.name for path in tmp_path.iterdir()) in ([], [".out.stage"])
    goes_on(mini_checkpoint, out, undisturbed)


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize("left", [0, 7, 100, 0.5, -1])
def test_a_truncated_shard_is_refused_before_the_work(
    mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, left: float
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mini_checkpoint, broken, copy_function=os.symlink)
    (broken / name).unlink()
    shutil.copyfile(mini_checkpoint / name, broken / name)
    size = (broken / name).stat().st_size
    os.truncate(broken / name, int(size * left) if isinstance(left, float) else left % size)
    assert main(["export", str(broken), "--out", str(tmp_path / "out"), "--no-progress"]) == 3
    what, where, fix = three_lines(capsys.readouterr().err)
    assert Path(name).name in where and "download" in fix + what or "incomplete" in what
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_shard_with_the_bytes_of_another_is_refused(
    mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    broken = shutil.copytree(mini_checkpoint, tmp_path / "broken")
    for name, other in (
        (
            "Qwen2.5-VL-mini/model-00001-of-00002.safetensors",
            "Qwen2.5-VL-mini/model-00002-of-00002.safetensors",
        ),
        ("STAR-mini.pt", "VQ-Model.pt"),
    ):
        kept = (broken / name).read_bytes()
        shutil.copyfile(mini_checkpoint / other, broken / name)
        assert main(["export", str(broken), "--out", str(tmp_path / "out"), "--no-progress"]) == 3
        assert Path(name).name in three_lines(capsys.readouterr().err)[1]
        (broken / name).write_bytes(kept)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_weights_that_change_between_two_runs_are_another_export(
    mini_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names, same sizes, one other bit: what was exported before does not become part of the bundle."""
    changed = shutil.copytree(mini_checkpoint, tmp_path / "changed")
    out, words = tmp_path / "out", {"components": ["text_head", "image_head"]}
    with monkeypatch.context() as patch:
        patch.setattr(
            "star_export.exporter.export.write_manifest", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            export(str(changed), out=out, **words)
    assert stage_path(out).is_dir()
    with (changed / "VQ-Model.pt").open("r+b") as file:
        file.seek(-(1 << 20), os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(InputError, match="unfinished export of something else") as error:
        export(str(changed), out=out, **words)
    assert "checkpoint" in error.value.where and f"rm -r '{stage_path(out)}'" in error.value.fix


@pytest.fixture(scope="module")
def parts(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of `base_ar` in parts."""
    out = tmp_path_factory.mktemp("parts") / "bundle"
    return export(str(mini_checkpoint), out=out, components=["base_ar"], part_bytes=300_000)


def test_a_missing_part_is_named(parts: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(parts, tmp_path / "bundle")
    shutil.rmtree(bundle / "base_ar" / "1")
    with pytest.raises(InputError) as error:
        Bundle.open(bundle)
    assert "absent: base_ar/1/" in error.value.where


def test_exchanged_parts_are_refused_before_they_run(parts: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(parts, tmp_path / "bundle")
    first, second = bundle / "base_ar" / "0", bundle / "base_ar" / "1"
    first.rename(bundle / "aside")
    second.rename(first)
    (bundle / "aside").rename(second)
    with pytest.raises(InputError, match="has changed since the export|has the wrong size"):
        open_session(Bundle.open(bundle), "base_ar").close()


def test_a_part_of_another_export_is_refused(parts: Path, tmp_path: Path) -> None:
    """Its files have the same names and sizes, and one of its weights is another."""
    bundle = shutil.copytree(parts, tmp_path / "bundle")
    data = bundle / "base_ar" / "1" / "model.onnx.data"
    other = bytearray(data.read_bytes())
    other[len(other) // 2] ^= 1
    data.write_bytes(other)
    opened = Bundle.open(bundle)
    open_session(opened, "base_ar/0").close()
    with pytest.raises(InputError, match="has changed since the export"):
        open_session(opened, "base_ar")


def test_a_manifest_that_calls_one_part_another_is_refused(parts: Path, tmp_path: Path) -> None:
    """All hashes match: what does not is the graph's caches, which are those of other layers."""
    bundle = shutil.copytree(parts, tmp_path / "bundle")

    def exchange(manifest: dict) -> None:
        first, second = manifest["components"]["base_ar/0"], manifest["components"]["base_ar/1"]
        for key in ("graph", "twin", "golden", "classic"):
            first[key], second[key] = second[key], first[key]

    edit_sealed(bundle / "manifest.json", exchange)
    with pytest.raises(InputError) as error:
        open_session(Bundle.open(bundle), "base_ar").close()
    assert "base_ar/" in error.value.where
