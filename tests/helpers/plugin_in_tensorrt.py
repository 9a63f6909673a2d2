"""What plugins/test_tensorrt.py does with TensorRT for RTX.

Each function runs in a process of its own, because a plugin, once registered, stays until the process ends.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

from engines import plugins
from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.targets import TARGETS
from engines.tensorrt import build, compiler
from engines.tensorrt.module import log_of
from engines.tensorrt.network import network_from_onnx
from engines.tensorrt.profiles import limits_from_options, profiles_from_limits

COMPONENT, CAPACITY = "stacked_ar", 512
CLASSIC = replace(TARGETS["rtx-4090"], name="rtx-4090-classic", dialect="classic")


def plan_of(bundle: str) -> dict:
    """The plan that `star-export build` makes for a target turned classic:
    its record, and the names in its bytes."""
    TARGETS[CLASSIC.name] = CLASSIC
    raised = [1]  # as if TensorRT had timed a layer on write indices of its own
    plugins._LOADED.append(SimpleNamespace(star_plugin_take_overflow=lambda: raised.pop() if raised else 0))
    (result,) = build.build_plans(Bundle.open(Path(bundle)), [CLASSIC.name], capacity_tokens=CAPACITY)
    words = [plugins.NAME, "num_heads", "num_kv_heads", "head_dim", "cache_type", "multiprocessors", "scale"]
    data = result.path.read_bytes()
    plugins.check_overflow()
    return {
        "plugin": result.spec.plugin,
        "library": plugins.find_library().sha256,
        "updates": result.spec.kv_cache_updates,
        "words": [word.encode() in data for word in words],
    }


def compiled(bundle: str, graph: str, rows: str, how: str) -> str:
    """The plan's bytes, or the errors, of compiling a graph with the plugin registered `how`."""
    import tensorrt_rtx as trt

    opened = Bundle.open(Path(bundle))
    spec, model = opened.component(COMPONENT), opened.manifest.model
    derived = profiles_from_limits(
        spec, model, limits_from_options(model, capacity_tokens=CAPACITY, rows=int(rows))
    )
    builder = trt.Builder(log_of(trt))
    if how == "by a registry":
        assert builder.get_plugin_registry().load_library(os.environ[plugins.VARIABLE]) is not None
    else:
        plugins.load(plugins.find_library())
    with log_of(trt).collect() as errors:
        try:
            network, parser = network_from_onnx(trt, builder, Path(graph), capacity_tokens=CAPACITY)
        except InputError as error:
            return str(error)
        sizes = {
            tensor.name: tensor.shape[-1] for tensor in map(network.get_input, range(network.num_inputs))
        }
        profiles = [
            replace(
                p,
                inputs={
                    name: ending(r, sizes[name]) if name.startswith("past") else r
                    for name, r in p.inputs.items()
                },
            )
            for p in derived
        ]
        plan = builder.build_serialized_network(network, compiler._config(trt, builder, CLASSIC, profiles))
    del parser
    return "; ".join(errors) if plan is None else f"{plan.nbytes} bytes"


def ending(ranges, size: int):
    """A cache's range of shapes with rows of `size` numbers."""
    return replace(ranges, **{side: (*getattr(ranges, side)[:-1], size) for side in ("min", "opt", "max")})
