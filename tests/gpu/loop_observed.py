"""What a loop on the device shows, on any model: its ids, how its steps are launched, what the host does per
token, and its time beside that of the host's loop.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from engines.bench import in_turns
from engines.runtime import decode
from engines.runtime.decode import ImageLoop
from engines.sessions.device_loop import PLAIN, STEPS, WHOLE, DeviceLoop
from engines.tensorrt import device, graphs

from .launches import own_calls_per_step, per_step
from .measuring import Parts

SEED, REPEATS, SHORT = 100, 7, 24
ON_HOST = "the host's loop"


@dataclass(frozen=True)
class Subject:
    """A model to draw with. `loop(tokens)` is a new ImageLoop, `draw(loop)` gives ids int64 [N, T], and
    `again(loop)` repeats the decode steps of the last image.
    """

    label: str
    window: int
    tokens: int
    loop: Callable[[int], ImageLoop]
    draw: Callable[[ImageLoop], np.ndarray]
    again: Callable[[ImageLoop], object]


def on_host(subject: Subject, tokens: int) -> ImageLoop:
    """A loop that the host advances."""
    with mock.patch.object(decode, "refusal", lambda *arguments, **options: "not asked for"):
        return subject.loop(tokens)


@contextlib.contextmanager
def at_most(how: str) -> Iterator[None]:
    """Let steps be launched in no better way than `how`."""
    with contextlib.ExitStack() as patches:
        if how != WHOLE:
            patches.enter_context(mock.patch.object(graphs, "while_refusal", lambda: "not asked for"))
        if how == PLAIN:
            patches.enter_context(mock.patch.object(DeviceLoop, "_refusal", lambda loop: "not asked for"))
        yield


def observe(subject: Subject, wanted: np.ndarray, whose: str, parts: Parts, folder: Path) -> None:
    """Record all of `subject`. `wanted` are the ids int64 [N, T] of `whose`.

    Raises what the loop raises.
    """
    report, label = parts.report, subject.label
    loop = subject.loop(subject.tokens)
    advances = loop.on_device
    report.check(f"{label}: the device advances the loop", advances is not None, loop.on_host_because or "")
    if advances is None:
        return
    reached = []
    for how in (WHOLE, STEPS, PLAIN)[subject.window == 1 :]:
        refusal = graphs.while_refusal() if how == WHOLE else None
        if refusal:
            report.not_run(refusal, part=f"{label}: {how}")
            continue
        with parts(f"{label}: {how}"), at_most(how):
            ids = subject.draw(loop)
            report.check(
                f"{label}: {how} is taken", advances.how == how, advances.why if advances.how != how else ""
            )
            if advances.how == how:
                reached.append(how)
            differing = int((ids != wanted).sum())
            detail = f"{differing} of {wanted.size} differ, {loop.forwards} steps"
            report.check(f"{label}: ids are {whose}, {how}", differing == 0, detail)
    if len(wanted) == 1:  # the host does the same for several images
        with parts(f"{label}: what the host does"):
            calls(subject, parts, folder, advanced=reached[:1])
    with parts(f"{label}: time"):
        times(subject, parts, loop, reached)


def calls(subject: Subject, parts: Parts, folder: Path, *, advanced: list[str]) -> None:
    """Facts: what the host calls per token, in a profiler's trace and through cuda-python, in the best way
    (`advanced`, if there is one) and in the host's loop. Check: with a CUDA graph per image, and per step of
    one token, it neither copies nor waits.
    """
    makers = dict.fromkeys(advanced, subject.loop)
    for how, make in {**makers, ON_HOST: lambda tokens: on_host(subject, tokens)}.items():
        loops = {tokens: make(tokens) for tokens in (SHORT, subject.tokens)}
        for loop in loops.values():
            subject.draw(loop)  # memory is made here, and not in a trace

        def run(tokens: int, loops=loops) -> None:
            subject.again(loops[tokens])

        own = own_calls_per_step(run, short=SHORT, long=subject.tokens)
        parts.report.fact(f"{subject.label}: calls per token, {how}", own)
        traced = per_step(run, folder, short=SHORT, long=subject.tokens)
        parts.report.fact(f"{subject.label}: traced per token, {how}", traced)
        if how == WHOLE or how == STEPS and subject.window == 1:
            found = {kind: max(own[kind], traced[kind]) for kind in ("copies", "fills", "syncs")}
            name = f"{subject.label}: the host neither copies nor waits"
            parts.report.check(name, not any(found.values()), str(found))


def times(subject: Subject, parts: Parts, loop: ImageLoop, ways: list[str]) -> None:
    """Figures: milliseconds per token in each way and in the host's loop, in turns, and how many times as
    long the host's takes.
    """
    host = on_host(subject, subject.tokens)
    subject.draw(host)

    def again(how: str) -> None:
        with at_most(how):
            subject.again(loop)

    kinds: dict[str, Callable[[], object]] = {how: lambda how=how: again(how) for how in ways}
    kinds[ON_HOST] = lambda: subject.again(host)
    seconds = in_turns(kinds, repeats=REPEATS, synchronize=device.synchronize)
    for how, values in seconds.items():
        per_token = [1e3 * value / (subject.tokens - 1) for value in values]
        parts.report.figure(f"{subject.label}: {how}", per_token, "ms", tokens=subject.tokens)
    for how in ways[:1]:
        ratios = [a / b for a, b in zip(seconds[ON_HOST], seconds[how])]
        parts.report.figure(f"{subject.label}: {ON_HOST} over {how}", ratios, "")
