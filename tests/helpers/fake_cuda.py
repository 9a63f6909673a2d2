"""CUDA without a device: its runtime and driver on host memory, with streams that are captured into graphs.

What is enqueued runs at once, or becomes a node while the stream is captured. As the real one, a capture is
spoilt by an allocation, a wait and a copy from the host, and gives no graph then. `calls` has every call by
name. Kernels are those of loop.cu and tests/gpu/toy.cu on emulated blocks (tests/plugins/emulator.h).
"""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from engines.tensorrt import device, nvrtc
from tests.helpers.emulated import FLAGS, ROOT, SOURCES, compiler

STREAM, FIELDS = 7, 16  # fields of the structs that the kernels take
KERNELS = (b"advance", b"noise", b"feed", b"toy_decoder", b"toy_head")
CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED, NOT_SUPPORTED = 900, 901, 801
STEPS_LIMIT = 1000  # of a WHILE node
ENUMS = {
    "cudaMemcpyKind": SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
    "CU_GRAPH_COND_ASSIGN_DEFAULT": 1,
    "CUgraphNodeType": SimpleNamespace(CU_GRAPH_NODE_TYPE_CONDITIONAL=13),
    "CUgraphConditionalNodeType": SimpleNamespace(CU_GRAPH_COND_TYPE_WHILE=1),
    "CUstreamCaptureMode": SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1),
    "CUgraphNodeParams": lambda: SimpleNamespace(conditional=SimpleNamespace()),
}


def built(folder: Path) -> ctypes.CDLL:
    """The kernels of the loop.cu in `folder`, compiled as C++."""
    with tempfile.TemporaryDirectory(prefix="star-emulated-") as out:
        library = Path(out) / "libloop.so"
        driver = ROOT / "tests" / "engines" / "tensorrt" / "loop_driver.cpp"
        folders = [f"-I{path}" for path in (SOURCES, folder, ROOT / "tests" / "gpu")]
        command = [compiler(), *FLAGS, "-O1", *folders, str(driver), "-o", str(library)]
        subprocess.run(command, check=True)
        return ctypes.CDLL(str(library))


@functools.cache
def library() -> ctypes.CDLL:
    """The kernels as they are, once per process."""
    return built(ROOT / "engines" / "tensorrt")


class FakeCuda:
    """`refused` names calls that fail, such as those of a driver that lacks them."""

    def __init__(self, *, kernels: ctypes.CDLL | None = None, driver: int = 13000, refused=()):
        self.kernels, self.version, self.refused = kernels or library(), driver, set(refused)
        self.memory: dict[int, np.ndarray] = {}
        self.calls: list[str] = []
        self.nodes: list | None = None  # of the graph that is captured
        self.body: list | None = None  # of a WHILE node; it belongs to its graph
        self.spoilt, self.open_graphs = False, 0

    def install(self, monkeypatch) -> FakeCuda:
        """Take the place of cuda-python and NVRTC."""
        monkeypatch.setattr(device, "cudart", lambda: self)
        monkeypatch.setattr(device, "driver", lambda: self)
        monkeypatch.setattr(device, "release", lambda address: self.cudaFree(address))  # later too
        monkeypatch.setattr(device, "stream", lambda: STREAM)
        monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
        monkeypatch.setattr(nvrtc, "cubin_from_source", lambda source, sm: b"cubin")
        monkeypatch.setattr(nvrtc, "kernels_from_source", nvrtc.kernels_from_source.__wrapped__)
        return self

    def __getattr__(self, name):
        if name in ENUMS:
            return ENUMS[name]
        call = object.__getattribute__(self, f"_{name}")

        def counted(*arguments):
            self.calls.append(name)
            if name in self.refused:
                return (NOT_SUPPORTED, None)
            done = call(*arguments)
            return done if isinstance(done, tuple) else (0, done)

        return counted

    def spoil(self, code=CAPTURE_UNSUPPORTED):
        """What a call answers that may not be made: in a capture it spoils that."""
        self.spoilt = True
        return code, None

    def enqueue(self, work) -> None:
        """Run `work` now, or when the graph under way is launched."""
        work() if self.nodes is None else self.nodes.append(work)

    # The runtime

    def _cudaMalloc(self, size):
        if self.nodes is not None:
            return self.spoil()
        block = np.full(size, 0xA5, np.uint8)
        self.memory[block.ctypes.data] = block
        return block.ctypes.data

    def _cudaFree(self, address):
        del self.memory[address]

    def _cudaMemsetAsync(self, address, value, size, stream):
        self.enqueue(lambda: ctypes.memset(address, value, size))

    def _cudaMemcpyAsync(self, to, source, size, kind, stream):
        if self.nodes is not None:
            return self.spoil()
        ctypes.memmove(to, source, size)
        return None

    def _cudaStreamSynchronize(self, stream):
        return self.spoil() if self.nodes is not None else None

    def _cudaGetDeviceCount(self):
        return 1

    def _cudaGetDeviceProperties(self, index):
        return SimpleNamespace(name=b"fake", major=8, minor=9, totalGlobalMem=1 << 30)

    def _cudaDriverGetVersion(self):
        return self.version

    def _cudaRuntimeGetVersion(self):
        return 13000

    # The driver

    def _cuCtxGetCurrent(self):
        return "context"

    def _cuModuleLoadData(self, cubin):
        return "module"

    def _cuModuleGetFunction(self, module, name):
        return KERNELS.index(name)

    def _cuLaunchKernel(self, kernel, x, y, z, threads, *rest):
        assert (z, threads, rest[:4]) == (1, 256, (1, 1, 0, STREAM))
        at = ctypes.cast(rest[4], ctypes.POINTER(ctypes.c_void_p))[0]
        fields = ctypes.create_string_buffer(ctypes.string_at(at, 8 * FIELDS))  # CUDA copies parameters
        self.enqueue(lambda: self.kernels.star_emulate_loop(kernel, fields, x, y, len(self.calls)))

    def _cuStreamBeginCapture(self, stream, mode):
        assert self.nodes is None
        self.nodes, self.spoilt = [], False

    def _cuStreamBeginCaptureToGraph(self, stream, graph, dependencies, data, count, mode):
        assert self.nodes is None and graph == []
        self.nodes, self.body, self.spoilt = graph, graph, False

    def _cuStreamEndCapture(self, stream):
        nodes, self.nodes = self.nodes, None
        self.open_graphs += 0 if nodes is self.body or self.spoilt else 1
        return (CAPTURE_INVALIDATED, None) if self.spoilt else (0, nodes)

    def _cuGraphCreate(self, flags):
        self.open_graphs += 1
        return []

    def _cuGraphConditionalHandleCreate(self, graph, context, value, flags):
        assert (context, value, flags) == ("context", 1, 1)
        self.condition = ctypes.c_uint(0)
        return ctypes.addressof(self.condition)

    def _cuGraphAddNode(self, graph, dependencies, data, count, node):
        assert (node.type, node.conditional.type, node.conditional.size) == (13, 1, 1)
        assert node.conditional.handle == ctypes.addressof(self.condition)
        condition, body = self.condition, []
        node.conditional.phGraph_out = [body]

        def repeat():
            condition.value, steps = 1, 0
            while condition.value:
                [work() for work in body]
                steps += 1
                assert steps < STEPS_LIMIT, "a WHILE node without end"

        graph.append(repeat)
        return "node"

    def _cuGraphInstantiate(self, graph, flags):
        self.open_graphs += 1
        return list(graph)

    def _cuGraphDestroy(self, graph):
        self.open_graphs -= 1

    def _cuGraphExecDestroy(self, graph):
        self.open_graphs -= 1

    def _cuGraphLaunch(self, graph, stream):
        assert self.nodes is None
        [work() for work in graph]


