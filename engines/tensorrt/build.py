"""ONNX -> plans: one engine per component and target, from the bundle's own bytes.

The same code drives both builders; the target table says which, and for what. TensorRT for RTX builds on any CPU, TensorRT
proper on the device. A plan takes its final name when it is whole, and is built again only when its ONNX, its recipe, the
builder's version or the target differ, or when it is not the recorded one any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from .. import plugins
from ..bundle.files import atomic_file, write_atomic
from ..bundle.manifest import FileSpec, json_from_manifest
from ..bundle.reader import Bundle
from ..errors import InputError, MissingError, UsageError
from ..interpreter import network_hash, parsed_from_network
from ..interpreter.parsed import Parsed
from ..progress import Progress, silent
from ..targets import Target, target_from_name
from .device import call
from .module import check_gpu, check_platform, log_of, tensorrt_of, version_tuple, words
from .network import CAPACITY, check_network, network_from_onnx
from .plan import BUILD, Build, PlanSpec, build_header, onnx_hashes, plan_name, plan_state, read_build
from .profiles import ROWS, Limits, Profile, check_recipe, largest, limits_from_options, recipe_from_limits

NATIVE_CACHES = (10, 15)  # from this TensorRT on, the modern dialect
Look = Callable[
    [str, Parsed], None
]  # component and its network, just before it is compiled; raises what stops the build


@dataclass(frozen=True)
class BuiltPlan:
    """One plan after `build_plans`. `skipped`: it was there already, built from the same files, recipe, TensorRT and target."""

    target: str
    component: str
    path: Path
    skipped: bool
    spec: PlanSpec


def build_plans(
    bundle: Bundle,
    targets: list[str],
    *,
    components: list[str] | None = None,
    capacity_tokens: int | None = None,
    rows: int = ROWS,
    prefill_tokens: int | None = None,
    recipes: Mapping[str, tuple[Profile, ...]] | None = None,
    look: Look | None = None,
    progress: Progress = silent,
) -> list[BuiltPlan]:
    """Build the plans of `components` (all of the bundle's by default) for each of `targets`.

    `capacity_tokens` is the size of the KV caches (default: the model's positions, at most 2048), `prefill_tokens` the longest
    prompt (default: the capacity), `rows` the largest batch (two rows per image under guidance). `recipes` replaces the derived
    profiles of the components that it names. `look` is given each network that is about to be compiled, as TensorRT parsed it, and may
    raise (`star_export.validator.interpreted.look_at_golden` runs the golden tensors on it). All arguments are checked before anything is built.
    Raises UsageError, InputError for what the bundle or a recipe says wrong, MissingError for what this machine lacks.
    """
    chosen = [target_from_name(name) for name in dict.fromkeys(targets)]
    if not chosen:
        raise UsageError(
            "No target is named", where="target: expected at least one, got none", fix="star-export targets"
        )
    names = list(bundle.manifest.components) if components is None else list(dict.fromkeys(components))
    limits = limits_from_options(
        bundle.manifest.model, capacity_tokens=capacity_tokens, prefill_tokens=prefill_tokens, rows=rows
    )
    plans = {name: _recipe(bundle, name, limits, recipes or {}) for name in names}
    for name in recipes or {}:
        bundle.component(name)
    for target in chosen:
        check_buildable(target)
        check_precision(bundle, target)
        for name in names:
            plugin_of(bundle, target, name, plans[name], tensorrt_of(target).__version__)
    results = []
    for target in chosen:
        for name in names:
            progress(f"build {name} for {target.name}", len(results), len(chosen) * len(names))
            results.append(build_plan(bundle, target, name, plans[name], look=look))
    progress("plans built", len(results), len(results))
    return results


def check_buildable(target: Target) -> None:
    """This machine can build for `target`: system, module, dialect, and the device where the builder needs it, or StarError."""
    check_platform(target)
    module = tensorrt_of(target)
    if target.dialect == "classic" and version_tuple(module.__version__) >= NATIVE_CACHES:
        raise InputError(
            f"{target.name} is for an older TensorRT",
            fix="use this JetPack's target: star-export targets",
            where=f"tensorrt: expected one before 10.15 for the classic dialect, got {module.__version__}",
        )
    if target.builder == "tensorrt":
        check_gpu(target)


def check_precision(bundle: Bundle, target: Target) -> None:
    """The target takes the bundle's precision, or InputError that names the ones it takes."""
    precision = bundle.manifest.precision
    if precision not in target.precisions:
        better = "bf16" if "bf16" in target.precisions else "fp16"
        raise InputError(
            f"{target.name} does not run {precision} engines",
            fix=f"export with --precision {better}",
            where=f"{bundle.path}: precision: expected one of {', '.join(target.precisions)}, got {precision}",
        )


def build_plan(
    bundle: Bundle, target: Target, component: str, recipe: tuple[Profile, ...], *, look: Look | None = None
) -> BuiltPlan:
    """Build one plan and enter it into `build.json`, or find that it is there already."""
    graph = bundle.graph(component, dialect=target.dialect)
    version = tensorrt_of(target).__version__
    header, plugin = build_header(target, version), plugin_of(bundle, target, component, recipe, version)
    path = bundle.path / plan_name(target.name, component)
    known = _present(bundle, header).components.get(component)
    if known is not None and known.plugin == plugin and _is_current(bundle, target, component, recipe, known):
        return BuiltPlan(target.name, component, path, True, known)
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with atomic_file(path) as file:
        updates, network, plan = _built(bundle, target, component, graph, recipe, file, look)
        bundle.graph(component, dialect=target.dialect)  # the files parsed are still the ones listed
    spec = bundle.component(component)
    onnx = onnx_hashes(bundle, component, dialect=target.dialect)
    made = PlanSpec(
        onnx=onnx,
        profiles=recipe,
        plan=plan,
        inputs=spec.inputs,
        outputs=spec.outputs,
        kv_cache_updates=updates,
        seconds=round(time.monotonic() - started, 3),
        network=network,
        plugin=plugin,
    )
    build = _present(bundle, header)  # read again: another process may have added to it
    build = replace(build, components=build.components | {component: made})
    write_atomic(path.parent / BUILD, json_from_manifest(build).encode())
    return BuiltPlan(target.name, component, path, False, made)


def _recipe(
    bundle: Bundle, name: str, limits: Limits, recipes: Mapping[str, tuple[Profile, ...]]
) -> tuple[Profile, ...]:
    spec, model = bundle.component(name), bundle.manifest.model
    recipe = recipes[name] if name in recipes else recipe_from_limits(spec, model, limits)
    check_recipe(recipe, spec, model)
    return recipe


def _present(bundle: Bundle, header: Build) -> Build:
    """The plans of `header`'s target on disk if they were built for the same machine; else `header`, which has none."""
    try:
        build = read_build(bundle, header.target)
    except InputError:  # none, or unreadable: then nothing is known of the plans, and they are built again
        return header
    return build if replace(build, components={}) == header else header


def _is_current(
    bundle: Bundle, target: Target, component: str, recipe: tuple[Profile, ...], known: PlanSpec
) -> bool:
    """Whether the plan on disk is the recorded one, and was built from the present files by this recipe."""
    spec = bundle.component(component)
    wanted = (onnx_hashes(bundle, component, dialect=target.dialect), recipe, spec.inputs, spec.outputs)
    if (known.onnx, known.profiles, known.inputs, known.outputs) != wanted:
        return False
    return plan_state(bundle.path, plan_name(target.name, component), known.plan) == "ok"


def _built(
    bundle: Bundle,
    target: Target,
    component: str,
    graph: Path,
    recipe: tuple[Profile, ...],
    file: BinaryIO,
    look: Look | None,
) -> tuple[int, str | None, FileSpec]:
    """Parse, check, read back, build and write one plan; (cache updates, the network's hash, the plan's size and hash)."""
    trt, spec = tensorrt_of(target), bundle.component(component)
    caches = bundle.manifest.model.cache.get(component)
    capacity = largest(recipe, spec, axis=CAPACITY)
    with log_of(trt).collect() as errors:
        builder = trt.Builder(log_of(trt))
        network, parser = network_from_onnx(trt, builder, graph, capacity_tokens=capacity)
        updates = check_network(
            trt, network, spec, capacity_tokens=capacity, caches=2 * caches.layers if caches else 0
        )
        digest = _read_back(trt, network, component, look, owner=(builder, parser))
        config = _config(trt, builder, target, recipe)
        writer = _stream_writer(trt, file)
        with _interruptible(trt, config):
            done = _serialized(builder, network, config, writer)
        plugins.take_overflow()  # TensorRT may run layers on numbers of its own, to time them
        del parser  # owns what the network refers to
    if writer.error is not None:
        raise writer.error
    if not done or not writer.size:
        raise _failure(target, graph, errors)
    return updates, digest, FileSpec(writer.size, writer.hash.hexdigest())


def _read_back(trt, network, component: str, look: Look | None, *, owner: object) -> str | None:
    """The hash of the very network that is compiled next, after `look` has seen it. None for a network that cannot be read back, as of
    a TensorRT that names its layers otherwise: that keeps no one from building, only from reading back."""
    try:
        parsed = parsed_from_network(trt, network, owner=owner)
    except (InputError, MissingError):
        if look is not None:
            raise
        return None
    if look is not None:
        look(component, parsed)
    return network_hash(parsed)


def plugin_of(
    bundle: Bundle, target: Target, component: str, recipe: tuple[Profile, ...], version: str
) -> str | None:
    """SHA-256 of the KV-cache plugin's library that the plan needs, which is loaded; None where the target has such layers.

    Raises InputError for a decoder beyond the plugin's limits, MissingError when there is no library for this TensorRT.
    """
    spec = bundle.component(component)
    if not plugins.needs_plugin(target, spec):
        return None
    rows, capacity = largest(recipe, spec, axis="B"), largest(recipe, spec, axis=CAPACITY)
    plugins.check_limits(bundle.manifest, component, rows=rows, capacity_tokens=capacity)
    library = plugins.library_for(target, spec, tensorrt=version)
    plugins.load(library)
    return library.sha256


def _serialized(builder, network, config, writer) -> bool:
    """Build, and hand the plan to `writer`; an older TensorRT has no streams: the plan is whole in memory first."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        return builder.build_serialized_network_to_stream(network, config, writer)
    plan = builder.build_serialized_network(network, config)
    return plan is not None and writer.write(plan) > 0


def _config(trt, builder, target: Target, recipe: tuple[Profile, ...]):
    """The builder's configuration: the target's architecture and the recipe's profiles."""
    config = builder.create_builder_config()
    if target.builder == "tensorrt_rtx":  # the other builds for the device that it runs on
        config.num_compute_capabilities = 1
        config.set_compute_capability(
            trt.ComputeCapability.__members__[target.sm.upper().replace("_", "")], 0
        )
    for profile in recipe:
        ranges = builder.create_optimization_profile()
        for name, r in profile.inputs.items():
            ranges.set_shape(name, r.min, r.opt, r.max)
        config.add_optimization_profile(ranges)
    return config


def _stream_writer(trt, file: BinaryIO):
    """Writes and hashes what TensorRT hands over. TensorRT does not notice when that fails, so `error` keeps it."""

    base = getattr(trt, "IStreamWriter", object)  # an older TensorRT has none

    class Writer(base):
        def __init__(self):
            base.__init__(self)
            self.size, self.hash, self.error = 0, hashlib.sha256(), None

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except OSError as error:
                self.error = error
                return 0
            self.hash.update(data)
            size = memoryview(data).nbytes
            self.size += size
            return size

    return Writer()


@contextlib.contextmanager
def _interruptible(trt, config) -> Iterator[None]:
    """Ctrl-C stops the build and is raised afterwards: an exception may not pass through TensorRT's frames."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self):
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, name, parent, steps):
            pass

        def phase_finish(self, name):
            pass

        def step_complete(self, name, step) -> bool:
            return not signals

    if threading.current_thread() is not threading.main_thread():  # only that one gets signals
        yield
        return
    signals: list[int] = []
    monitor = Monitor()  # kept here: the configuration does not keep it alive
    config.progress_monitor = monitor
    before = signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if signals:
        raise KeyboardInterrupt


def _failure(target: Target, graph: Path, errors: list[str]) -> InputError | MissingError:
    if any("out of memory" in message.lower() for message in errors):
        free, total = call("cudaMemGetInfo")
        return MissingError(
            "The GPU has too little free memory to build this plan",
            where=f"{graph}: free {free} of {total} bytes; {words(errors)}",
            fix="close other programs, or build with a smaller capacity or fewer rows",
        )
    return InputError(
        f"TensorRT cannot build this graph for {target.name}",
        where=f"{graph}: {words(errors)}",
        fix="try another precision, a smaller capacity or fewer rows; if it fails again, report this graph",
    )
