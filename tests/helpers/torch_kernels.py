"""The kernels on torch tensors: nvcc compiles them for the GPU that is here; they take device addresses."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "engines" / "plugins"
ELEMENTS = {torch.float16: 0, torch.bfloat16: 1}
FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "--threads=0",
    "--split-compile=0",
    "-Xcompiler",
    "-fPIC",
    "-shared",
)


def built(architecture: str) -> Path:
    """The library for `architecture` (such as sm_90), in a folder of this user among the system's temporary
    files.

    Its name says what it was made from, so it is compiled once, by whichever process comes first. Fails where
    there is no nvcc.
    """
    sources = [SOURCES / "kv_attention.cu", ROOT / "tests/plugins/torch_entry.cu"]
    digest = hashlib.sha256(repr((architecture, FLAGS)).encode())
    for path in sorted({*SOURCES.glob("*.cuh"), SOURCES / "kv_attention.h", *sources}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    folder = Path(tempfile.gettempdir()) / f"star-kernels-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is another user's: what lies there is not loaded"
    out = folder / f"{architecture}-{digest.hexdigest()[:16]}.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
            unfinished = out.with_suffix(".unfinished.so")
            command = [
                nvcc,
                *FLAGS,
                f"-arch={architecture}",
                f"-I{SOURCES}",
                *map(str, sources),
                "-o",
                str(unfinished),
            ]
            subprocess.run(command, check=True)
            os.replace(unfinished, out)
    return out


@functools.cache
def library() -> ctypes.CDLL:
    """The library for the GPU that is here."""
    loaded = ctypes.CDLL(str(built("sm_{}{}".format(*torch.cuda.get_device_capability()))))
    number, address = ctypes.c_int, ctypes.c_void_p
    loaded.star_plan.argtypes = [address, address]
    loaded.star_workspace_bytes.argtypes = [address, number, address]
    loaded.star_workspace_bytes.restype = ctypes.c_longlong
    loaded.star_run.argtypes = [address, address, number, number, ctypes.c_float, address, address]
    return loaded


class Attention:
    """One call bound to its tensors, all contiguous on the GPU.

    Query is [B,h,S,D], key and value [B,KV,S,D], caches [B,KV,C,D] (int8: [B,KV,C,D+4]), first int64 [B];
    `output` and `flag` (int32 [1]) are made here. The call is laid out for a GPU of `processors`
    multiprocessors (0: the one that is here), or by the configuration and splits of `plan`, which afterwards
    says what was taken.
    """

    def __init__(
        self,
        query,
        key,
        value,
        key_cache,
        value_cache,
        first,
        *,
        processors: int = 0,
        plan: tuple[int, int] = (0, 0),
    ):
        self.int8 = key_cache.dtype == torch.int8
        self.layout = (ctypes.c_int * 3)(processors, *plan)
        rows, heads, new, dim = query.shape
        self.sizes = (ctypes.c_int * 6)(rows, heads, key.shape[1], new, key_cache.shape[2], dim)
        size = library().star_workspace_bytes(self.sizes, int(self.int8), self.layout)
        if size < 0:
            raise ValueError(f"the kernels refuse {tuple(self.sizes)}")
        taken = library().star_plan(self.sizes, self.layout)
        self.plan = taken % 16, taken // 16
        self.output = torch.empty_like(query)
        self.flag = torch.zeros(1, dtype=torch.int32).to(
            query.device
        )  # a copy: initcheck sees no kernel of torch's
        self.workspace = torch.full((size // 4 + 1,), torch.nan, device=query.device)
        self.tensors = (
            query,
            key,
            value,
            key_cache,
            value_cache,
            first,
            self.output,
            self.workspace,
            self.flag,
        )
        self.pointers = (ctypes.c_void_p * 9)(*(t.data_ptr() for t in self.tensors))
        self.element, self.scale = ELEMENTS[query.dtype], dim**-0.5

    def __call__(self) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        status = library().star_run(
            self.sizes, self.pointers, self.element, int(self.int8), self.scale, self.layout, stream
        )
        if status != 0:
            raise RuntimeError(f"a kernel could not be started: CUDA error {status}")
        return self.output
