"""Sessions on ONNX Runtime: on the CPU with memory shared with numpy, or on CUDA with device memory.

ONNX Runtime's CPU backend does not support bfloat16, so there a component's fp32 twin runs instead of its
graph, with caches in float32. There it multiplies int8 and int4 weights in one of two ways: `exact`, in
float32, and otherwise in int8 arithmetic, several times faster, with an error that export records (docs/
targets.md).
"""

from __future__ import annotations

import itertools
import mmap
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bundle.held import real_path
from ..bundle.manifest import ComponentSpec, TensorSpec
from ..bundle.reader import Bundle
from ..bundle.tensors import check_binding, present_name
from ..errors import InputError, MissingError, install
from ..fit.machine import give_back_memory
from . import ONE_PATH, Buffer, busy, closed, own_buffers
from .fused import load, worth_keeping
from .onnxruntime_buffers import ELEMENT_TYPES, DeviceBuffer, HostBuffer

ACTIVATION_BLOCK = 128  # numbers that share a scale where an int8 bundle's activations are rounded to int8
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
GRAPHS_LIMIT, NO_GRAPH = 8, -1  # captured steps of a session; the `gpu_graph_id` of a plain run
LOG_SEVERITY = 3  # errors
SMALL_BYTES = 1024  # initializers up to this size stay in the graph's file
_TYPE_NAMES = {f"tensor({'float' if name == 'float32' else name})": name for name in ELEMENT_TYPES}


class OnnxRuntimeSession:
    """One component in ONNX Runtime, on `device` `cpu` or `cuda`. `engines.sessions.Session` is its protocol.

    `exact` multiplies int8 and int4 weights in float32. `threads` compute on the CPU, by default one per
    core. `graph`, a serialised model in float32, runs on the
    CPU in place of the component's own, with the component's weights. The files are verified while they are
    loaded, and the loaded graph's inputs and outputs are compared with the manifest. Raises MissingError when
    ONNX Runtime or the device is missing, and InputError for files that differ from the manifest.
    """

    capacity_tokens: int | None = None
    prefill_tokens: int | None = None

    def __init__(
        self,
        bundle: Bundle,
        component: str,
        *,
        device: str = "cpu",
        exact: bool = False,
        graph: bytes | None = None,
        threads: int | None = None,
    ):
        runtime = _runtime(device)
        spec, on_cpu = bundle.component(component), device == "cpu"
        exact = exact or bundle.manifest.precision in ONE_PATH
        options = _config_entries(spec.weights, exact=exact or not on_cpu)
        providers = [(PROVIDERS[device], _provider_options(device))]

        self.cuda_graph = False  # whether a step that runs again is captured into a CUDA graph, and replayed

        def make(path: Path, *, fused: bool = False, save_to: Path | None = None) -> Any:
            return _inference_session(
                runtime, path, options, providers, fused=fused, save_to=save_to, threads=threads
            )

        if on_cpu and not exact and worth_keeping(bundle, component):
            self.inference_session: Any = load(
                bundle, component, make, onnxruntime=runtime.__version__, options=options
            )
        else:
            with bundle.loading(component, twin=on_cpu) as path:
                if graph is not None:
                    weights = [path.with_name(Path(name).name) for name in bundle.weights(component)]
                    self.inference_session = _inference_session(
                        runtime,
                        graph,
                        options,
                        providers,
                        fused=False,
                        save_to=None,
                        weights=weights,
                        threads=threads,
                    )
                elif not on_cpu and (captured := _with_cuda_graph(runtime, path, options, providers)):
                    self.inference_session, self.cuda_graph = captured, True
                else:
                    self.inference_session = make(path)
        give_back_memory()
        self._graphs = itertools.count()
        if PROVIDERS[device] not in self.inference_session.get_providers():
            raise _missing(device, "a provider that does not start (check driver, CUDA and cuDNN)")
        self.component = component
        self._buffer: type[HostBuffer | DeviceBuffer] = HostBuffer if on_cpu else DeviceBuffer
        self.spec = twin_spec(spec) if on_cpu and spec.twin else spec
        check_boundary(self.inference_session, self.spec, where=f"{bundle.path}: {component}")
        self._running = threading.Lock()

    def buffer(self, shape: tuple[int, ...], dtype: str) -> HostBuffer | DeviceBuffer:
        """Allocate a zeroed buffer where this session computes."""
        return self._buffer(shape, dtype)

    def bind(self, tensors: Mapping[str, Buffer]) -> Callable[[], None]:
        """Check `tensors` and return a step, which computes on them in place. Raises InputError."""
        self._check_open()
        check_binding(self.spec, tensors)
        buffers = own_buffers(tensors, self._buffer, where=self.component)
        binding = self.inference_session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_ortvalue_input(tensor.name, buffers[tensor.name].value)
        caches = {present: t.name for t in self.spec.inputs if (present := present_name(t.name))}
        for tensor in self.spec.outputs:
            binding.bind_ortvalue_output(tensor.name, buffers[caches.get(tensor.name, tensor.name)].value)
        bound = binding, buffers  # ONNX Runtime holds only addresses, so the step keeps the buffers alive
        options = self._options_of_runs()

        def step() -> None:
            if not self._running.acquire(blocking=False):
                raise busy(self.component)
            try:
                self._check_open()
                self.inference_session.run_with_iobinding(bound[0], next(options))
            finally:
                self._running.release()

        return step

    def _options_of_runs(self) -> Iterator[Any]:
        """The options of each run of one bound step.

        The first run may be a prefill, or a whole image, whose tensors are far larger than those of a step:
        on the CPU the memory that it took goes back. With CUDA graphs it is plain, as a prefill never runs
        again, and the second one is captured. Only so many steps of a session are, as each takes memory.
        """
        if self._buffer is HostBuffer:
            yield _run_options("memory.enable_memory_arena_shrinkage", "cpu:0")
        if not self.cuda_graph:
            yield from itertools.repeat(None)
        yield _run_options("gpu_graph_id", str(NO_GRAPH))
        number = next(self._graphs)
        yield from itertools.repeat(
            _run_options("gpu_graph_id", str(number if number < GRAPHS_LIMIT else NO_GRAPH))
        )

    def close(self) -> None:
        """Release the component's memory. Bound steps can no longer run."""
        self.inference_session = None
        give_back_memory()

    def _check_open(self) -> None:
        if self.inference_session is None:
            raise closed(self.component)


