"""The two file formats that hold tensors, safetensors and the release's `.pt`, read as names -> lazy tensors.

All cheap checks run before a library opens the file: its format, its completeness and, for safetensors, that
the header describes each byte exactly once. A `.pt` is a pickle: torch reads it with `weights_only=True`,
which builds only tensors, and there is no fallback without it.

Sources: the safetensors format (github.com/huggingface/safetensors, "Format"); torch.serialization.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError
from .pickles import foreign_name
from .strict_json import object_from_bytes

MAX_HEADER_BYTES = 16 << 20  # 825 tensors need 0.1 MiB
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
AGAIN = "download the file again"
WRAPPED = ("state_dict", "model", "module")  # where training scripts put a model's tensors
MAX_DIMENSIONS = 8
ZIP_END, ZIP_END_BYTES = b"PK\x05\x06", 22


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file. `load` reads the numbers and converts them to this shape and dtype; `name` is the
    file's own."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    source: Path
    read: Callable[[], Tensor]

    def load(self) -> Tensor:
        """The tensor, memory-mapped unless the file stores another dtype. Raises CheckpointError for NaN or
        infinity."""
        tensor = self.read().reshape(self.shape).to(self.dtype)
        low, high = tensor.aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                "the weights are not finite",
                where=f"{self.source}: {self.name}: {count} of {tensor.numel()} numbers are NaN or infinite",
                fix=AGAIN + "; if the error remains, the checkpoint is broken",
            )
        return tensor


def check_weights_file(path: Path) -> int:
    """The size of a weights file in bytes. Raises CheckpointError for a missing file, a Git LFS pointer or a
    few bytes."""
    try:
        if not path.is_file():  # a pipe would never end
            raise CheckpointError(
                "the weights file does not exist",
                where=f"{path}: expected a file, found none",
                fix="check the path",
            )
        with path.open("rb") as file:
            start = file.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(
            "the weights file cannot be read", where=f"{path}: {error.strerror}", fix="check the path"
        ) from None
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(
            "the file is a Git LFS pointer, not weights",
            where=f"{path}: expected weights, got {size} bytes of text",
            fix="run `git lfs pull` in its folder",
        )
    if size < 16:
        raise CheckpointError(
            "the weights file is incomplete",
            where=f"{path}: expected at least 16 bytes, got {size}",
            fix=AGAIN,
        )
    return size


def tensors_from_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Tensors of one safetensors file. Raises CheckpointError for any other or damaged file."""
    size = check_weights_file(path)
    with path.open("rb") as file:
        start = file.read(8)
        if start[:4] == b"PK\x03\x04" or (start[0] == 0x80 and start[1] in range(2, 6)):
            raise CheckpointError(
                "pickle files are not supported here",
                where=f"{path}: expected safetensors, got a pickle",
                fix="convert it with safetensors.torch.save_file, or use the release's safetensors",
            )
        header_bytes = int.from_bytes(start, "little")
        if header_bytes > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                "the safetensors file is incomplete",
                where=f"{path}: expected a header of {header_bytes} bytes, got a file of {size}",
                fix=AGAIN,
            )
        header = object_from_bytes(file.read(header_bytes), where=f"{path}, header")
    header.pop("__metadata__", None)
    entries = {name: safetensors_entry(path, name, entry) for name, entry in header.items()}
    check_layout(
        path, {name: span for name, (_, _, span) in entries.items()}, data_bytes=size - 8 - header_bytes
    )
    reader = SafetensorsReader(path)
    return {
        name: LazyTensor(name, shape, dtype, path, lambda name=name: reader.tensor(name))
        for name, (shape, dtype, _) in entries.items()
    }


def safetensors_entry(
    path: Path, name: str, entry: object
) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    """Shape, dtype and byte span of one header entry, checked for consistency. Raises CheckpointError."""

    def refuse(got: str) -> CheckpointError:
        return CheckpointError(
            "the safetensors header is invalid", where=f"{path}: {name[:120]}: {got}", fix=AGAIN
        )

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("expected dtype, shape and data_offsets")
    shape, span = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or (dtype := DTYPES.get(entry["dtype"])) is None:
        raise refuse(f"unknown dtype {json.dumps(entry['dtype'])[:80]}")
    for numbers in (shape, span):
        if isinstance(numbers, list) and len(numbers) > MAX_DIMENSIONS:
            raise refuse(f"expected at most {MAX_DIMENSIONS} dimensions, got {len(numbers)} numbers")
        if not isinstance(numbers, list) or any(type(n) is not int or n < 0 for n in numbers):
            raise refuse("shape and data_offsets must be lists of non-negative integers")
    expected = math.prod(shape) * dtype.itemsize
    if len(span) != 2 or span[1] - span[0] != expected:
        raise refuse(f"shape {shape} of {entry['dtype']} takes {expected} bytes, but data_offsets are {span}")
    return tuple(shape), dtype, (span[0], span[1])


