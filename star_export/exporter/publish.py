"""Publish a bundle: stage it beside its final place, step by step, and rename it when it is complete.

The final name does not exist before the rename. `.NAME.stage` beside it holds the growing bundle, files that
only the export needs, and a journal of the steps that are done, with the size and SHA-256 of every file. So a
run that was killed goes on where it stopped. This module knows nothing of the files' contents.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from engines.bundle.files import MANIFEST, reason, rename_folder, sha256_of, sync_folder, write_atomic
from engines.bundle.lock import is_held, locked
from engines.bundle.manifest import FileSpec, Manifest
from engines.bundle.reader import Bundle
from engines.bundle.records import json_from_record
from engines.bundle.typed_paths import check_name
from engines.errors import InputError, StarError
from engines.progress import Progress, Tick, adder, silent

JOURNAL, BUNDLE, SCRATCH, LOCK = "journal.json", "bundle", "scratch", "lock"


def check_out(out: Path) -> None:
    """Check that `out` is absent or an empty folder, in an existing folder that can be written.

    Raises InputError. Writes nothing, but removes the stage of a bundle that is complete: a run can be killed
    after it renamed the bundle.
    """
    check_name(out)
    stage = stage_path(out)
    try:
        filled_already = out.is_dir() and any(out.iterdir())
        if filled_already and stage.is_dir() and not (stage / BUNDLE).exists():
            shutil.rmtree(stage, ignore_errors=True)
        if out.is_symlink():
            raise _refusal(out, "a symbolic link")
        if filled_already:
            raise _refusal(out, "a folder with files in it")
        if out.exists() and not out.is_dir():
            raise _refusal(out, "a file")
        if not out.parent.is_dir():
            raise InputError(
                "The bundle cannot be written here",
                where=f"{out}: expected its parent to be a folder, got "
                + ("a file" if out.parent.exists() else "nothing"),
                fix="create the parent folder first",
            )
        if not os.access(out.parent, os.W_OK):
            raise InputError(
                "The bundle cannot be written here",
                where=f"{out}: {out.parent} is read-only",
                fix="choose a folder that you can write to",
            )
    except OSError as error:  # for example a name that is too long
        raise _not_written(out, error) from None


class Stage:
    """The folder in which a bundle grows: `bundle` becomes the bundle, `scratch` is thrown away.

    `steps` maps the name of each step that is done to its files, by their names in the folder.
    """

    def __init__(self, path: Path, inputs: dict[str, Any]):
        self.path, self.inputs = path, inputs
        self.bundle, self.scratch = path / BUNDLE, path / SCRATCH
        self.steps: dict[str, dict[str, FileSpec]] = {}

    def step(self, name: str, write: Callable[[], None]) -> None:
        """Call `write`, which adds files to the folder, and record them, unless this step is done already."""
        if name in self.steps:
            return
        known = {file for files in self.steps.values() for file in files}
        write()
        made = [path for path in _files(self.path) if path.relative_to(self.path).as_posix() not in known]
        for path in made:
            path.chmod(self.path.stat().st_mode & 0o666)  # safetensors creates files with 0600
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        files = {
            path.relative_to(self.path).as_posix(): FileSpec(path.stat().st_size, sha256_of(path))
            for path in made
        }
        for folder in {path.parent for path in made}:
            sync_folder(folder)
        self.steps[name] = files
        self._write_journal()

    def drop(self, file: Path) -> None:
        """Remove a file that no later step reads; the step that wrote it stays done."""
        name = file.relative_to(self.path).as_posix()
        for files in self.steps.values():
            files.pop(name, None)
        self._write_journal()
        file.unlink(missing_ok=True)

    def forget(self, names: Iterable[str]) -> None:
        """Let steps be done again, if they were, and remove their files."""
        for name in names:
            for file in self.steps.pop(name, {}):
                (self.path / file).unlink(missing_ok=True)
        self._write_journal()

    def files(self) -> dict[str, FileSpec]:
        """The bundle's files so far, by their names in it."""
        return {
            name.removeprefix(f"{BUNDLE}/"): spec
            for files in self.steps.values()
            for name, spec in sorted(files.items())
            if name.startswith(f"{BUNDLE}/")
        }

    def go_on(self, progress: Progress = silent) -> None:
        """Take over what an earlier run of the same inputs left: its complete steps stay, all else goes.

        Raises InputError if the folder belongs to an export of other inputs.
        """
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            journal = json.loads((self.path / JOURNAL).read_text())
            if journal["inputs"] != json.loads(json.dumps(self.inputs)):
                raise InputError(
                    "An unfinished export of something else lies here",
                    where=f"{self.path}: expected an export of the same checkpoint, precision, options and "
                    f"versions, got another: {_difference(journal['inputs'], self.inputs)}",
                    fix=f"repeat that export to finish it, or remove it: rm -r '{self.path}'",
                )
            recorded = {
                step: {file: FileSpec(**spec) for file, spec in files.items()}
                for step, files in journal["steps"].items()
            }
            size = sum(spec.size for files in recorded.values() for spec in files.values())
            tick = adder(progress, "check what is done already, in bytes", size)
            self.steps = {step: files for step, files in recorded.items() if self._complete(files, tick)}
        kept = {self.path / file for files in self.steps.values() for file in files}
        for path in _files(self.path):
            if path not in kept:
                path.unlink()
        for folder in (self.bundle, self.scratch):
            folder.mkdir(exist_ok=True)
        self._write_journal()

    def _complete(self, files: dict[str, FileSpec], tick: Tick) -> bool:
        return all(
            (self.path / name).is_file()
            and (self.path / name).stat().st_size == spec.size
            and sha256_of(self.path / name, tick=tick) == spec.sha256
            for name, spec in files.items()
        )

    def _write_journal(self) -> None:
        steps = {
            step: {name: {"size": spec.size, "sha256": spec.sha256} for name, spec in files.items()}
            for step, files in self.steps.items()
        }
        text = json.dumps({"inputs": self.inputs, "steps": steps}, indent=1)
        write_atomic(self.path / JOURNAL, text.encode())


