"""What this machine has left: memory of the host, of this process and of a folder's disk, and the refusals.

A refusal names the bytes needed and the bytes free. What is needed must be a lower bound, because work that
would succeed must never be refused; what cannot be found out is not checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ..errors import MissingError

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
NO_LIMIT_BYTES = 1 << 60  # a limit of this size means none
NEARLY_NONE_BYTES = 1 << 25  # with so little left, anything fails that allocates
NO_MEMORY = (  # Python, torch, ONNX Runtime and the system's loader each have words of their own
    *("can't allocate memory", "failed to allocate memory", "cannot allocate memory"),
    *("bad allocation", "bad_alloc", "can't start new thread", "failed to map segment"),
)
_LIMITS = {  # file of a limit, file of its use, and what of the use can be given back, in memory.stat
    "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}


def free_memory() -> int | None:
    """Bytes of memory that this process may still take; None where the system does not say.

    The smallest of what the machine has available (pages of files count as free, and so does swap), what each
    control group of this process has left, and what its limits on address space and data leave.
    """
    found = [free for probe in (_available, _in_groups, _in_limits) for free in probe()]
    return max(0, min(found)) if found else None


def lack_of_memory(error: BaseException) -> BaseException | None:
    """The link of `error`'s chain of causes that says that no memory is left; None if memory did not run out.

    Libraries hide it: one wraps a MemoryError, another fails without a word of memory. Where no link says so,
    but none is left now, it is `error` itself.
    """
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, MemoryError) or any(words in str(link).lower() for words in NO_MEMORY):
            return link
        link = link.__cause__ or link.__context__
    free = free_memory()
    return error if free is not None and free < NEARLY_NONE_BYTES else None


def give_back_memory() -> None:
    """Give the system what this process has freed: the C library of Linux keeps blocks of up to 32 MiB.

    What loads a component frees as much as the component holds, and closing one frees that; kept, it would be
    lost to whatever is loaded next. Does nothing where there is no such function (malloc_trim(3)).
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # musl has none
            ctypes.CDLL(None).malloc_trim(0)


def free_disk(folder: str | Path) -> int | None:
    """Bytes free for this user on the disk of `folder`, which need not exist yet; None if it is unknown."""
    path = Path(folder).absolute()
    place = next((p for p in (path, *path.parents) if p.is_dir()), path)
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


def check_memory(
    needed_bytes: int, *, what: str, fix: str, where: str = "memory", free_bytes: int | None = None
) -> None:
    """Raise MissingError unless `needed_bytes` are free: `free_bytes`, or else what `free_memory` finds."""
    free = free_memory() if free_bytes is None else free_bytes
    if free is not None and needed_bytes > free:
        raise MissingError(
            f"There is too little memory to {what}",
            where=f"{where}: expected at least {sized(needed_bytes)} free, got {sized(free)}",
            fix=fix,
        )


def check_disk(needed_bytes: int, folder: str | Path, *, what: str, fix: str) -> None:
    """Raise MissingError unless `needed_bytes` are free on the disk of `folder`."""
    free = free_disk(folder)
    if free is not None and needed_bytes > free:
        raise MissingError(
            f"There is too little disk to {what}",
            where=f"{folder}: expected at least {sized(needed_bytes)} free, got {sized(free)}",
            fix=fix,
        )


def sized(size_bytes: int) -> str:
    """A size for an error: `2147483648 bytes (2.15 GB)`."""
    return f"{size_bytes} bytes ({size_bytes / 1e9:.2f} GB)"


def _available() -> Iterator[int]:
    fields = _fields(PROC / "meminfo")
    if "MemAvailable:" in fields:
        yield (fields["MemAvailable:"] + fields.get("SwapFree:", 0)) * 1024


def _in_groups() -> Iterator[int]:
    """What each control group above this process leaves, of both versions of control groups."""
    for line in _text(PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller, files in _LIMITS.items():
            if controller in controllers.split(",") and (controller or not controllers):
                root = CGROUPS / controller
                inside = [root / path.strip("/"), *(root / path.strip("/")).parents]
                for folder in inside[: inside.index(root) + 1]:
                    yield from _in_group(folder, *files)


def _in_group(folder: Path, limit: str, use: str, reclaimable: tuple[str, ...]) -> Iterator[int]:
    limited, used = _text(folder / limit).strip(), _text(folder / use).strip()
    if limited.isdecimal() and used.isdecimal() and int(limited) < NO_LIMIT_BYTES:
        statistics = _fields(folder / "memory.stat")
        yield int(limited) - int(used) + sum(statistics.get(name, 0) for name in reclaimable)


def _in_limits() -> Iterator[int]:
    """What RLIMIT_AS and RLIMIT_DATA leave beyond what this process uses of them."""
    if sys.platform == "win32":
        return
    import resource

    used = _fields(PROC / "self" / "status")
    for kind, field in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and field in used:
            yield limit - used[field] * 1024


def _fields(path: Path) -> dict[str, int]:
    """First word -> the number after it, of each line that has both."""
    lines = [line.split() for line in _text(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
