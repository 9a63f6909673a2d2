"""Flip single bits of every file of a bundle, and report what its readers say.

    python -m tests.flip_bits BUNDLE [--flips 2000] [--seed 0]

`docs/bad_inputs.md` 19, 21, 29, 59 and 69: a flipped bit is refused, or what the file was made from is used
instead, as where a plan's record is of another build; or it changes nothing of what the file says, as a blank
in JSON that becomes another. BUNDLE is copied, with its plans and certificates. Exit code 1 says that a flip
was accepted.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from engines.bundle.files import MANIFEST, sha256_of
from engines.bundle.manifest import FileSpec
from engines.bundle.reader import JUNK, Bundle
from engines.bundle.records import record_from_json
from engines.errors import InputError
from engines.sessions import fused
from engines.tensorrt.plan import BUILD, build_from_file, plan_state
from star_export.validator.chain import read_certificate

REFUSED, SAME, ACCEPTED = "refused", "says the same", "ACCEPTED"
Read = Callable[[], object]  # what a file says; raises InputError if it is refused


def reader_of(root: Path, name: str) -> Read:
    """What reads the file `name` of the bundle in `root`."""
    path, parts = root / name, Path(name).parts
    if name == MANIFEST:
        return lambda: Bundle.open(root).manifest
    if parts[0] == "certificates":
        return lambda: repr(read_certificate(path))  # which compares NaN, too
    if parts[:2] == ("plans", "onnxruntime"):
        return lambda: kept(root, path)
    if parts[0] == "plans" and path.name == BUILD:
        return lambda: build_from_file(path)
    if parts[0] == "plans":
        plan = build_from_file(path.with_name(BUILD)).components[path.stem].plan
        return lambda: state(path, plan)
    if name not in Bundle.open(root).manifest.files:
        return lambda: "never read"
    return lambda: Bundle.open(root).file(name)


def kept(root: Path, path: Path) -> object:
    """What the record of a fused graph says, or the hash of one of its files, as it is recorded."""
    text = path.with_name(fused.RECORD).read_text(errors="replace")
    record = record_from_json(
        fused.Fused, text, schema=fused.SCHEMA, other="another version", fix="", where=str(path)
    )
    if path.name == fused.RECORD:
        return record
    bundle, name = Bundle.open(root), path.relative_to(root).as_posix()
    bundle.add({name: record.files[path.name]})
    return bundle.file(name)


def state(path: Path, plan: FileSpec) -> str:
    """Raises InputError unless a plan is the recorded one."""
    if (found := plan_state(path.parent, path.name, plan)) != "ok":
        raise InputError("This plan is not the recorded one", where=f"{path}: {found}", fix="build it again")
    return found


def verdict(path: Path, bit: int, read: Read, right: object) -> str:
    """What the reader says while one bit of the file is flipped."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
        file.flush()
        try:
            found = SAME if read() == right else ACCEPTED
        except InputError:
            found = REFUSED
        file.seek(bit // 8)
        file.write(bytes([byte]))
    return found


def flipped(root: Path, *, flips: int, seed: int) -> dict[str, Counter[str]]:
    """Flip `flips` bits of the files in `root`, file after file, one at a time: file -> verdict -> number."""
    chosen = random.Random(seed)
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if path.is_file()]
    names = [name for name in names if (root / name).stat().st_size and Path(name).name not in JUNK]
    readers = {name: reader_of(root, name) for name in names}
    right = {name: read() for name, read in readers.items()}
    before = {name: sha256_of(root / name) for name in names}
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    for i in range(flips):
        name = names[i % len(names)]
        bit = chosen.randrange(8 * (root / name).stat().st_size)
        counts[name][verdict(root / name, bit, readers[name], right[name])] += 1
    assert before == {name: sha256_of(root / name) for name in names}, "every bit is back"
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.flip_bits", description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--flips", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(shutil.copytree(given.bundle, Path(folder) / "bundle"))
        counts = flipped(root, flips=given.flips, seed=given.seed)
    for name, found in counts.items():
        print(f"{name}: " + ", ".join(f"{count} {what}" for what, count in sorted(found.items())))
    whole = sum(counts.values(), Counter[str]())
    print(f"{whole.total()} flips: " + ", ".join(f"{count} {what}" for what, count in sorted(whole.items())))
    return int(bool(whole[ACCEPTED]))


if __name__ == "__main__":
    sys.exit(main())