def check_layout(path: Path, spans: dict[str, tuple[int, int]], *, data_bytes: int) -> None:
    """Check that the tensors cover the data one after the other, without overlap, gap or remainder. Raises
    CheckpointError."""
    end = 0
    for name, (first, last) in sorted(spans.items(), key=lambda item: item[1]):
        if first != end:
            raise CheckpointError(
                "the safetensors header is invalid",
                where=f"{path}: {name[:120]}: expected it to start at byte {end}, "
                f"where the previous tensor ends, got {first}",
                fix=AGAIN,
            )
        end = last
    if end != data_bytes:
        raise CheckpointError(
            "the safetensors file is incomplete or too long",
            where=f"{path}: expected {end} bytes of tensors, got {data_bytes}",
            fix=AGAIN,
        )


class SafetensorsReader:
    """Opens the file when the first tensor is read and keeps it open; each tensor maps only its own bytes."""

    def __init__(self, path: Path):
        self.path, self.file = path, None

    def tensor(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            self.file = self.file or safe_open(self.path, framework="pt", device="cpu")
            return self.file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "a tensor cannot be read", where=f"{self.path}: {name}: {error}", fix=AGAIN
            ) from None


def tensors_from_pt(path: Path) -> dict[str, LazyTensor]:
    """Tensors of a release's `.pt`: a dictionary of them, or one that is stored under a key of WRAPPED.

    Raises CheckpointError if the file is damaged, holds anything but tensors, or is a pickle outside torch's
    zip container.
    """
    check_torch_zip(path, check_weights_file(path))
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise more_than_tensors(path, first_line(error)) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(
            "the .pt file is damaged", where=f"{path}: {first_line(error)}", fix=AGAIN
        ) from None
    tensors = content
    if isinstance(content, dict):
        inner = [content[key] for key in WRAPPED if isinstance(content.get(key), dict)]
        tensors = inner[0] if inner else content
    if not isinstance(tensors, dict):
        raise CheckpointError(
            "the .pt file does not hold a dictionary of tensors",
            where=f"{path}: expected a dictionary, got {type(tensors).__name__}",
            fix="use the release's own file",
        )
    return dict(lazy_from_state_dict(path, tensors))


def lazy_from_state_dict(path: Path, tensors: dict) -> Iterator[tuple[str, LazyTensor]]:
    for name, tensor in tensors.items():
        plain = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not isinstance(name, str) or not plain:
            raise CheckpointError(
                "the .pt file has an entry that is not a plain tensor",
                where=f"{path}: {str(name)[:120]}: expected a tensor, got {type(tensor).__name__}",
                fix="use the release's own file",
            )
        shape, held = tuple(tensor.shape), tensor.untyped_storage().nbytes()
        if (stated := tensor.numel() * tensor.element_size()) > held:
            raise CheckpointError(
                "the .pt file states a larger tensor than it holds",
                where=f"{path}: {name[:120]}: expected {stated} bytes of shape {list(shape)[:8]}, got {held}",
                fix="save the tensor with .contiguous(), or use the release's own file",
            )
        yield name, LazyTensor(name, shape, tensor.dtype, path, lambda tensor=tensor: tensor.detach())


def check_torch_zip(path: Path, size: int) -> None:
    """Check that a `.pt` is a complete zip archive with nothing compressed, so that no byte can expand and
    every tensor can be memory-mapped. Raises CheckpointError."""
    with path.open("rb") as file:
        start = file.read(4)
        file.seek(max(0, size - (1 << 16)))
        tail = file.read()
    if start != b"PK\x03\x04":
        raise CheckpointError(
            "the file is not a .pt of the release",
            where=f"{path}: expected torch's zip container, got {start!r}",
            fix="use the release's own file; other pickles are not supported",
        )
    found = tail.rfind(ZIP_END)
    expected = size - len(tail) + found + ZIP_END_BYTES
    if found < 0 or expected > size:
        raise CheckpointError(
            "the .pt file is incomplete",
            where=f"{path}: expected the end of a zip archive within its {size} bytes, found none",
            fix=AGAIN,
        )
    if expected < size:
        raise CheckpointError(
            "data follows the end of the .pt file",
            where=f"{path}: expected {expected} bytes, got {size}",
            fix=AGAIN,
        )
    try:
        with zipfile.ZipFile(path) as archive:
            entries, foreign = archive.infolist(), foreign_name(archive)
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise CheckpointError(
            "the .pt file is damaged", where=f"{path}: {first_line(error)}", fix=AGAIN
        ) from None
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise CheckpointError(
            "the file is not a .pt of the release",
            where=f"{path}: expected no compressed entry, got {packed[0][:120]}",
            fix="use the release's own file",
        )
    if foreign:
        raise more_than_tensors(path, f"expected tensors and dictionaries, got {foreign[:120]}")


def more_than_tensors(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        "the pickle holds more than tensors, so it was not executed",
        where=f"{path}: {got}",
        fix="save the model's state_dict() alone, or use the release's own file",
    )


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
