"""Build plans: one engine per component and target, from the bundle's own files.

The target table says which builder to use. TensorRT for RTX builds on any CPU, TensorRT proper on the device.
A plan takes its final name once it is complete. It is built again only when its ONNX files, its profiles, the
builder's version or the target differ, or when the file is no longer the recorded one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .. import plugins
from ..bundle.files import atomic_file, not_written, write_atomic
from ..bundle.lock import locked
from ..bundle.manifest import component_of
from ..bundle.reader import Bundle
from ..bundle.records import json_from_record
from ..errors import InputError, UsageError
from ..fit.sizes import sizes_from_bundle
from ..fit.work import check_build
from ..progress import Progress, silent
from ..targets import Target, target_from_name
from .compiler import Look, compile_plan, give_back_memory
from .module import check_gpu, check_platform, tensorrt_of, version_tuple
from .network import CAPACITY
from .plan import Build, PlanSpec, build_header, build_name, onnx_hashes, plan_name, plan_state, read_build
from .profiles import (
    ROWS,
    Limits,
    Profile,
    check_profiles,
    largest,
    limits_from_options,
    profiles_from_limits,
)

LOCK = ".lock"  # in the folder of a target's plans
NATIVE_CACHES = (10, 15)  # TensorRT runs the modern dialect from this version on


@dataclass(frozen=True)
class BuiltPlan:
    """One plan of `build_plans`.

    `skipped`: a plan from the same files, profiles, TensorRT and target was there.
    """

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
    profiles: Mapping[str, tuple[Profile, ...]] | None = None,
    look: Look | None = None,
    progress: Progress = silent,
) -> list[BuiltPlan]:
    """Build the plans of `components` (by default all of the bundle's) for each of `targets`.

    `capacity_tokens` is the size of the KV caches (by default the model's positions, at most 2048),
    `prefill_tokens` the longest prompt (by default the capacity), and `rows` the largest batch (two rows per
    image under guidance). `profiles` replaces the derived profiles of the components that it names. `look` is
    called with each network that is about to be compiled, as TensorRT parsed it, and may raise to stop the
    build; `star_export.validator.interpreted.look_at_golden` runs the golden tensors on it.

    All arguments are checked before anything is built, and no other process builds for these targets
    meanwhile. Where all plans are there already nothing is written, so that a bundle may be read-only. Raises
    UsageError, InputError for a fault of the bundle or of the profiles, and MissingError for what this
    machine lacks.
    """
    chosen = [target_from_name(name) for name in dict.fromkeys(targets)]
    if not chosen:
        raise UsageError(
            "No target is named", where="target: expected at least one, got none", fix="star-export targets"
        )
    names = list(bundle.manifest.components)
    if components is not None:
        names = [part for name in dict.fromkeys(components) for part in _graphs(bundle, name)]
    limits = limits_from_options(
        bundle.manifest.model, capacity_tokens=capacity_tokens, prefill_tokens=prefill_tokens, rows=rows
    )
    given = profiles or {}
    plans = {name: _profiles(bundle, name, limits, given) for name in names}
    for name in given:
        bundle.component(name)
    for target in chosen:
        check_buildable(target)
        check_precision(bundle, target)
        check_types(bundle, target, names)
        for name in names:
            plugin_of(bundle, target, name, plans[name], tensorrt_of(target).__version__)
    check_room(bundle, chosen, names)
    results: list[BuiltPlan] = []
    with contextlib.ExitStack() as stack:
        there = {target: _all_there(bundle, target, plans) for target in chosen}
        for target in chosen:
            if there[target] is None:
                stack.enter_context(_locked_folder(bundle, target))
        for target in chosen:
            for name in names:
                progress(f"build {name} for {target.name}", len(results), len(chosen) * len(names))
                found = there[target]
                results.append(
                    found[name] if found else build_plan(bundle, target, name, plans[name], look=look)
                )
    progress("plans built", len(results), len(results))
    return results


def check_buildable(target: Target) -> None:
    """Check that this machine can build for `target`.

    It needs the target's system, its builder in a version for the target's dialect, and its GPU where the
    builder runs only on the device. Raises UsageError, InputError or MissingError.
    """
    check_platform(target)
    trt = tensorrt_of(target)
    if target.dialect == "classic" and version_tuple(trt.__version__) >= NATIVE_CACHES:
        raise InputError(
            f"{target.name} is for an older TensorRT",
            fix="use this JetPack's target: star-export targets",
            where=f"tensorrt: expected a version before 10.15 for the classic dialect, got {trt.__version__}",
        )
    if target.builder == "tensorrt":
        check_gpu(target)


def check_precision(bundle: Bundle, target: Target) -> None:
    """Check that the target runs the bundle's precision.

    Raises InputError naming the precisions that it runs.
    """
    precision = bundle.manifest.precision
    if not target.runs(precision):
        better = "bf16" if "bf16" in target.precisions else "fp16"
        raise InputError(
            f"{target.name} does not run {precision} engines",
            fix=f"export with --precision {better}",
            where=f"{bundle.path}: precision: expected one of {', '.join(target.precisions)}, "
            f"got {precision}",
        )


def check_types(bundle: Bundle, target: Target, names: list[str]) -> None:
    """Check that the target computes in the types of these graphs: in an fp16 bundle, the diffusion decoder's
    compute in bf16.

    Raises InputError naming the graphs that it cannot run.
    """
    if "bf16" in target.precisions:
        return
    in_bf16 = {name for name, spec in bundle.manifest.components.items() if "bf16" in spec.weights}
    wrong = [name for name in names if name in in_bf16]
    if not wrong:
        return
    others = dict.fromkeys(component_of(name) for name in bundle.manifest.components if name not in in_bf16)
    raise InputError(
        f"{target.name} does not compute in bf16, and some components do",
        where=f"{bundle.path}: {', '.join(wrong)}: expected components that compute in fp16, got bf16, "
        "because fp16 may overflow in them",
        fix=f"build without them: --components {','.join(others)}" if others else "use another target",
    )


def check_room(bundle: Bundle, targets: list[Target], names: list[str]) -> None:
    """Check that this machine has the disk and the memory that the absent plans take at least.

    Raises MissingError with the bytes needed and free. Plans that are there may turn out to be unchanged.
    """
    absent = [
        name
        for target in targets
        for name in names
        if not (bundle.path / plan_name(target.name, name)).exists()
    ]
    check_build(sizes_from_bundle(bundle), bundle.path, absent)


def build_plan(
    bundle: Bundle,
    target: Target,
    component: str,
    profiles: tuple[Profile, ...],
    *,
    look: Look | None = None,
) -> BuiltPlan:
    """Build one plan and record it in `build.json`, unless the same plan is there already."""
    if found := plan_there(bundle, target, component, profiles):
        return found
    version = tensorrt_of(target).__version__
    header, plugin = build_header(target, version), plugin_of(bundle, target, component, profiles, version)
    path = bundle.path / plan_name(target.name, component)
    path.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with atomic_file(path) as file, bundle.loading(component, dialect=target.dialect) as graph:
        updates, network, plan = compile_plan(bundle, target, component, graph, profiles, file, look=look)
        give_back_memory()  # the next plan may need all of it
    spec = bundle.component(component)
    made = PlanSpec(
        onnx=onnx_hashes(bundle, component, dialect=target.dialect),
        profiles=profiles,
        plan=plan,
        inputs=spec.inputs,
        outputs=spec.outputs,
        kv_cache_updates=updates,
        seconds=round(time.monotonic() - started, 3),
        network=network,
        plugin=plugin,
    )
    build = _present(bundle, header)
    build = replace(build, components=build.components | {component: made})
    write_atomic(bundle.path / build_name(target.name), json_from_record(build).encode())
    return BuiltPlan(target.name, component, path, False, made)


def plan_there(
    bundle: Bundle, target: Target, component: str, profiles: tuple[Profile, ...]
) -> BuiltPlan | None:
    """The plan that is there already, from the same files, profiles, TensorRT and target, or None."""
    version = tensorrt_of(target).__version__
    plugin = plugin_of(bundle, target, component, profiles, version)
    known = _present(bundle, build_header(target, version)).components.get(component)
    if known is None or known.plugin != plugin:
        return None
    if not _is_current(bundle, target, component, profiles, known):
        return None
    bundle.graph(component, dialect=target.dialect)  # its files are still those that it was built from
    return BuiltPlan(target.name, component, bundle.path / plan_name(target.name, component), True, known)


def plugin_of(
    bundle: Bundle, target: Target, component: str, profiles: tuple[Profile, ...], version: str
) -> str | None:
    """Load the KV-cache plugin's library that the plan needs, and return its SHA-256.

    None where the target's TensorRT needs no plugin. Raises InputError for a decoder beyond the plugin's
    limits, MissingError when there is no library for this TensorRT.
    """
    spec = bundle.component(component)
    if plugins.needs_plugin(target, spec):
        sizes = {axis: largest(profiles, spec, axis=axis) or 0 for axis in ("B", CAPACITY)}
        plugins.check_limits(bundle.manifest, component, rows=sizes["B"], capacity_tokens=sizes[CAPACITY])
    library = plugins.library_for(target, spec, tensorrt=version)
    if library is None:
        return None
    plugins.load(library)
    return library.sha256


def _graphs(bundle: Bundle, name: str) -> list[str]:
    """The graphs that `name` means: itself, or the parts of a component. Raises UsageError."""
    return [name] if name in bundle.manifest.components else bundle.parts(name)


def _profiles(
    bundle: Bundle, name: str, limits: Limits, given: Mapping[str, tuple[Profile, ...]]
) -> tuple[Profile, ...]:
    """The checked profiles of one component: the given ones, else those that follow from `limits`."""
    spec, model = bundle.component(name), bundle.manifest.model
    profiles = given[name] if name in given else profiles_from_limits(spec, model, limits)
    check_profiles(profiles, spec, model)
    return profiles


def _all_there(
    bundle: Bundle, target: Target, plans: Mapping[str, tuple[Profile, ...]]
) -> dict[str, BuiltPlan] | None:
    """The plans of a target by component, or None if one must be built."""
    found = dict[str, BuiltPlan]()
    for name, profiles in plans.items():
        if (plan := plan_there(bundle, target, name, profiles)) is None:
            return None
        found[name] = plan
    return found


@contextlib.contextmanager
def _locked_folder(bundle: Bundle, target: Target) -> Iterator[None]:
    """Hold the folder of a target's plans for the block. Raises InputError where it cannot be written."""
    folder = bundle.path / "plans" / target.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from None
    with locked(folder / LOCK, what="build"):
        yield


def _present(bundle: Bundle, header: Build) -> Build:
    """The recorded plans of `header`'s target, or `header`, without plans, if they are another machine's."""
    try:
        build = read_build(bundle, header.target)
    except InputError:  # no record, or an unreadable one: the plans are built again
        return header
    return build if replace(build, components={}) == header else header


def _is_current(
    bundle: Bundle, target: Target, component: str, profiles: tuple[Profile, ...], known: PlanSpec
) -> bool:
    """Whether the plan on disk is the recorded one, built from the present files with these profiles."""
    spec = bundle.component(component)
    wanted = (onnx_hashes(bundle, component, dialect=target.dialect), profiles, spec.inputs, spec.outputs)
    if (known.onnx, known.profiles, known.inputs, known.outputs) != wanted:
        return False
    return plan_state(bundle.path, plan_name(target.name, component), known.plan) == "ok"
