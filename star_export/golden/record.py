"""Record golden tensors: what the reference computes on recorded inputs, stored in the bundle.

The reference computes in float32 with the weights rounded as the bundle stores them, so a correct graph
agrees at rounding level in every precision. A case is one forward call; its keys in the file are
`case/in/name` and `case/out/name`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

from engines.bundle.manifest import GoldenSpec
from engines.bundle.tensors import HANDED_ON, PRESENT, handed_on, present_name
from reference.config import StarConfig
from reference.containers import LazyTensor

from ..components import COMPONENTS, Part, boundary
from ..graph import wrappers
from ..graph.precisions import Precision
from ..tensor_files import save_tensors
from .activations import int8_activations, unrounded
from .compare import compare, tolerance_of
from .feeds import CASES, LARGE, SPECS, Case, rng_of
from .oracle import resident, streamed_star
from .run_case import written_slots


@dataclass(frozen=True)
class Oracle:
    """The reference in float32 and, for a bundle of 16 bits, the same in its compute type (else None).

    `precision` is the bundle's; `spec` says how much is recorded.
    """

    star: wrappers.FoldedStar
    narrow: wrappers.FoldedStar | None
    precision: Precision
    spec: GoldenSpec


def oracle_of(
    config: StarConfig, tensors: Mapping[str, LazyTensor], precision: Precision, *, rope_bf16: bool
) -> Oracle:
    """The oracle of an export in `precision`; it reads weights only while it runs."""
    wide = streamed_star(config, tensors, precision, rope_bf16=rope_bf16)
    return Oracle(
        wide,
        None
        if precision.torch_dtype == torch.float32
        else streamed_star(config, tensors, precision, rope_bf16=rope_bf16, narrow=True),
        precision,
        SPECS[sum(parameter.numel() for parameter in wide.parameters()) > LARGE],
    )


def component_golden(
    part: Part,
    oracle: Oracle,
    path: Path,
    *,
    before: Path | None = None,
    tick: Callable[[], None] = lambda: None,
) -> None:
    """Record every case of one graph or table to `path`.

    For an oracle in 16 bits too, also record the noise of the same module when it computes in that type, and
    for quantised linear layers that of int8 activations; or, where activations are rounded, how far that
    moves the results. The cases of a part take what it is handed from the
    golden tensors of the part before it, at `before`. A stack runs all cases layer by layer, so that its
    weights are read once; `tick` is called after each.
    """
    config = oracle.star.config
    inputs, outputs = boundary(part, config, "float32")
    cases = CASES[part.component](config, rng_of(part.name), oracle.spec, part)
    if before is not None:
        stream = load_file(before)
        for case, feeds in cases.items():
            inputs_before, outputs_before = (
                {key.removeprefix(side): array for key, array in stream.items() if key.startswith(side)}
                for side in (f"{case}/in/", f"{case}/out/")
            )
            feeds |= handed_on(inputs_before, outputs_before)
    run = _layer_by_layer if part.layers else _at_once
    wide, others = run(part, oracle, cases, tick)
    recorded: Case = {}
    for case, feeds in cases.items():
        recorded |= {f"{case}/in/{spec.name}": np.ascontiguousarray(feeds[spec.name]) for spec in inputs}
        recorded |= {f"{case}/out/{spec.name}": wide[case][spec.name] for spec in outputs}
        for kind, results in others.items():
            noise = _noise(results[case], wide[case], feeds, tolerances=COMPONENTS[part.component].tolerances)
            recorded |= {f"{case}/{kind}/{key}": np.array(value, np.float32) for key, value in noise.items()}
    save_tensors(recorded, path)


# By case: in float32, and by kind of noise in another arithmetic.
Results = tuple[dict[str, Case], dict[str, dict[str, Case]]]
NOISE, INT8 = "noise", "int8"  # of the compute type, and of int8 activations
FP4 = "fp4"  # of activations that are not rounded where the reference rounds them


def arithmetic(kind: str, module: nn.Module, name: str, oracle: Oracle) -> contextlib.AbstractContextManager:
    """The context in which `module`, called `name` in the model, computes results of `kind`."""
    if kind == INT8:
        return int8_activations(module, name, oracle.precision)
    return unrounded(module) if kind == FP4 else contextlib.nullcontext()


def stars_of(part: Part, oracle: Oracle) -> dict[str, wrappers.FoldedStar]:
    """Kind of results -> the model that computes them: in float32, and each kind of noise."""
    stars = {"": oracle.star}
    if oracle.narrow:
        stars[NOISE] = oracle.narrow
    formats = [
        oracle.precision.format_of(f"{name}.weight", tuple(linear.weight.shape))
        for name, linear in module_of(part, oracle.star).named_modules(prefix=part.component)
        if isinstance(linear, nn.Linear)
    ]
    if any(found and found.scale for found in formats):
        stars[FP4] = oracle.star
    elif any(formats) and oracle.precision.integers:
        stars[INT8] = oracle.star
    return stars


def module_of(part: Part, star: wrappers.FoldedStar) -> nn.Module:
    """The module of a component; an empty one for a table of `star` that is none of its modules."""
    return dict(star.named_children()).get(part.component, nn.Identity())


def _at_once(part: Part, oracle: Oracle, cases: dict[str, Case], tick: Callable[[], None]) -> Results:
    found: dict[str, dict[str, Case]] = {}
    for kind, star in stars_of(part, oracle).items():
        module = module_of(part, star)
        with arithmetic(kind, module, part.component, oracle):
            found[kind] = {case: outputs_of(part, star, feeds) for case, feeds in cases.items()}
        tick()
    return found.pop(""), found


def _layer_by_layer(part: Part, oracle: Oracle, cases: dict[str, Case], tick: Callable[[], None]) -> Results:
    stars = stars_of(part, oracle)
    found: dict[str, dict[str, Case]] = {kind: {case: {} for case in cases} for kind in stars}
    stream: dict[tuple[str, str], Case] = {(kind, case): {} for kind in stars for case in cases}
    for layer in part.layers or ():
        one = Part(part.name, part.component, range(layer, layer + 1))
        layers = {
            kind: star.get_submodule(f"{part.component}.layers.{layer}") for kind, star in stars.items()
        }
        with resident(*layers.values()):
            for kind, star in stars.items():
                with arithmetic(kind, module_of(part, star), part.component, oracle):
                    for case, feeds in cases.items():
                        results = found[kind][case]
                        stream[kind, case] |= _taken(results)
                        results |= outputs_of(one, star, feeds | stream[kind, case])
        tick()
    for (kind, case), taken in stream.items():  # what the first layer alone gives is handed on unchanged
        for out in {spec.name for spec in boundary(part, oracle.star.config, "float32")[1]}:
            if out not in found[kind][case]:
                found[kind][case][out] = taken[HANDED_ON[out]]
    return found.pop(""), found


def _taken(results: Case) -> Case:
    """Take out of the results of a layer what it hands on, by the names under which the next one takes it."""
    return {into: results.pop(out) for out, into in HANDED_ON.items() if out in results}


def outputs_of(part: Part, star: wrappers.FoldedStar, feeds: Case) -> Case:
    """Run one graph's module of `star`: returns outputs by name in float32 or int64."""
    inputs, outputs = boundary(part, star.config, "float32")
    module, dtype = wrappers.wrapper_of(part, star), star.base_ar.norm.weight.dtype
    given = [torch.from_numpy(feeds[spec.name].copy()) for spec in inputs]
    given = [t.to(dtype) if present_name(spec.name) else t for spec, t in zip(inputs, given, strict=True)]
    with torch.inference_mode():
        results = module(*given)
    results = results if isinstance(results, tuple) else (results,)
    return {
        spec.name: (r if r.dtype == torch.int64 else r.float()).contiguous().numpy()
        for spec, r in zip(outputs, results, strict=True)
    }


def _noise(got: Case, wanted: Case, feeds: Case, *, tolerances: dict[str, float]) -> dict[str, float]:
    """The largest distance of each family of outputs from its float32 values, as `compare` measures it.

    Only of outputs that are not exact; of caches, only the written slots.
    """

    def seen(name: str, array: np.ndarray) -> np.ndarray:
        return (
            written_slots(array, feeds["write_indices"], feeds["inputs_embeds"].shape[1])
            if name.startswith(PRESENT)
            else array
        )

    bounded = [name for name in wanted if tolerance_of(name, tolerances) > 0]
    found = compare(
        {n: seen(n, got[n]) for n in bounded}, {n: seen(n, wanted[n]) for n in bounded}, tolerances=tolerances
    )
    noise: dict[str, float] = {}
    for result in found:
        family = result.tensor.partition(".")[0]
        noise[family] = max(result.value, noise.get(family, 0.0))
    return noise
