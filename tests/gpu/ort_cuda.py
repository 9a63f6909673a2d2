"""STAR-Nano on ONNX Runtime's CUDA provider: placement, ids beside the CPU's, score, CUDA graphs, launches.

Bundles are exported here, from graphs that `tests.gpu.graphs` wrote where STAR_GPU_GRAPHS names their folder.
A bundle that does not load as it is exported is measured with the rewritings of `adapt.py`, and its figures
say so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engines.bench import in_turns

from .bundles import components_of, config_of, graph_of, runtime_of
from .measuring import Parts, check_device, forked, synchronize
from .report import Report

NAME = "ort_cuda"
LIMIT_SECONDS = 140
PRECISIONS = ("bf16", "fp32", "int4", "int8", "fp16")  # most valuable first
SCORE_SECONDS = 30  # 28.6 on an H200
LAYERED = ("base_ar", "stacked_ar", "image_head")
SEED, IMAGES, QUESTIONS = 100, 3, 2
CAPACITY_TOKENS, STEPS, REPEATS = 128, 32, 7
PROMPT_TOKENS, SHORT, LONG = 24, 9, 41  # of the traces: image tokens of the short and the long one


@dataclass(frozen=True)
class Plan:
    """What to measure where: the defaults are the GPU's, the tests take the CPU and a miniature bundle."""

    device: str = "cuda"
    precisions: tuple[str, ...] = PRECISIONS
    bundle: Callable[[str, Path], Path] | None = None  # precision, new folder -> bundle; None exports Nano
    score: bool = True
    limit_seconds: float = LIMIT_SECONDS
    repeats: int = REPEATS

    @property
    def backend(self) -> str:
        return "onnxruntime" if self.device == "cpu" else "onnxruntime-cuda"


def run(folder: Path, report: Report) -> None:
    """The step, each precision in a process of its own. Raises MissingError for what this machine lacks."""
    import onnxruntime  # noqa: F401
    import torch  # noqa: F401  all imported once, before the forks

    import star_export.exporter.export  # noqa: F401

    ends, left = time.monotonic() + LIMIT_SECONDS - 15, len(PRECISIONS)
    for precision in PRECISIONS:
        seconds = (ends - time.monotonic()) / left * (1.5 if left > 1 else 1)
        forked(
            report,
            precision,
            lambda record, p=precision: measure(Plan(precisions=(p,), limit_seconds=seconds), folder, record),
            seconds=max(seconds, 5.0) + 5,
        )
        left -= 1


def measure(plan: Plan, folder: Path, report: Report) -> None:
    """All of `plan`'s precisions. Raises MissingError where ONNX Runtime cannot start the device."""
    if plan.device == "cuda":
        report.fact("ONNX Runtime", check_device())
    parts = Parts(report, limit_seconds=plan.limit_seconds, device=plan.device)
    for precision in plan.precisions:
        Precision(plan, parts, folder, precision).run()