class Context:
    """A TensorRT context: `compute(arrays)` runs on what is bound. In a capture it refuses another binding,
    and to run shapes that it has not run before."""

    def __init__(self, cuda, spec, compute, capturable):
        self.cuda, self.spec, self.compute = cuda, spec, compute
        self.shapes, self.addresses, self.ran, self.calls = {}, {}, None, []
        if capturable is not None:
            self.is_stream_capturable = lambda stream: capturable

    def set_device_memory(self, address, size):
        assert self.cuda.memory[address].size >= size

    def set_optimization_profile_async(self, index, stream):
        return stream == STREAM and self.cuda.nodes is None

    def set_input_shape(self, name, shape):
        return self._bound(self.shapes, name, shape)

    def set_tensor_address(self, name, address):
        return self._bound(self.addresses, name, address)

    def _bound(self, table, name, value):
        self.calls.append("bind")
        if self.cuda.nodes is not None:
            self.cuda.spoil()
            return False
        table[name] = value
        if table is self.shapes:
            self.ran = None
        return True

    def get_tensor_shape(self, name):
        if name.startswith("present"):
            return self.shapes[name.replace("present", "past_key_values")]
        rows, places, _ = self.shapes["inputs_embeds" if "inputs_embeds" in self.shapes else "hidden_states"]
        spec = next(t for t in self.spec.outputs if t.name == name)
        return tuple({"B": rows, "2N": rows, "N": rows // 2, "S": places}.get(a, a) for a in spec.shape)

    def execute_async_v3(self, stream):
        self.calls.append("enqueue")
        if self.cuda.nodes is not None and self.ran != self.shapes:
            self.cuda.spoil()
            return False
        self.ran = dict(self.shapes)
        arrays = {}
        for t in self.spec.inputs + self.spec.outputs:
            shape = self.shapes.get(t.name) or self.get_tensor_shape(t.name)
            size = int(np.prod(shape)) * np.dtype(t.dtype).itemsize
            memory = (ctypes.c_char * size).from_address(self.addresses[t.name])
            arrays[t.name] = np.frombuffer(memory, t.dtype).reshape(shape)
        self.cuda.enqueue(lambda: self.compute(arrays))
        return stream == STREAM


class Engine:
    """A TensorRT engine of `spec`. `capturable`: what its contexts say; None for a TensorRT that does not."""

    device_memory_size_v2 = 1024

    def __init__(self, cuda, spec, profiles, compute, *, capturable=True):
        self.cuda, self.spec, self.compute, self.capturable = cuda, spec, compute, capturable
        self.names = [t.name for t in spec.inputs + spec.outputs]
        self.num_io_tensors, self.num_optimization_profiles = len(self.names), len(profiles)
        self.contexts: list[Context] = []

    def get_tensor_name(self, i):
        return self.names[i]

    def create_execution_context(self, strategy):
        self.contexts.append(Context(self.cuda, self.spec, self.compute, self.capturable))
        return self.contexts[-1]
