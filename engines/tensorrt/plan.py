"""Plans on disk: the record of how each one was built, and the checks before TensorRT sees a byte of it.

A plan is executable code, tied to a GPU architecture, a TensorRT version and a system.
`plans/<target>/build.json` records what each plan was built from and for. A plan is used only when all of
that holds on this machine and its SHA-256 is the recorded one.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from .. import plugins
from ..bundle.files import check_relative, open_regular, read_regular, resolve_inside, sha256_from_file
from ..bundle.manifest import FileSpec, TensorSpec
from ..bundle.reader import Bundle
from ..bundle.records import record_from_json
from ..errors import InputError
from ..targets import Target, host_platform, sm_from_capability
from .device import gpus
from .module import tensorrt_of
from .profiles import Profile

SCHEMA = 3  # 2 had no hash of its own
BUILD = "build.json"
OK = "ok"  # the state of a plan that is the recorded one
BUILD_LIMIT_BYTES = 16 << 20


@dataclass(frozen=True)
class PlanSpec:
    """One component's plan.

    `onnx` maps the files that it was built from to their SHA-256. `plugin` is the SHA-256 of the KV-cache
    plugin's library, if the plan contains the plugin. `network` is the SHA-256 of the parsed network, if it
    could be interpreted.
    """

    onnx: dict[str, str]
    profiles: tuple[Profile, ...]
    plan: FileSpec
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    kv_cache_updates: int
    seconds: float
    network: str | None = None
    plugin: str | None = None


@dataclass(frozen=True)
class Build:
    """The contents of `build.json`: the plans of one target, what built them, and for which machine."""

    schema: int
    target: str
    compute_capability: tuple[int, int]
    builder: str
    tensorrt: str
    platform: str
    components: dict[str, PlanSpec]


def build_header(target: Target, version: str) -> Build:
    """A build without plans: what all plans have in common that this machine builds for `target`."""
    return Build(
        schema=SCHEMA,
        target=target.name,
        compute_capability=target.compute_capability,
        builder=target.builder,
        tensorrt=version,
        platform=host_platform(),
        components={},
    )


def plan_name(target: str, component: str) -> str:
    """The plan's file, relative to the bundle."""
    return f"plans/{target}/{component}.plan"


def build_name(target: str) -> str:
    """The record of a target's plans, relative to the bundle."""
    return f"plans/{target}/{BUILD}"


def onnx_hashes(bundle: Bundle, component: str, *, dialect: str = "modern") -> dict[str, str]:
    """The SHA-256 of a component's graph in `dialect` and of its weights, from the manifest."""
    files, graph = bundle.manifest.files, bundle.graph_name(component, dialect=dialect)
    return {name: files[name].sha256 for name in (graph, *bundle.weights(component))}


def read_build(bundle: Bundle, target: str) -> Build:
    """Strictly parse `plans/<target>/build.json`. Raises InputError when it is absent or invalid."""
    relative = build_name(target)
    if not os.path.lexists(bundle.path / relative):
        raise InputError(
            f"There are no plans for {target}",
            where=f"{bundle.path}: expected {relative}, got no file",
            fix=rebuild_command(bundle, target),
        )
    build = build_from_file(resolve_inside(bundle.path, relative, where="plans"))
    if build.target != target:
        raise InputError(
            "These plans were built for another target",
            fix=rebuild_command(bundle, target),
            where=f"{relative}: target: expected {target!r}, got {build.target!r}",
        )
    return build


def build_from_file(path: Path) -> Build:
    """Strictly parse a `build.json`. Raises InputError naming the key."""
    try:
        text = read_regular(path, limit_bytes=BUILD_LIMIT_BYTES, where="plans").decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "This record of plans is not a text file",
            where=f"{path}: expected UTF-8, got {error.reason} at byte {error.start}",
            fix="build the plans again",
        ) from None
    return record_from_json(
        Build,
        text,
        schema=SCHEMA,
        other="These plans were built by another version of star-export",
        fix="build the plans again",
        where=str(path),
    )


def read_plan(bundle: Bundle, target: Target, component: str) -> tuple[PlanSpec, bytes]:
    """The plan of `component` and its bytes, after every check.

    The plan must have been built for this machine's GPU architecture, TensorRT and system; then from the
    bundle's present ONNX files; then with the KV-cache plugin found here, which is loaded; then it must have
    the recorded size and SHA-256. The bytes returned are the bytes that were hashed. Raises InputError, or
    MissingError where nothing can run the plan.
    """
    build, spec = plan_spec(bundle, target.name, component)
    fix = rebuild_command(bundle, target.name)
    check_environment(
        build, sm=gpus()[0].sm, builder=target.builder, version=tensorrt_of(target).__version__, fix=fix
    )
    check_fresh(bundle, component, spec, fix=fix, dialect=target.dialect)
    library = plugins.library_for(target, bundle.component(component), tensorrt=build.tensorrt)
    if library is not None:
        plugins.check_plan_library(library, spec.plugin, where=f"{component} for {target.name}", fix=fix)
        plugins.load(library)
    return spec, plan_bytes(bundle, target.name, component, spec)