class Precision:
    """One precision of the bundle: `run` measures it, part by part."""

    def __init__(self, plan: Plan, parts: Parts, folder: Path, precision: str):
        self.plan, self.parts, self.report, self.name = plan, parts, parts.report, precision
        self.folder = folder / precision
        self.folder.mkdir(parents=True)

    def run(self) -> None:
        bundle = None
        with self.parts(f"{self.name}: export"):
            started = time.monotonic()
            bundle = (self.plan.bundle or export_nano)(self.name, self.folder / "bundle")
            self.report.fact(f"{self.name}: seconds to export", round(time.monotonic() - started, 1))
        if bundle is None:
            return
        with self.parts(f"{self.name}: operators"):
            self.operators(bundle)
        loads = [self.place(bundle, component, "as exported") for component in components_of(bundle)]
        if not all(loads):
            from .adapt import adapted_bundle

            with self.parts(f"{self.name}: adapted"):
                bundle = adapted_bundle(bundle, self.folder / "adapted")
                loads = [self.place(bundle, component, "adapted") for component in components_of(bundle)]
        label = self.name if "adapted" not in str(bundle.name) else f"{self.name} adapted"
        if not all(loads):
            self.report.not_run(
                "a component does not load on this provider", part=f"{label}: ids, score, time"
            )
            return
        with self.parts(f"{label}: ids"):
            self.ids(bundle, label)
        with self.parts(f"{label}: time"):
            self.time(bundle, label)
        with self.parts(f"{label}: launches"):
            self.launches(bundle, label)
        if self.plan.score and self.parts.enough(f"{label}: score", SCORE_SECONDS):
            with self.parts(f"{label}: score"):
                self.score(bundle, label)

    def operators(self, bundle: Path) -> None:
        """Fact: operators that the device's provider does not take alone, with who does or the refusal; and
        how many it takes."""
        import onnx_ir as ir

        from .operators import operators_of, provider_of

        found = {
            name: model
            for component in components_of(bundle)
            for name, model in operators_of(ir.load(graph_of(bundle, component))).items()
        }
        takers = {name: provider_of(model, device=self.plan.device) for name, model in sorted(found.items())}
        ours = {"cuda": "CUDA", "cpu": "CPU"}[self.plan.device]
        self.report.fact(
            f"{self.name}: operators taken", f"{sum(t == ours for t in takers.values())} of {len(takers)}"
        )
        self.report.fact(
            f"{self.name}: operators not taken by {ours}",
            {name: taker for name, taker in takers.items() if taker != ours},
        )

    def place(self, bundle: Path, component: str, how: str) -> bool:
        """Fact: which provider takes which nodes of a component, as its graph loads; whether it loads."""
        from .operators import placement

        name, loads = f"{self.name} {how}: {component}", False
        try:
            found = placement(graph_of(bundle, component), self.folder, device=self.plan.device)
            loads = True
        except Exception as error:  # the library raises bare exceptions, and the refusal is what is asked for
            found = f"does not load: {' '.join(str(error).split())[:500]}"
        self.report.fact(name, found)
        return loads

    def ids(self, bundle: Path, label: str) -> None:
        """Images and answers of one seed on the device and on the CPU. In float32 they must be the same."""
        with runtime_of(bundle, "onnxruntime") as cpu, runtime_of(bundle, self.plan.backend) as device:
            wanted, got = drawn(cpu), drawn(device)
        same = [
            float(np.mean(a == b)) if a.shape == b.shape else 0.0
            for a, b in zip(wanted["images"], got["images"])
        ]
        self.report.figure(f"{label}: share of image ids equal to the CPU's", same, "", images=len(same))
        answers = [bool(np.array_equal(a, b)) for a, b in zip(wanted["answers"], got["answers"])]
        self.report.fact(f"{label}: answers equal to the CPU's", f"{sum(answers)} of {len(answers)}")
        if self.name == "fp32":
            self.report.check(
                f"{label}: ids equal the CPU's",
                min(same) == 1.0 and all(answers),
                f"images {same}, answers {answers}",
            )

    def time(self, bundle: Path, label: str) -> None:
        """Milliseconds per decode step of one image, with CUDA graphs and without, in turns."""
        from .ort_decode import NO_GRAPH, DecodeStep, open_session

        sessions, captures = {}, True
        for component in LAYERED:
            if self.plan.device == "cuda":
                with self.parts.finding(f"{label}: {component} takes a CUDA graph"):
                    sessions[component] = open_session(
                        graph_of(bundle, component), device=self.plan.device, cuda_graph=True
                    )
            if component not in sessions:
                captures = False
                sessions[component] = open_session(graph_of(bundle, component), device=self.plan.device)
        kinds = {}
        for kind, graph_id in (("CUDA graph off", NO_GRAPH), ("CUDA graph on", "1"))[
            : 1 + (captures and self.plan.device == "cuda")
        ]:
            with self.parts(f"{label}: {kind}"):
                config, dtype = config_of(bundle)
                step = DecodeStep(
                    sessions,
                    config,
                    images=1,
                    positions=1,
                    capacity_tokens=CAPACITY_TOKENS,
                    device=self.plan.device,
                    cache_dtype=dtype,
                    graph_id=graph_id,
                )
                for _ in range(3):
                    step.step(0)
                kinds[kind] = lambda step=step: [step.step(i) for i in range(STEPS)]
        seconds = in_turns(
            kinds, repeats=self.plan.repeats, synchronize=lambda: synchronize(self.plan.device)
        )
        for kind, values in seconds.items():
            self.report.figure(
                f"{label}: decode step, {kind}", [1e3 * value / STEPS for value in values], "ms", rows=2
            )
        if len(seconds) == 2:
            self.report.figure(
                f"{label}: CUDA graph on over off",
                [a / b for a, b in zip(*reversed(list(seconds.values())))],
                "",
            )

    def launches(self, bundle: Path, label: str) -> None:
        """Fact: launches, copies and waits per image token of the runtime's own loop."""
        from engines.inputs.prompt import text_positions
        from engines.sessions import run as run_component

        from .launches import per_step

        with runtime_of(bundle, self.plan.backend) as star:
            ids = np.arange(2 * PROMPT_TOKENS, dtype=np.int64).reshape(2, PROMPT_TOKENS)
            embeds = run_component(star.session("token_embedding"), {"input_ids": ids})["inputs_embeds"]
            loops = {}
            for tokens in (SHORT, LONG):  # all memory is made here, outside of the traces
                loops[tokens] = star.image_loop(num_images=1, length=PROMPT_TOKENS, tokens=tokens)
                loops[tokens].draw(
                    embeds,
                    text_positions(2, PROMPT_TOKENS),
                    guidance=1.1,
                    top_k=100,
                    top_p=0.8,
                    seed=SEED,
                )

            def decode(tokens: int) -> None:
                loops[tokens].slots.rewind(PROMPT_TOKENS)
                loops[tokens].decode(PROMPT_TOKENS, SEED)

            self.report.fact(
                f"{label}: per image token", per_step(decode, self.folder, short=SHORT, long=LONG)
            )

    def score(self, bundle: Path, label: str) -> None:
        """The small benchmark on the device, against what the reference reached on it."""
        from star_export.validator.score import score, shortfalls, shown

        started = time.monotonic()
        outcome = score(bundle, backend=self.plan.backend)
        tasks = {task: shown(outcome.score, task) for task in (*outcome.score.right, "rebuild")}
        self.report.fact(f"{label}: score", tasks | {"seconds": round(time.monotonic() - started, 1)})
        short = shortfalls(outcome.score, outcome.reference)
        self.report.check(
            f"{label}: score within chance of the reference's",
            all(below <= limit for below, limit in short.values()),
            ", ".join(
                f"{task} short by {below:.3f} of {limit:.3f} allowed"
                for task, (below, limit) in short.items()
            ),
        )