def stage_path(out: Path) -> Path:
    """The folder beside `out` in which it is staged."""
    return out.parent / f".{out.name[:200]}.stage"


@contextlib.contextmanager
def staged(out: Path, inputs: dict[str, Any], progress: Progress = silent) -> Iterator[Stage]:
    """Yield the stage of `out`, whose bundle becomes `out` if the block succeeds.

    `inputs` identifies what is exported. The stage of an earlier run with the same inputs is taken over; that
    of another export, or of one that is still running, raises InputError. A StarError in the block removes
    the stage, because another run would meet it again; so does an interruption before the first step is done.
    After any other the stage stays, for the next run of the same command.
    """
    with reserved(out) as path, filled(path, out, inputs, progress) as stage:
        yield stage


@contextlib.contextmanager
def reserved(out: Path) -> Iterator[Path]:
    """Yield the folder in which `out` is staged, which no other process writes to until the block ends.

    Raises InputError at once while another export writes to it, and what `check_out` raises.
    """
    check_out(out)
    path = stage_path(out)
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise _not_written(out, error) from None
    try:
        with locked(path / LOCK, what="export"):
            try:
                check_out(out)  # another export may have ended meanwhile
                yield path
            finally:
                if not (path / JOURNAL).exists():
                    shutil.rmtree(path, ignore_errors=True)
    finally:
        with contextlib.suppress(OSError):
            path.rmdir()  # if it is empty


@contextlib.contextmanager
def filled(path: Path, out: Path, inputs: dict[str, Any], progress: Progress = silent) -> Iterator[Stage]:
    """Yield the stage in the reserved folder `path`, as `staged` does."""
    stage = Stage(path, inputs)
    stage.go_on(progress)
    try:
        yield stage
        rename_folder(stage.bundle, out)  # fails on one that was filled meanwhile
        sync_folder(out.parent)
    except StarError as error:
        if isinstance(error.__cause__, OSError):  # of a file that could not be written
            raise _not_written(out, error.__cause__, resumable=bool(stage.steps)) from error
        stage.steps = {}
        raise
    except OSError as error:
        raise _not_written(out, error, resumable=bool(stage.steps)) from error
    finally:
        if not stage.steps or not stage.bundle.exists():
            shutil.rmtree(path, ignore_errors=True)


def abandoned(out: Path) -> dict[Path, int]:
    """The stages beside `out` that an export left and no process holds, and their sizes in bytes."""
    found = {}
    with contextlib.suppress(OSError):
        for path in sorted(out.absolute().parent.glob(".*.stage")):
            if (path / JOURNAL).exists() and not is_held(path / LOCK):
                found[path] = sum(file.stat().st_size for file in _files(path))
    return found


def write_manifest(stage: Stage, manifest: Manifest) -> None:
    """Write the manifest, and open the result as a device would."""
    write_atomic(stage.bundle / MANIFEST, json_from_record(manifest).encode())
    if Bundle.open(stage.bundle).manifest != manifest:
        raise AssertionError("the manifest differs after it is written and parsed")


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path not in (folder / JOURNAL, folder / LOCK, folder / BUNDLE / MANIFEST)
    )


def _difference(theirs: Any, ours: dict[str, Any]) -> str:
    found = sorted(key for key in ours if not isinstance(theirs, dict) or theirs.get(key) != ours[key])
    return ", ".join(found) or "a record of another form"


def _refusal(out: Path, got: str) -> InputError:
    return InputError(
        "The output path is already in use",
        where=f"{out}: expected nothing or an empty folder, got {got}",
        fix="choose another --out, or remove what is there",
    )


def _not_written(out: Path, error: OSError, *, resumable: bool = False) -> InputError:
    fix = "check the name, the permissions and the free space, or choose another --out"
    if resumable:
        fix = f"make room and repeat the command, which goes on from {stage_path(out)}, or remove that folder"
    with contextlib.suppress(OSError):  # numpy does not say why it wrote only a part
        free = f"; {shutil.disk_usage(out.parent).free} bytes are free there"
        return InputError("The bundle cannot be written", where=f"{out}: {reason(error)}{free}", fix=fix)
    return InputError("The bundle cannot be written", where=f"{out}: {reason(error)}", fix=fix)