def twin_spec(spec: ComponentSpec) -> ComponentSpec:
    """The spec of the fp32 twin: `spec` with float32 in place of 16-bit dtypes."""

    def widened(tensors: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        wide = ("bfloat16", "float16")
        return tuple(replace(t, dtype="float32") if t.dtype in wide else t for t in tensors)

    return replace(spec, inputs=widened(spec.inputs), outputs=widened(spec.outputs))


def check_boundary(session, spec: ComponentSpec, *, where: str) -> None:
    """Raise InputError unless the loaded graph's inputs and outputs match `spec`.

    Names, order, dtypes, ranks and fixed sizes are compared.
    """
    for side, expected, got in (
        ("inputs", spec.inputs, session.get_inputs()),
        ("outputs", spec.outputs, session.get_outputs()),
    ):
        wanted = [f"{t.name}:{t.dtype}{_sizes(t.shape)}" for t in expected]
        found = [f"{t.name}:{_TYPE_NAMES.get(t.type, t.type)}{_sizes(t.shape)}" for t in got]
        if wanted != found:
            shorter = min(len(wanted), len(found))
            at = next((i for i, (a, b) in enumerate(zip(wanted, found)) if a != b), shorter)
            raise InputError(
                "The graph differs from the manifest",
                where=f"{where}: {side}[{at}]: expected {_at(wanted, at)}, got {_at(found, at)} "
                f"({len(wanted)} and {len(found)} {side})",
                fix="export the bundle again",
            )


def _sizes(shape) -> str:
    return f"[{','.join(str(size) if isinstance(size, int) else '*' for size in shape)}]"


def _at(items: list[str], index: int) -> str:
    return items[index] if index < len(items) else "nothing"


def _runtime(device: str):
    try:
        import onnxruntime
    except ImportError as error:
        raise _missing(device, f"no importable onnxruntime ({error})") from None
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        available = ", ".join(onnxruntime.get_available_providers())
        raise _missing(device, f"onnxruntime {onnxruntime.__version__} with {available}")
    if device == "cuda":
        onnxruntime.preload_dlls()  # CUDA and cuDNN lie in pip's nvidia packages, unknown to the loader
    return onnxruntime


def _missing(device: str, got: str) -> MissingError:
    return MissingError(
        "ONNX Runtime is not installed" if device == "cpu" else "ONNX Runtime cannot use CUDA here",
        where=f"expected onnxruntime with {PROVIDERS[device]}, got {got}",
        fix=install(device),
    )


def _config_entries(formats: Container[str], *, exact: bool) -> dict[str, str]:
    entries = {
        # Sessions take turns in the decode loop. Idle threads that spin would hold the cores that the next
        # session needs, which makes a step 2 to 3 times slower.
        "session.intra_op.allow_spinning": "0",
        # Level 4 rounds activations to int8, in blocks, and adds in int32. Level 1 computes in float32 on
        # the stored weights; with two rows it unpacks all of them at every step.
        "session.qdq_matmulnbits_accuracy_level": "1" if exact else "4",
        "session.qdq_matmulnbits_block_size": str(ACTIVATION_BLOCK),
    }
    if exact and ("int8" in formats or "fp8" in formats) and "int4" not in formats:
        # With int8's scale per channel, level 1 is 25 times slower than weights that are widened on loading.
        # fp8 is not fused at all, and would be widened at every step.
        entries["session.disable_quant_qdq"] = "1"
    return entries


def _inference_session(
    runtime,
    model: Path | bytes,
    entries: Mapping[str, str],
    providers: list[tuple[str, dict[str, str]]],
    *,
    fused: bool,
    save_to: Path | None,
    weights: Sequence[Path] = (),
    threads: int | None = None,
) -> Any:
    """Load a graph from a file, or from bytes with the files of its `weights`.

    If it was `fused` before, it is loaded as it is. The fused graph is saved in `save_to`.
    """
    options = runtime.SessionOptions()
    options.log_severity_level = LOG_SEVERITY
    options.intra_op_num_threads = threads or 0  # 0: one per core
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    if fused:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save_to:
        options.optimized_model_filepath = str(save_to)
        external = "session.optimized_model_external_initializers_"
        options.add_session_config_entry(f"{external}file_name", f"{save_to.name}.data")
        options.add_session_config_entry(f"{external}min_size_in_bytes", str(SMALL_BYTES))
    held = weights_in_memory(options, weights)
    try:
        source = model if isinstance(model, bytes) else str(model)
        session = runtime.InferenceSession(source, options, providers=providers)
        del held
        return session
    except Exception as error:  # the library raises bare exceptions
        raise InputError(
            "ONNX Runtime cannot load this graph",
            where=_place(model, error),
            fix="export the bundle again with this version of star-export",
        ) from None


def weights_in_memory(options: Any, files: Sequence[Path]) -> list[mmap.mmap]:
    """Give the files of a graph in memory, mapped, to the session that will be made of it.

    It would follow no link to them. What is returned must live until the session is made.
    """
    maps = []
    for path in files:
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    if maps:
        options.add_external_initializers_from_files_in_memory(
            [path.name for path in files], maps, [len(data) for data in maps]
        )
    return maps


def _place(model: Path | bytes, error: Exception) -> str:
    """Where a graph lies, and what the library says of it, with the bundle's own names."""
    if isinstance(model, bytes):
        return f"a graph in memory: {error}"
    own = real_path(model)
    return f"{own}: {str(error).replace(str(model.parent), str(own.parent))}"


def _with_cuda_graph(
    runtime, path: Path, entries: Mapping[str, str], providers: list[tuple[str, dict[str, str]]]
) -> Any:
    """The session with CUDA graphs; None where ONNX Runtime refuses them, because a node of the graph is not
    on the provider."""
    ((name, settings),) = providers
    with_graphs = [(name, settings | {"enable_cuda_graph": "1"})]
    try:
        return _inference_session(runtime, path, entries, with_graphs, fused=False, save_to=None)
    except InputError:  # what is wrong with the graph itself shows without them
        return None


def _run_options(key: str, value: str) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(key, value)
    return options


def _provider_options(device: str) -> dict[str, str]:
    return {"use_tf32": "0"} if device == "cuda" else {}
