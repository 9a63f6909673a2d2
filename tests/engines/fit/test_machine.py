"""What is free is the least of what machine, control groups and limits leave; too little is exit code 5."""

from __future__ import annotations

import ctypes
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from engines.errors import MissingError
from engines.fit import machine

GB = 10**9


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for / with 8 GB available and no limits."""
    proc = tmp_path / "proc"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000000 kB\nMemAvailable: 8000000 kB\nSwapFree: 0 kB\n")
    monkeypatch.setattr(machine, "PROC", proc)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    return tmp_path


def group(system: Path, path: str, line: str, **files: object) -> None:
    folder = system / "cgroup" / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(str(text))
    (system / "proc/self/cgroup").write_text(line)


def test_the_machine_alone_leaves_what_is_available_and_its_swap(system: Path) -> None:
    assert machine.free_memory() == 8_000_000 * 1024
    (system / "proc/meminfo").write_text("MemAvailable: 1000 kB\nSwapFree: 500 kB\n")
    assert machine.free_memory() == 1500 * 1024


def test_a_group_of_version_2_leaves_its_limit_less_its_use_but_for_the_pages_of_files(system: Path) -> None:
    stat = "anon 1\ninactive_file 200000000\nactive_file 100000000\n"
    group(system, "a/b", "0::/a/b\n", memory__max="max\n", memory__current=0)
    assert machine.free_memory() == 8_000_000 * 1024  # no limit
    group(system, "a", "0::/a/b\n", memory__max=GB, memory__current=900_000_000, memory__stat=stat)
    assert machine.free_memory() == 400_000_000  # the limit of the group above


def test_a_group_of_version_1_is_found_among_other_controllers(system: Path) -> None:
    line = "5:cpu:/x\n4:memory:/x\n1:name=systemd:/\n"
    stat = "inactive_file 9\ntotal_inactive_file 50000000\ntotal_active_file 0\n"
    files = {"memory__limit_in_bytes": GB, "memory__usage_in_bytes": GB, "memory__stat": stat}
    group(system, "memory/x", line, **files)
    assert machine.free_memory() == 50_000_000
    group(system, "memory/x", line, memory__limit_in_bytes=2**63 - 4096)
    assert machine.free_memory() == 8_000_000 * 1024


def test_a_system_that_says_nothing_is_not_checked(system: Path) -> None:
    (system / "proc/meminfo").unlink()
    assert machine.free_memory() is None
    machine.check_memory(10**18, what="do this", fix="f")


@pytest.mark.parametrize("kind, field", [("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")])
def test_a_limit_of_the_process_counts_less_what_the_process_uses(kind: str, field: str) -> None:
    code = f"""
import resource
from engines.fit import machine
used = machine._fields(machine.PROC / "self/status")["{field}:"] * 1024
resource.setrlimit(resource.{kind}, (used + 100_000_000, resource.RLIM_INFINITY))
assert 90_000_000 < machine.free_memory() <= 100_000_000, machine.free_memory()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_disk_of_a_folder_that_does_not_exist_yet_is_its_parents(tmp_path: Path) -> None:
    assert machine.free_disk(tmp_path / "a" / "b") == pytest.approx(machine.free_disk(tmp_path), rel=0.1)


def test_too_little_names_the_bytes_needed_and_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda: 1999)
    monkeypatch.setattr(machine, "free_disk", lambda folder: 1999)
    machine.check_memory(1999, what="do this", fix="f")
    machine.check_disk(1999, "place", what="do this", fix="f")
    for check in (
        lambda: machine.check_memory(2000, what="do this", fix="f"),
        lambda: machine.check_disk(2000, "place", what="do this", fix="f"),
    ):
        with pytest.raises(MissingError, match="too little (memory|disk) to do this") as caught:
            check()
        assert "2000 bytes" in caught.value.where and "1999 bytes" in caught.value.where
        assert caught.value.exit_code == 5


def test_a_library_that_hides_its_lack_of_memory_is_seen_through(system: Path) -> None:
    def raised(error: Exception, cause: Exception | None) -> Exception:
        try:
            try:
                raise cause or ValueError("no cause")
            except Exception:
                raise error from None
        except Exception as caught:
            return caught

    assert machine.lack_of_memory(MemoryError())
    assert machine.lack_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: 12 bytes"))
    assert machine.lack_of_memory(raised(RuntimeError("failed"), MemoryError()))
    assert not machine.lack_of_memory(raised(RuntimeError("failed"), KeyError("a")))


def test_any_failure_is_one_of_memory_where_none_is_left(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = SystemError("error return without exception set")
    (system / "proc/self/status").write_text("VmSize: 1000000 kB\nVmData: 1000 kB\n")
    for left, ran_out in ((machine.NEARLY_NONE_BYTES - 1, True), (machine.NEARLY_NONE_BYTES, False)):
        limits = {resource.RLIMIT_AS: 1024 * 10**6 + left, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
        monkeypatch.setattr(resource, "getrlimit", lambda kind, limits=limits: (limits[kind],) * 2)
        assert (machine.lack_of_memory(failed) is failed) == ran_out


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists() or not hasattr(ctypes.CDLL(None), "malloc_trim"),
    reason="only the C library of Linux keeps what is freed",
)
def test_what_was_freed_is_given_back() -> None:
    """In a process of its own: what is freed below a block that stays does not go back by itself."""
    program = """
import ctypes, resource
from pathlib import Path
from engines.fit.machine import give_back_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, as it is after a block of 32 MiB was freed
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20
blocks = [libc.malloc(4 << 20) for _ in range(64)]
for block in blocks:
    ctypes.memset(block, 1, 4 << 20)
held = pages()
for block in blocks[:-1]:
    libc.free(block)
kept = pages()
give_back_memory()
print(held, kept, pages())
"""
    held, kept, left = map(int, subprocess.check_output([sys.executable, "-c", program]).split())
    assert held - kept < 64 and held - left > 200, (held, kept, left)
