"""The loop on the device with plans of STAR-Nano, which are built here: a part of the step `device_loop`."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from engines.bundle.reader import Bundle
from engines.errors import MissingError
from engines.runtime.star import Star
from engines.targets import TARGETS, Target, host_platform
from engines.tensorrt import device
from engines.tensorrt.build import build_plans
from engines.tensorrt.module import tensorrt_of

from .loop_observed import SEED, Subject, observe, on_host
from .measuring import Parts, words
from .report import Report

COMPONENTS = ("base_ar", "stacked_ar", "image_head")  # of a step
PROMPT = "a green triangle to the left of a purple circle on a white background"
PRECISION = "bf16"  # plans have 16 bits or fewer
CAPACITY_TOKENS, PREFILL_TOKENS, ROWS = 128, 32, 4
SHAPES = ((1, 1), (1, 16), (2, 1), (2, 16))  # images, window


def plans(folder: Path, report: Report, *, seconds: float) -> None:
    """Build plans of STAR-Nano for this device, and observe the loop on them. What is missing is the reason
    why this part is not run.
    """
    try:
        target = target_here()
    except (ImportError, MissingError) as error:
        report.not_run(words(error), part="plans")
        return
    module = tensorrt_of(target)
    report.fact("TensorRT", f"{target.builder} {module.__version__}, for {target.name}")
    flag = hasattr(module.BuilderFlag, "REQUIRE_USER_ALLOCATION")
    report.fact("REQUIRE_USER_ALLOCATION", "set" if flag else "not in this TensorRT")
    parts, bundle = Parts(report, limit_seconds=seconds, device="cuda"), None
    with parts("plans: export and build"):
        bundle, started = exported(folder), time.monotonic()
        built(bundle, target)
        report.figure("plans: build", [time.monotonic() - started], "s", components=list(COMPONENTS))
    if bundle is None:
        return
    wanted: dict[int, np.ndarray] = {}
    with parts("plans: the CPU's ids"), Star(bundle, backend="onnxruntime") as cpu:
        wanted |= {images: drawn_on_cpu(cpu, images) for images in {images for images, _ in SHAPES}}
    with parts("plans"), Star(bundle, backend=f"tensorrt:{target.name}") as star:
        for images, window in SHAPES:
            label = f"plans N{images} W{window}"
            with parts(label):
                observed(star, label, images, window, wanted.get(images), parts, folder)


def target_here() -> Target:
    """The first target of this chip's architecture. Raises MissingError without a GPU, for an architecture
    that no target has, and without the target's TensorRT.
    """
    gpu = device.gpus()[0]
    rows = [
        row
        for row in TARGETS.values()
        if row.compute_capability == gpu.compute_capability and host_platform() in row.platforms
    ]
    if not rows:
        raise MissingError(
            "No target has this architecture",
            where=f"{gpu.name}: expected one of star-export targets, got {gpu.sm} on {host_platform()}",
            fix="none",
        )
    tensorrt_of(rows[0])
    return rows[0]


def exported(folder: Path) -> Path:
    """STAR-Nano's bundle, without golden tensors."""
    from .ort_cuda import export_nano

    return export_nano(PRECISION, folder / "bundle")


def built(bundle: Path, target: Target) -> None:
    """The plans of a step. Raises what `build_plans` does."""
    limits = {"capacity_tokens": CAPACITY_TOKENS, "prefill_tokens": PREFILL_TOKENS, "rows": ROWS}
    build_plans(Bundle.open(bundle), [target.name], components=list(COMPONENTS), **limits)


def subject_of(star: Star, label: str, images: int, window: int) -> Subject:
    """STAR on `star`'s backend, with the sampling that it ships with."""
    prompt, sampling = star.chat.generate_prompt(PROMPT, num_images=images), star.model.sampling.generate
    embeds, length = star.embedded(prompt), prompt.input_ids.shape[1]
    top_k = min(sampling.top_k, star.model.codebook_size)
    settings = {"guidance": sampling.guidance, "top_k": top_k, "top_p": sampling.top_p, "seed": SEED}

    def loop(tokens: int):
        star.window = window
        return star.image_loop(num_images=images, length=length, tokens=tokens)

    def again(loop) -> None:
        loop.slots.rewind(length)
        loop.decode(int(prompt.position_ids.max()) + 1, SEED)

    return Subject(
        label,
        window,
        star.model.image_tokens,
        loop,
        lambda loop: loop.draw(embeds, prompt.position_ids, **settings),
        again,
    )


def drawn_on_cpu(star: Star, images: int) -> np.ndarray:
    """The ids int64 [N, T] that ONNX Runtime's CPU draws, one token per step."""
    subject = subject_of(star, "CPU", images, 1)
    return subject.draw(subject.loop(subject.tokens))


def observed(
    star: Star, label: str, images: int, window: int, cpu: np.ndarray | None, parts: Parts, folder: Path
) -> None:
    """Observe a shape: its ids must be those of the host's loop on the same plans, and TensorRT must say that
    its steps can be captured, if it says anything. Figure: the share of those of the CPU, ids [N, T] `cpu`
    where they are known; it rounds differently.
    """
    subject = subject_of(star, label, images, window)
    wanted = subject.draw(on_host(subject, subject.tokens))
    if cpu is not None:
        shares = [float(np.mean(a == b)) for a, b in zip(wanted, cpu)]
        parts.report.figure(f"{label}: share of ids equal to the CPU's", shares, "", images=images)
    for name in COMPONENTS:
        session = star.session(name)
        says = hasattr(session._last.trt_context, "is_stream_capturable")
        detail = "" if says else "this TensorRT does not say"
        parts.report.check(f"{label}: {name} can be captured", session.capturable(), detail)
    observe(subject, wanted, "the host's loop's", parts, folder)