def export_nano(precision: str, out: Path) -> Path:
    """Export STAR-Nano, from graphs of STAR_GPU_GRAPHS where they are. Golden tensors, most of an export's
    time, are left out."""
    from unittest import mock

    from star_export.exporter import export as module

    from .graphs import NANO, load_graph

    folder = Path(os.environ.get("STAR_GPU_GRAPHS", "")) / NANO
    graphs = module.graph_from_config
    if "STAR_GPU_GRAPHS" in os.environ and folder.is_dir():

        def graphs(part, config, *, rope_bf16):
            return load_graph(folder / f"{part.name}.onnx")

    with (
        mock.patch.object(module, "graph_from_config", graphs),
        mock.patch.object(
            module.golden, "component_golden", lambda part, oracle, path, before: path.write_bytes(b"")
        ),
        mock.patch.object(module.golden_runs, "run_golden", lambda oracle, path: path.write_bytes(b"")),
    ):
        return module.export(NANO, out=out, precision=precision)


def drawn(star) -> dict[str, list[np.ndarray]]:
    """Ids of some images, one of them an edit, and of some answers, all of one seed."""
    from reference.nano.benchmark import score as benchmark
    from reference.nano.world.draw import images_from_scenes

    prompts = [item.text for item in benchmark.items("generate", 1)[:IMAGES]]
    images = [star.generate(prompt, seed=SEED) for prompt in prompts]
    edit, asked = benchmark.items("edit", 1)[0], benchmark.items("ask", 1)[:QUESTIONS]
    before = images_from_scenes([edit.scene], seed=SEED)[0]
    images.append(star.edit(before, edit.text, seed=SEED))
    answers = [
        star.ask(images_from_scenes([item.scene], seed=SEED)[0], item.text, max_new_tokens=16).ids
        for item in asked
    ]
    return {"images": [image.image_ids for image in images], "answers": answers}
