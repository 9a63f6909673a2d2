"""The layers of a plan, as TensorRT logs them when it has compiled one: what was fused, and what was not.

A plan cannot be opened without its device, but the compiler of TensorRT for RTX logs the plan's layers with
the types of what each reads and writes.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TENSOR = re.compile(r"Name: ([^,]+), Dimensions: \[([-\d,]*)\].*?Datatype: (\w+)")
LAYER = re.compile(
    r"Name: ([^,]+), LayerType: (\w+), Inputs: (.*), Constants: (.*), Outputs: (.*), TacticName"
)
# TensorRT ignores every logger of a process after the first, so a plan is compiled in a process of its own.
COMPILE = """
import json, sys
import tensorrt_rtx as trt

class Log(trt.ILogger):
    lines = []
    def __init__(self):
        trt.ILogger.__init__(self)
    def log(self, severity, message):
        self.lines.append(message)

log, given = Log(), json.load(sys.stdin)
builder = trt.Builder(log)
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, log)
assert parser.parse_from_file(given["model"]), parser.get_error(0).desc()
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.__members__[given["sm"]], 0)
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
profile = builder.create_optimization_profile()
for name, ranges in given["ranges"].items():
    profile.set_shape(name, *ranges)
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
print(json.dumps({"lines": log.lines, "bytes": plan.nbytes if plan is not None else 0}))
"""


@dataclass(frozen=True)
class PlanTensor:
    """What a layer of a plan reads or writes; a dynamic size is -1."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PlanLayer:
    """One layer: `kind` is TensorRT's, such as `gemm`; `inputs` are computed, `constants` stored."""

    name: str
    kind: str
    inputs: tuple[PlanTensor, ...]
    constants: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]


@dataclass(frozen=True)
class Compiled:
    """A plan's `layers` and size, or, without one, what the compiler said."""

    layers: tuple[PlanLayer, ...]
    size: int
    log: str


def compiled(model, folder: Path, *, sm: str, ranges: dict[str, list]) -> Compiled:
    """Compile `model`, or the file of one, for the architecture `sm`, such as `SM89`.

    `ranges` maps each input to its smallest, usual and largest shape.
    """
    path = model if isinstance(model, Path) else folder / f"{sm}.onnx"
    if path is not model:
        path.write_bytes(model.SerializeToString())
    given = json.dumps({"model": str(path), "sm": sm, "ranges": ranges})
    done = subprocess.run([sys.executable, "-c", COMPILE], input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    lines = "\n".join(found["lines"])
    layers = [
        PlanLayer(match[1], match[2], *(_tensors(match[i]) for i in (3, 4, 5)))
        for match in LAYER.finditer(lines)
        if match[2] not in ("shape_call", "signal", "wait")
    ]
    return Compiled(tuple(layers), found["bytes"], lines)


def _tensors(text: str) -> tuple[PlanTensor, ...]:
    return tuple(
        PlanTensor(tuple(int(n) for n in sizes.split(",") if n), dtype)
        for _, sizes, dtype in TENSOR.findall(text)
    )


def written_out(plan: Compiled, numbers: int) -> list[PlanTensor]:
    """What the plan computes from constants alone, at every step, of at least so many numbers."""
    return [
        tensor
        for layer in plan.layers
        if not layer.inputs
        for tensor in layer.outputs
        if math.prod(tensor.shape) >= numbers
    ]
