"""The kernels on torch tensors: compiled with nvcc for the GPU that is here, called with addresses of device memory."""
from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "engines" / "plugins"
ELEMENTS = {torch.float16: 0, torch.bfloat16: 1}


@functools.cache
def library() -> ctypes.CDLL:
    """Compiled once per process. Fails where there is a GPU and no nvcc: then nothing about the kernels can be shown there."""
    major, minor = torch.cuda.get_device_capability()
    with tempfile.TemporaryDirectory(prefix="star-kernels-") as folder:
        out = Path(folder) / "libkernels.so"
        sources = [str(SOURCES / "kv_attention.cu"), str(HERE / "torch_entry.cu")]
        flags = ["-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{major}{minor}", f"-I{SOURCES}", "-Xcompiler", "-fPIC", "-shared"]
        subprocess.run(["nvcc", *flags, *sources, "-o", str(out)], check=True)
        loaded = ctypes.CDLL(str(out))
    loaded.star_workspace_bytes.restype = ctypes.c_longlong
    loaded.star_run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_float, ctypes.c_void_p]
    return loaded


class Attention:
    """One call bound to its tensors, all contiguous on the GPU: query [B,h,S,D], key and value [B,KV,S,D], caches [B,KV,C,D]
    (int8: [B,KV,C,D+4]), first int64 [B]. `output` and `flag` (int32 [1]) are made here."""

    def __init__(self, query, key, value, key_cache, value_cache, first):
        self.int8 = key_cache.dtype == torch.int8
        rows, heads, new, dim = query.shape
        self.sizes = (ctypes.c_int * 6)(rows, heads, key.shape[1], new, key_cache.shape[2], dim)
        size = library().star_workspace_bytes(self.sizes, int(self.int8))
        if size < 0:
            raise ValueError(f"the kernels refuse {tuple(self.sizes)}")
        self.output, self.flag = torch.empty_like(query), torch.zeros(1, dtype=torch.int32, device=query.device)
        self.workspace = torch.full((size // 4 + 1,), torch.nan, device=query.device)
        self.tensors = (query, key, value, key_cache, value_cache, first, self.output, self.workspace, self.flag)
        self.pointers = (ctypes.c_void_p * 9)(*(t.data_ptr() for t in self.tensors))
        self.element, self.scale = ELEMENTS[query.dtype], dim**-0.5

    def __call__(self) -> torch.Tensor:
        stream = torch.cuda.current_stream().cuda_stream
        status = library().star_run(self.sizes, self.pointers, self.element, int(self.int8), self.scale, stream)
        if status != 0:
            raise RuntimeError(f"a kernel could not be started: CUDA error {status}")
        return self.output
