"""Export, build and run where files behave as on Windows (tests/helpers/windows.py), and its names."""

from __future__ import annotations

import errno
import io
import os
import sys
import threading
from pathlib import Path

import pytest

from engines.bundle.files import rename_folder, write_atomic
from engines.bundle.lock import is_held, locked
from engines.bundle.typed_paths import check_name, output_file
from engines.errors import InputError
from star_export.cli import streams
from star_export.cli.parser import main
from star_export.exporter.publish import check_out
from tests.helpers.windows import become_windows

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="which files are open is not known"
)
PARTS = "text_head,token_embedding,vq_decoder"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch, mini_bundle: Path) -> pytest.MonkeyPatch:
    """The system, after all that an export imports was imported."""
    become_windows(monkeypatch)
    return monkeypatch


@pytest.mark.parametrize("taken", [False, True], ids=["a new folder", "an empty folder"])
def test_an_export_leaves_the_bundle_and_nothing_beside_it(
    windows: pytest.MonkeyPatch, mini_checkpoint: Path, tmp_path: Path, taken: bool
) -> None:
    out = tmp_path / "out"
    if taken:
        out.mkdir()
    assert main(["export", str(mini_checkpoint), "--out", str(out), "--components", PARTS, "-q"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert main(["validate", str(out), "-q"]) == 0
    windows.undo()
    assert not [path for path in out.rglob("*") if path.name.endswith((".tmp", ".lock", ".stage"))]


def test_a_whole_model_draws_and_answers(
    windows: pytest.MonkeyPatch, mini_bundle: Path, tmp_path: Path
) -> None:
    image, answer = tmp_path / "a.png", tmp_path / "a.npy"
    assert main(["generate", str(mini_bundle), "a cat", "-o", str(image), "-q"]) == 0
    asked = ["ask", str(mini_bundle), str(image), "what?", "--max-new-tokens", "2", "-q"]
    assert main([*asked, "--save-ids", str(answer)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "a.png"]


def test_plans_are_built_and_the_lock_goes(windows: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from engines.bundle.reader import Bundle
    from engines.tensorrt import build
    from tests.helpers.decoder_bundle import write_decoder_bundle

    bundle = Bundle.open(write_decoder_bundle(tmp_path / "bundle"))
    options = {"components": ["base_ar"], "capacity_tokens": 32}
    (first,) = build.build_plans(bundle, ["rtx-3090"], **options)
    (again,) = build.build_plans(bundle, ["rtx-3090"], **options)
    assert not first.skipped and again.skipped
    assert sorted(os.listdir(first.path.parent)) == ["base_ar.plan", "build.json"]


def test_a_file_that_another_program_has_open_is_waited_for_and_then_named(
    windows: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")
    scanner = path.open("rb")
    timer = threading.Timer(0.2, scanner.close)
    timer.start()
    write_atomic(path, b"new")
    timer.join()
    assert path.read_bytes() == b"new"
    windows.setattr("engines.bundle.files.PATIENCE_S", 0.1)
    with path.open("rb"), pytest.raises(InputError, match="cannot be written"):
        write_atomic(path, b"newer")
    assert path.read_bytes() == b"new" and [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_what_a_killed_process_left_is_removed(windows: pytest.MonkeyPatch, tmp_path: Path) -> None:
    left = tmp_path / f".a.png.{'0' * 16}.tmp"
    left.write_bytes(b"half")
    write_atomic(tmp_path / "a.png", b"whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_lock_is_one_and_goes_when_it_is_given_back(windows: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with locked(tmp_path / "lock", what="build"):
        assert is_held(tmp_path / "lock")
        with pytest.raises(InputError, match="Another build"), locked(tmp_path / "lock", what="build"):
            pytest.fail("it is held")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_replaced_must_be_empty(windows: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("new", "empty", "filled"):
        (tmp_path / name).mkdir()
    (tmp_path / "filled" / "x").touch()
    with pytest.raises(OSError):
        rename_folder(tmp_path / "new", tmp_path / "filled")
    rename_folder(tmp_path / "new", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "filled"]


@pytest.mark.parametrize(
    "name",
    [
        *("NUL", "con", "CON.png", "aux.tar.png", "com1.png", "LPT9", "prn .png", "com\u00b9.png"),
        *("x.png.", "x.png ", "x.png:y", "pic:1.png", "a?.png", 'a".png', "a|b.png", "a\x07.png"),
        *("C:\\work\\nul", "nul\\x.png", "..\\aux\\x.png", "C:..\\con.png"),
    ],
)
def test_a_name_that_windows_would_write_elsewhere_is_refused(
    windows: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    windows.chdir(tmp_path)
    for check in (output_file, lambda path: check_out(Path(path))):
        with pytest.raises(InputError, match="no name of a file on Windows"):
            check(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "name",
    [
        "C:\\work\\cat.png",
        "C:cat.png",
        "\\\\host\\share\\cat.png",
        "..\\cat.png",
        "./com10.png",
        "console.png",
    ],
)
def test_other_names_pass(windows: pytest.MonkeyPatch, name: str) -> None:
    check_name(name)


def test_elsewhere_these_are_names_like_others(tmp_path: Path) -> None:
    assert output_file(tmp_path / "con.png") == tmp_path / "con.png"


def test_a_pipe_that_nobody_reads_is_known_by_its_other_error(windows: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EINVAL, "Invalid argument")

    windows.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        streams.say("hello")
    windows.setattr(sys, "platform", "linux")
    with pytest.raises(InputError):
        streams.say("hello")
