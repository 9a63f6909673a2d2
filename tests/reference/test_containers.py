"""Files that are not what they seem are refused at once,
by name, and no pickle runs (docs/bad_inputs.md 1 to 5, 7, 8)."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from reference.containers import LazyTensor, tensors_from_pt, tensors_from_safetensors
from reference.weights import load_star, resolve_checkpoint
from tests.helpers.refusals import refused

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 3968658944\n"
SHARD = "Qwen2.5-VL-mini/model-00001-of-00002.safetensors"
TENSORS = {"a": torch.arange(6, dtype=torch.float32).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
Put = Callable[[str, bytes | str], Path]


class Canary:
    """Leaves a file behind when a pickle that holds it is executed."""

    def __init__(self, track: Path):
        self.track = track

    def __reduce__(self):
        return os.mkdir, (str(self.track),)


def torch_bytes(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def safetensors_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str, bytes], dict[str, LazyTensor]]:
    """Read bytes as a file of this name."""

    def read_bytes(name: str, content: bytes) -> dict[str, LazyTensor]:
        (tmp_path / name).write_bytes(content)
        return (tensors_from_pt if name.endswith(".pt") else tensors_from_safetensors)(tmp_path / name)

    return read_bytes


@pytest.mark.parametrize(
    "name, content",
    [
        ("t.safetensors", save(TENSORS)),
        ("t.pt", torch_bytes(TENSORS)),
        ("s.pt", torch_bytes({"state_dict": OrderedDict(TENSORS), "step": 7})),
        ("m.pt", torch_bytes({"model": OrderedDict(TENSORS), "epoch": 3, "optimizer": {"lr": 1e-4}})),
        ("p.pt", torch_bytes({name: torch.nn.Parameter(t) for name, t in TENSORS.items()})),
    ],
)
def test_good_files_are_read(read: Callable, name: str, content: bytes) -> None:
    lazy = read(name, content)
    assert list(lazy) == ["a", "b"] and lazy["a"].shape == (2, 3) and lazy["b"].dtype == torch.bfloat16
    assert all(torch.equal(lazy[key].load(), tensor) for key, tensor in TENSORS.items())


@pytest.mark.parametrize("name", [SHARD, "STAR-mini.pt", "VQ-Model.pt"])
def test_a_git_lfs_pointer(folder: Path, put: Put, name: str) -> None:
    put(name, POINTER)
    with refused("the file is a Git LFS pointer, not weights", Path(name).name, "run `git lfs pull`"):
        load_star(resolve_checkpoint(folder))


@pytest.mark.parametrize("name", [SHARD, "STAR-mini.pt"])
@pytest.mark.parametrize("change", ["empty", "seven bytes", "one byte less", "half", "one byte more"])
def test_files_that_are_not_whole(folder: Path, put: Put, name: str, change: str) -> None:
    good = (folder / name).read_bytes()
    content = {
        "empty": b"",
        "seven bytes": good[:7],
        "one byte less": good[:-1],
        "half": good[: len(good) // 2],
        "one byte more": good + b"\0",
    }[change]
    put(name, content)
    expected = ["expected", "got"] if change == "one byte more" or name == SHARD and len(content) > 16 else []
    told = "data follows the end" if change == "one byte more" and name != SHARD else "incomplete"
    with refused(Path(name).name, told, "download the file again", *expected):
        load_star(resolve_checkpoint(folder))


def test_sizes_of_a_longer_file_are_told(folder: Path, put: Put) -> None:
    good = (folder / "STAR-mini.pt").read_bytes()
    put("STAR-mini.pt", good + b"12345")
    with refused(f"expected {len(good)} bytes, got {len(good) + 5}"):
        load_star(resolve_checkpoint(folder))


@pytest.mark.parametrize("claimed", [2**63, 2**64 - 1, 200 << 20, 4096])
def test_a_header_longer_than_the_file(read: Callable, claimed: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused(f"expected a header of {claimed} bytes"):
        read("t.safetensors", struct.pack("<Q", claimed) + b"{}" + bytes(64))
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    )  # KiB: nothing of that size was allocated


def test_a_sparse_file_with_a_huge_header(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", 200 << 20) + b"{}")
    os.truncate(path, 1 << 30)
    with refused("expected a header of 209715200 bytes"):
        tensors_from_safetensors(path)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header, told",
    [
        ({"t": entry(shape=[3])}, "t: shape [3] of F32 takes 12 bytes"),
        ({"t": entry(shape=[-2])}, "t: shape and data_offsets must be lists of non-negative integers"),
        ({"t": entry(shape=[True, 2])}, "t: shape and data_offsets"),
        ({"t": entry(shape=2)}, "t: shape and data_offsets"),
        ({"t": entry(shape=[2**40, 2**40])}, "t: shape"),
        ({"t": entry(dtype="F7")}, 't: unknown dtype "F7"'),
        ({"t": entry(dtype=None)}, "t: unknown dtype null"),
        ({"t": entry(offsets=[8, 0])}, "t: shape [2] of F32 takes 8 bytes"),
        ({"t": entry(offsets=[0, 8, 8])}, "t: shape"),
        (
            {"t": entry(offsets=[1, 9])},
            "t: expected it to start at byte 0, where the previous tensor ends, got 1",
        ),
        ({"t": {"dtype": "F32"}}, "t: expected dtype, shape and data_offsets"),
        ({"t": entry() | {"more": 1}}, "t: expected dtype"),
        ({"t": 3}, "t: expected dtype"),
        ([], "expected an object"),
        (b"not json", "line 1"),
        (b'{"t": {"dtype": "F32", "shape": [' + b"9" * 6000 + b"]}}", "got 6000 digits"),
        ({"t": entry(shape=[2**62] * 50_000)}, "t: expected at most 8 dimensions, got 50000 numbers"),
        ({"t": entry(offsets=[0] * 50_000)}, "t: expected at most 8 dimensions, got 50000 numbers"),
        ({"t": entry(shape=[9] * 400_000)}, "expected at most 262144 values, got about 400006"),
        (b'{"t": [' + b"[]," * 5_000_000 + b"[]]}", "expected at most 262144 values, got about 10000003"),
        ({}, "expected 0 bytes of tensors, got 8"),
        (
            {"t": entry(), "u": entry()},
            "u: expected it to start at byte 8, where the previous tensor ends, got 0",
        ),
        (
            {"t": entry(), "u": entry(offsets=[12, 20])},
            "u: expected it to start at byte 8, where the previous tensor ends, got 12",
        ),
        ({"t": entry(shape=[1], offsets=[0, 4])}, "expected 4 bytes of tensors, got 8"),
        (
            b'{"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
            b' "t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
            "key 't' appears twice",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_headers_that_do_not_describe_the_file(read: Callable, header: object, told: str) -> None:
    with refused("t.safetensors", told):
        read("t.safetensors", safetensors_bytes(header, bytes(8)))


@pytest.mark.parametrize("name", ["STAR-mini.pt", "VQ-Model.pt", SHARD, "Qwen2.5-VL-mini/model.safetensors"])
@pytest.mark.parametrize("container", ["torch", "pickle", "old pickle"])
def test_a_pickle_never_runs(folder: Path, put: Put, tmp_path: Path, name: str, container: str) -> None:
    track = tmp_path / "canary-fired"
    content = {"state_dict": {"pixel_output_head.weight": Canary(track)}}
    put(
        name,
        torch_bytes(content)
        if container == "torch"
        else pickle.dumps(content, protocol=4 if container == "pickle" else 0),
    )
    if name.endswith("/model.safetensors"):
        (folder / "Qwen2.5-VL-mini/model.safetensors.index.json").unlink()
    told = {".pt": "was not executed" if container == "torch" else "other pickles are not supported"}.get(
        Path(name).suffix,
        "the safetensors file is incomplete"
        if container == "old pickle"
        else "pickle files are not supported",
    )
    with refused(Path(name).name, told):
        load_star(resolve_checkpoint(folder))
    assert not track.exists()
    pickle.loads(pickle.dumps(Canary(track)))  # the canary would have sung
    assert track.exists()


def test_a_base_model_of_pickles_is_refused(folder: Path, put: Put, tmp_path: Path) -> None:
    for path in (folder / "Qwen2.5-VL-mini").glob("model*"):
        path.unlink()
    put(
        "Qwen2.5-VL-mini/pytorch_model.bin",
        torch_bytes({"lm_head.weight": Canary(tmp_path / "canary-fired")}),
    )
    with refused("pickle files are not supported", "pytorch_model.bin", "convert it with safetensors"):
        load_star(resolve_checkpoint(folder))
    assert not (tmp_path / "canary-fired").exists()


@pytest.mark.parametrize(
    "content, told",
    [
        ([1, 2], "expected a dictionary, got list"),
        (torch.ones(3), "expected a dictionary, got Tensor"),
        ({"a": 3}, "a: expected a tensor, got int"),
        ({3: torch.ones(2)}, "3: expected a tensor"),
        ({"state_dict": {"a": [torch.ones(2)]}}, "a: expected a tensor, got list"),
        ({"state_dict": 7}, "state_dict: expected a tensor, got int"),
        ({"a": torch.ones(3).to_sparse()}, "got torch._utils._rebuild_sparse_tensor"),
        ({"a": torch.empty(2, device="meta")}, "got torch._utils._rebuild_meta_tensor_no_storage"),
        ({"a": bytearray(3)}, "got "),
        ({"a": torch.zeros(1).expand(1 << 29)}, "a: expected 2147483648 bytes of shape [536870912], got 4"),
    ],
    ids=lambda v: str(v)[:30],
)
def test_what_a_pt_may_not_hold(read: Callable, content: object, told: str) -> None:
    with refused("t.pt", told):
        read("t.pt", torch_bytes(content))


REDUCED = {  # what weights_only=True calls with a size of the pickle's choice
    "bytearray": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "an old name": b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "on the stack": b"\x80\x04\x8c\x08builtins\x8c\tbytearray\x93J\xff\xff\xff\x7f\x85R.",
    "a storage": b"\x80\x02ctorch\nFloatStorage\nJ\xff\xff\xff\x1f\x85R.",
    "too large": b"\x80\x02}" + b"}0" * (1 << 20) + b".",
}


@pytest.mark.parametrize("content", REDUCED.values(), ids=REDUCED)
def test_a_small_pickle_does_not_take_gigabytes(read: Callable, content: bytes) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with refused("t.pt"):
        read("t.pt", packed.getvalue())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_storage_larger_than_its_file_is_refused(read: Callable) -> None:
    stored, packed = io.BytesIO(torch_bytes({"a": torch.zeros(4)})), io.BytesIO()
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w") as target:
        for info in source.infolist():
            content = source.read(info)
            if info.filename.endswith("data.pkl"):
                content = content.replace(b"K\x04", b"J\x00\x00\x00\x20")  # 2^29 numbers
            target.writestr(info.filename, content)
    with refused("t.pt"):
        read("t.pt", packed.getvalue())


def test_a_compressed_pt_is_refused(read: Callable) -> None:
    """Nothing may expand: 1 KiB on disk is at most 1 KiB in memory."""
    stored, packed = io.BytesIO(torch_bytes(TENSORS)), io.BytesIO()
    with zipfile.ZipFile(stored) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for info in source.infolist():
            target.writestr(info.filename, source.read(info))
    with refused("t.pt", "expected no compressed entry"):
        read("t.pt", packed.getvalue())


def test_a_damaged_pt_is_refused(read: Callable) -> None:
    good = torch_bytes(TENSORS)
    at = good.index(b"data.pkl") + 200
    for flip in range(0, 60, 7):
        damaged = bytearray(good)
        damaged[at + flip] ^= 0x55
        try:
            read("t.pt", bytes(damaged))
        except Exception as error:
            assert getattr(error, "exit_code", None) == 3, error


@pytest.mark.parametrize("value, count", [(torch.nan, 1), (torch.inf, 2), (-torch.inf, 3)])
@pytest.mark.parametrize("name, dump", [("t.safetensors", save), ("t.pt", torch_bytes)])
def test_weights_that_are_not_finite(
    read: Callable, name: str, dump: Callable, value: float, count: int
) -> None:
    tensor = torch.zeros(5, 4, dtype=torch.bfloat16)
    tensor[1 : 1 + count, 2] = value
    lazy = read(name, dump({"good": torch.ones(2), "bad.weight": tensor}))
    assert lazy["good"].load().sum() == 2
    with refused(name, "bad.weight", f"{count} of 20 numbers are NaN or infinite"):
        lazy["bad.weight"].load()


def test_a_folder_or_pipe_in_the_place_of_weights(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    for name, reader in (
        ("pipe.pt", tensors_from_pt),
        ("", tensors_from_safetensors),
        ("absent.pt", tensors_from_pt),
    ):
        with refused("the weights file does not exist"):
            reader(tmp_path / name)
