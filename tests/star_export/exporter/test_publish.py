"""Publishing: the final name is absent, or complete. docs/bad_inputs.md 12."""

from __future__ import annotations

import errno
import os

import pytest

from engines.errors import InputError
from star_export.exporter import publish


def fill(stage, data: bytes = b"x") -> None:
    (stage.bundle / "file").write_bytes(data)


@pytest.mark.parametrize(
    "name", ["plain", "with space", "quote'\"s", "semi;colon$(touch pwned)", "ünïcode-模型"]
)
def test_any_name_is_only_a_name(tmp_path, name) -> None:
    with publish.staged(tmp_path / name, {}) as stage:
        fill(stage)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "file").read_bytes() == b"x"


def test_an_empty_folder_is_taken(tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with publish.staged(out, {}) as stage:
        fill(stage)
    assert (out / "file").exists()


def taken(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "content":
        out.mkdir()
        (out / "precious").write_text("keep")
    elif kind == "file":
        out.write_text("keep")
    elif kind == "symlink":
        (tmp_path / "target").mkdir()
        out.symlink_to(tmp_path / "target")
    elif kind == "no parent":
        out = tmp_path / "absent" / "out"
    elif kind == "long":
        out = tmp_path / ("n" * 300)
    return out


@pytest.mark.parametrize("kind", ["content", "file", "symlink", "no parent", "long"])
def test_a_taken_or_impossible_place_is_refused_before_any_work(tmp_path, kind) -> None:
    out = taken(tmp_path, kind)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(InputError) as error:
        publish.check_out(out)
    assert str(out.name)[:40] in error.value.where and error.value.fix
    with pytest.raises(InputError), publish.staged(out, {}):
        pytest.fail("the block must not run")
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def test_a_read_only_parent_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # root may write anywhere, so the mode bits show nothing here
    with pytest.raises(InputError, match="cannot be written"):
        publish.check_out(tmp_path / "out")


def stopped(out, *steps: str, then=lambda stage: None) -> list[str]:
    """Run steps that write a scratch file of their name, then `then`, then stop; the steps that ran."""
    ran: list[str] = []

    def write(stage, name: str) -> None:
        ran.append(name)
        (stage.scratch / name).write_text(name)

    with pytest.raises(KeyboardInterrupt), publish.staged(out, {}) as stage:
        for name in steps:
            stage.step(name, lambda name=name: write(stage, name))
        then(stage)
        raise KeyboardInterrupt
    return ran


def scratch(out) -> list[str]:
    return sorted(path.name for path in (publish.stage_path(out) / publish.SCRATCH).iterdir())


def test_a_step_stays_done_when_its_file_is_dropped(tmp_path) -> None:
    out = tmp_path / "out"
    assert stopped(out, "a", "b", then=lambda stage: stage.drop(stage.scratch / "a")) == ["a", "b"]
    assert scratch(out) == ["b"]
    assert stopped(out, "a", "b", "c") == ["c"] and scratch(out) == ["b", "c"]


def test_a_file_that_was_dropped_just_before_a_kill_is_removed_by_the_next_run(tmp_path) -> None:
    out = tmp_path / "out"
    stopped(out, "a", "b", then=lambda stage: stage.drop(stage.scratch / "a"))
    (publish.stage_path(out) / publish.SCRATCH / "a").write_text("a")
    assert stopped(out, "a", "b") == [] and scratch(out) == ["b"]


def test_steps_that_are_forgotten_run_again_and_their_files_are_removed_before(tmp_path) -> None:
    out = tmp_path / "out"
    stopped(out, "a", "b", "c", then=lambda stage: stage.forget(["a", "b", "never run"]))
    assert scratch(out) == ["c"]
    assert stopped(out, "a", "b", "c") == ["a", "b"] and scratch(out) == ["a", "b", "c"]


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_stops_before_the_first_step_leaves_nothing(tmp_path, kind) -> None:
    expected = InputError if isinstance(kind, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as error, publish.staged(tmp_path / "out", {}) as stage:
        fill(stage)
        raise kind
    assert expected is KeyboardInterrupt or "No space left" in error.value.where
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_complete_steps_are_kept_for_the_next_run(tmp_path, kind) -> None:
    with pytest.raises(BaseException) as error, publish.staged(tmp_path / "out", {"a": 1}) as stage:
        stage.step("first", lambda: fill(stage))
        (stage.bundle / "half").write_bytes(b"half of a file")
        raise kind
    assert [p.name for p in tmp_path.iterdir()] == [".out.stage"]
    assert not isinstance(kind, OSError) or ".out.stage" in error.value.fix
    with publish.staged(tmp_path / "out", {"a": 1}) as stage:
        assert not (stage.bundle / "half").exists()
        stage.step("first", lambda: pytest.fail("this step is done"))
        assert stage.files()["file"].size == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (
        tmp_path / "out" / "file"
    ).read_bytes() == b"x"


def test_a_file_that_changed_is_written_again(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), publish.staged(out, {}) as stage:
        stage.step("first", lambda: fill(stage))
        raise KeyboardInterrupt
    fill(stage, b"y")
    with publish.staged(out, {}) as stage:
        stage.step("first", lambda: fill(stage))
    assert (out / "file").read_bytes() == b"x"


def test_another_exports_stage_is_refused_and_kept(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), publish.staged(out, {"precision": "int4"}) as stage:
        stage.step("first", lambda: fill(stage))
        raise KeyboardInterrupt
    with pytest.raises(InputError, match="unfinished") as error, publish.staged(out, {"precision": "bf16"}):
        pytest.fail("the block must not run")
    assert "precision" in error.value.where and f"rm -r '{stage.path}'" in error.value.fix
    assert (stage.bundle / "file").exists()


def test_two_exports_to_one_place_do_not_meet(tmp_path) -> None:
    out = tmp_path / "out"
    with publish.staged(out, {}), pytest.raises(InputError, match="Another export"), publish.staged(out, {}):
        pytest.fail("the block must not run")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"inputs": {}}', '{"inputs": {}, "steps": {"a": {"b": {}}}}']
)
def test_a_damaged_journal_means_a_new_start(tmp_path, text) -> None:
    out = tmp_path / "out"
    stage = publish.stage_path(out)
    (stage / "bundle").mkdir(parents=True)
    (stage / "bundle" / "file").write_bytes(b"from an earlier run")
    (stage / "journal.json").write_text(text)
    with publish.staged(out, {}) as taken_over:
        assert not list(taken_over.bundle.iterdir())
        fill(taken_over)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_stage_of_a_complete_bundle_goes(tmp_path) -> None:
    out = tmp_path / "out"
    with publish.staged(out, {}) as stage:
        fill(stage)
    stage.path.mkdir()
    (stage.path / "journal.json").write_text("{}")
    with pytest.raises(InputError, match="already in use"):
        publish.check_out(out)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_filled_meanwhile_is_kept(tmp_path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError), publish.staged(out, {}) as stage:
        fill(stage)
        out.mkdir()
        (out / "precious").write_text("keep")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (out / "precious").read_text() == "keep"


def test_a_second_export_is_told_at_its_start_and_the_stage_is_that_of_the_first(tmp_path) -> None:
    out = tmp_path / "out"
    with publish.reserved(out) as path:
        with pytest.raises(InputError, match=f"by process {os.getpid()}"), publish.reserved(out):
            pytest.fail("the block must not run")
        assert path.is_dir() and not publish.abandoned(tmp_path / "other")
    assert not list(tmp_path.iterdir()), "a reservation that came to nothing leaves nothing"


def test_a_disk_that_fills_up_inside_a_step_keeps_the_steps_before(tmp_path) -> None:
    cause = OSError(errno.ENOSPC, "No space left on device")

    def full() -> None:
        raise InputError("This file cannot be written", where="x", fix="y") from cause

    with (
        pytest.raises(InputError, match="No space left") as error,
        publish.staged(tmp_path / "out", {}) as stage,
    ):
        stage.step("first", lambda: fill(stage))
        stage.step("second", full)
    assert ".out.stage" in error.value.fix
    assert publish.abandoned(tmp_path / "other") == {tmp_path / ".out.stage": 1}