def plan_spec(bundle: Bundle, target: str, component: str) -> tuple[Build, PlanSpec]:
    """The build and the record of one plan, from `build.json`.

    Raises UsageError for an unknown component, InputError when its plan was not built.
    """
    bundle.component(component)
    build = read_build(bundle, target)
    if component not in build.components:
        raise InputError(
            f"{component} has no plan for {target}",
            fix=rebuild_command(bundle, target),
            where=f"{bundle.path}: expected one of {', '.join(build.components) or 'none'}, "
            f"got {component!r}",
        )
    return build, build.components[component]


def check_environment(build: Build, *, sm: str, builder: str, version: str, fix: str) -> None:
    """Check that the plans were built for architecture `sm` by `builder` `version` on a system like this one.

    Raises InputError.
    """
    architecture = sm_from_capability(build.compute_capability)
    built = f"{architecture} / {build.builder} {build.tensorrt} / {build.platform}"
    here = f"{sm} / {builder} {version} / {host_platform()}"
    if built != here:
        raise InputError(
            "This plan was built for another machine",
            fix=fix,
            where=f"{build.target}: built for {built}, here {here}",
        )


def check_fresh(bundle: Bundle, component: str, spec: PlanSpec, *, fix: str, dialect: str = "modern") -> None:
    """Check that the plan was built from the bundle's present ONNX files.

    Raises InputError naming the file that changed.
    """
    now = onnx_hashes(bundle, component, dialect=dialect)
    for name in {**now, **spec.onnx}:
        if now.get(name) != spec.onnx.get(name):
            raise InputError(
                "This plan is stale: its ONNX file has changed since it was built",
                fix=fix,
                where=f"{name}: built from sha256 {_prefix(spec.onnx.get(name))}, "
                f"now {_prefix(now.get(name))}",
            )


def plan_bytes(bundle: Bundle, target: str, component: str, spec: PlanSpec) -> bytes:
    """The plan's bytes, read once and checked against the recorded size and SHA-256. Raises InputError."""
    relative, fix = plan_name(target, component), rebuild_command(bundle, target)
    if not os.path.lexists(bundle.path / relative):
        raise InputError(
            "This plan is missing", where=f"{bundle.path}: expected {relative}, got no file", fix=fix
        )
    with open_regular(resolve_inside(bundle.path, relative, where="plans"), where="plans") as file:
        size = os.fstat(file.fileno()).st_size
        if size != spec.plan.size:
            raise InputError(
                "This plan does not have its recorded size",
                fix=fix,
                where=f"{relative}: expected {spec.plan.size} bytes, got {size}",
            )
        data = file.read(size)
    digest = hashlib.sha256(data).hexdigest()
    if digest != spec.plan.sha256:
        raise InputError(
            "This plan is not the one that was built",
            fix=fix,
            where=f"{relative}: expected sha256 {_prefix(spec.plan.sha256)}, got {_prefix(digest)}",
        )
    return data


def rebuild_command(bundle: Bundle, target: str) -> str:
    """The command that builds the plans of `target` again."""
    return f"rebuild: star-export build {bundle.path} --target {target}"


def describe_plans(folder: Path) -> dict:
    """What `inspect` shows of a folder with `build.json`: the build, and each plan's state, I/O and profiles.

    The state is `plan_state`'s. Raises InputError for an invalid build.json.
    """
    build = build_from_file(Path(folder) / BUILD)
    header = {
        "target": build.target,
        "gpu": sm_from_capability(build.compute_capability),
        "tensorrt": f"{build.builder} {build.tensorrt}",
        "platform": build.platform,
    }
    plans = {name: _description(Path(folder), name, spec) for name, spec in build.components.items()}
    return header | {"components": plans}


def plan_state(root: Path, relative: str, spec: FileSpec) -> str:
    """Compare `root/relative` with its record: `ok`, `missing`, `another size` or `another sha256`.

    Raises InputError for a link.
    """
    check_relative(relative, where="plans")
    if not os.path.lexists(root / relative):
        return "missing"
    with open_regular(resolve_inside(root, relative, where="plans"), where="plans") as file:
        if os.fstat(file.fileno()).st_size != spec.size:
            return "another size"
        return OK if sha256_from_file(file) == spec.sha256 else "another sha256"


def _description(folder: Path, name: str, spec: PlanSpec) -> dict:
    def signature(tensor: TensorSpec) -> str:
        return f"{tensor.dtype}[{','.join(map(str, tensor.shape))}]"

    profiles = {
        p.name: {name: {"min": r.min, "opt": r.opt, "max": r.max} for name, r in p.inputs.items()}
        for p in spec.profiles
    }
    return {
        "state": plan_state(folder, f"{name}.plan", spec.plan),
        "bytes": spec.plan.size,
        "sha256": spec.plan.sha256,
        "seconds": spec.seconds,
        "kv_cache_updates": spec.kv_cache_updates,
        "inputs": {t.name: signature(t) for t in spec.inputs},
        "outputs": {t.name: signature(t) for t in spec.outputs},
        "profiles": profiles,
        "onnx": spec.onnx,
    }


def _prefix(digest: str | None) -> str:
    return f"{digest[:16]}..." if digest else "none"
