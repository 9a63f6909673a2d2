"""One question to TensorRT for RTX in a process of its own, since its answer may be a crash:

    python -m tests.gpu.rtx_probe build BUNDLE COMPONENT CAPABILITY PLAN
    python -m tests.gpu.rtx_probe load BUNDLE COMPONENT CAPABILITY PLAN

prints one line of JSON: how far it came, and all that the library said on the way.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines import targets
from engines.bundle.manifest import ComponentSpec
from engines.bundle.reader import Bundle
from engines.bundle.tensors import bound_tensors, shape_from_symbols
from engines.sessions.tensorrt import TensorRTSession
from engines.tensorrt import compiler
from engines.tensorrt import module as trt
from engines.tensorrt.network import network_from_onnx
from engines.tensorrt.profiles import Profile, largest, limits_from_options, profiles_from_limits

SAID_LIMIT = 40  # lines of the library's log that are kept
CAPACITY_TOKENS, ROWS, TOKENS = 128, 2, 4


@dataclass(frozen=True)
class Foreign(targets.Target):
    """A target that the device table has not: plans compiled for `capability` (SM80, CURRENT), to run on
    this `compute_capability`.
    """

    capability: str = ""

    @property
    def sm(self) -> str:
        return self.capability


def foreign_target(capability: str, *, here: tuple[int, int]) -> Foreign:
    """The row for plans of `capability` on a GPU of `here`: else as an A100's."""
    row = targets.TARGETS["a100"]
    fields = {name: getattr(row, name) for name in row.__dataclass_fields__}
    return Foreign(
        **fields | {"name": f"rtx-{capability.lower()}", "compute_capability": here}, capability=capability
    )


def log_of(module, said: list[str]):
    """A logger of every line up to INFO. It must be the process's first: TensorRT keeps that one."""

    class Log(module.ILogger):
        def __init__(self):
            module.ILogger.__init__(self)

        def log(self, severity, message):
            if severity <= module.ILogger.Severity.INFO and len(said) < SAID_LIMIT:
                said.append(f"{getattr(severity, 'name', severity)}: {' '.join(message.split())}")

    return Log()


def build(module, log, bundle: Bundle, component: str, capability: str, path: Path) -> dict:
    """Compile a component for `capability` into `path`."""
    spec, profiles, target = (
        bundle.component(component),
        profiles_of(bundle, component),
        foreign_target(capability, here=(0, 0)),
    )
    builder = module.Builder(log)
    network, parser = network_from_onnx(
        module, builder, bundle.graph(component), capacity_tokens=largest(profiles, spec, axis="C")
    )
    plan = builder.build_serialized_network(network, compiler._config(module, builder, target, profiles))
    del parser
    if plan is None:
        return {"answer": "no plan"}
    path.write_bytes(plan)
    return {"answer": "a plan", "bytes": plan.nbytes}


def profiles_of(bundle: Bundle, component: str) -> tuple[Profile, ...]:
    model = bundle.manifest.model
    return profiles_from_limits(
        bundle.component(component),
        model,
        limits_from_options(model, capacity_tokens=CAPACITY_TOKENS, rows=ROWS),
    )


def load(module, log, bundle: Bundle, component: str, capability: str, path: Path) -> dict:
    """What the library thinks of a plan, whether it loads it, and what one step on random numbers gives."""
    runtime, data = module.Runtime(log), path.read_bytes()
    validity, bits = runtime.get_engine_validity(data)
    found = {"validity": validity.name, "diagnostics": names_of(module, int(bits)), "answer": "refused"}
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        return found
    found["answer"] = "loaded"
    print(json.dumps(found), flush=True)  # what follows may crash
    session = TensorRTSession(
        module, engine, bundle.component(component), profiles_of(bundle, component), keep=runtime
    )
    output = one_step(session, session.spec)
    return found | {
        "answer": "ran",
        "finite": bool(np.isfinite(output).all()),
        "largest": float(np.abs(output).max()),
    }


def names_of(module, bits: int) -> list[str]:
    """The diagnostics in a mask."""
    return [
        name for name, member in module.EngineInvalidityDiagnostics.__members__.items() if bits & int(member)
    ]


def one_step(session, spec: ComponentSpec) -> np.ndarray:
    """Run once, on random numbers and indices of 0; the first output."""
    rng = np.random.default_rng(0)
    sizes = {"B": ROWS, "S": TOKENS, "C": CAPACITY_TOKENS, "N": 1, "P": 16}
    buffers = {
        t.name: session.buffer(shape_from_symbols(t.shape, sizes), t.dtype) for t in bound_tensors(spec)
    }
    for tensor in spec.inputs:
        if tensor.dtype in ("float32", "float16"):
            buffers[tensor.name].write(rng.standard_normal(buffers[tensor.name].shape).astype(tensor.dtype))
    session.bind(buffers)()
    return buffers[spec.outputs[0].name].read()


def main(verb: str, bundle: str, component: str, capability: str, plan: str) -> None:
    said: list[str] = []
    module = trt.tensorrt_of(targets.TARGETS["a100"])
    log = log_of(module, said)
    found: dict = {"answer": "raised"}
    try:
        found = {"build": build, "load": load}[verb](
            module, log, Bundle.open(Path(bundle)), component, capability, Path(plan)
        )
    except Exception as error:  # the answer is wanted, whatever it is
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
    print(json.dumps(found | {"said": said, "version": module.__version__}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
