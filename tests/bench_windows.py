"""Several tokens per forward: how many forwards and how much time an image takes, by window.

    python -m tests.bench_windows BUNDLE [--prompts 50] [--edits 20] [--top-k 1000 --top-p 0.8 --cfg 1.1]
    python -m tests.bench_windows BUNDLE --guesses          (other guesses for tokens that were never drawn)
    python -m tests.bench_windows BUNDLE --answers          (the same idea for answers in text)
    python -m tests.bench_windows --synthetic               (logits as STAR's settings leave them, no model)

BUNDLE is one of STAR-Nano; the prompts and edits are held-out ones of its benchmark. Images are drawn with
each window in turns, on the CPU, and their ids are compared with those of one token per forward. This is a
benchmark, not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from unittest import mock

import numpy as np

from engines.inputs.preprocess import ask_inputs
from engines.inputs.prompt import Prompt
from engines.runtime import decode
from engines.runtime.gumbel import gumbel_noise
from engines.runtime.kv_cache import Slots, cache_buffers
from engines.runtime.prefill import prefill
from engines.runtime.sampler import penalise_repetition
from engines.runtime.star import Star
from engines.runtime.windows import Windows
from engines.sessions import run
from reference.nano.benchmark.score import CATEGORIES, items
from reference.nano.world.draw import images_from_scenes

WINDOWS = (1, 2, 4, 8, 16, 32)
Task = Callable[[Star, int], np.ndarray]  # star, index -> image ids [1, T]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_windows", description=__doc__.split("\n")[0])
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--edits", type=int, default=20)
    parser.add_argument("--cfg", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--guesses", action="store_true")
    parser.add_argument("--answers", action="store_true")
    parser.add_argument("--synthetic", action="store_true")
    options = parser.parse_args()
    if options.synthetic:
        synthetic()
        return 0
    if options.answers:
        answers(options.bundle)
        return 0
    settings = {"cfg": options.cfg, "top_k": options.top_k, "top_p": options.top_p}
    if options.guesses:
        for name, guess in GUESSES.items():
            with mock.patch.object(Windows, "_guess", guess):
                for task, (count, draw) in tasks(options, settings).items():
                    print(f"{name}: ", end="")
                    compare(options.bundle, task, count, draw, windows=(1, 8, 16))
        return 0
    for task, (count, draw) in tasks(options, settings).items():
        compare(options.bundle, task, count, draw, windows=WINDOWS)
    return 0


def tasks(options: argparse.Namespace, settings: dict) -> dict[str, tuple[int, Task]]:
    """Task -> how many images, and what draws one."""
    prompts = every("generate", options.prompts)
    edits = every("edit", options.edits)
    given = images_from_scenes([item.scene for item in edits], seed=1)
    return {
        "generate": (
            len(prompts),
            lambda star, i: star.generate(prompts[i].text, seed=i, **settings).image_ids,
        ),
        "edit": (
            len(edits),
            lambda star, i: star.edit(given[i], edits[i].text, seed=i, **settings).image_ids,
        ),
    }


def every(task: str, count: int) -> list:
    """`count` held-out items of a task, of its categories in turn."""
    kinds = len(CATEGORIES[task])
    found = items(task, -(-count // kinds))
    each = len(found) // kinds
    return [found[kind * each + i] for i in range(each) for kind in range(kinds)][:count]


def compare(bundle: str, task: str, count: int, draw: Task, *, windows: tuple[int, ...]) -> None:
    """Draw all images with each window in turns and print a row for each."""
    stars = {window: Star(bundle, window=window) for window in windows}
    forwards: dict[int, list[int]] = {window: [] for window in windows}
    seconds: dict[int, list[float]] = {window: [] for window in windows}
    ids: dict[int, list[np.ndarray]] = {window: [] for window in windows}
    for star in stars.values():
        draw(star, 0)
    for i in range(count):
        for window, star in stars.items():
            with counted() as loops:
                started = time.perf_counter()
                ids[window].append(draw(star, i))
                seconds[window].append(time.perf_counter() - started)
            forwards[window].append(loops[0].forwards)
    print(f"{task}, {count} images")
    print("| window | forwards | of one token each | seconds per image | of one token each | same ids |")
    print("|---|---|---|---|---|---|")
    for window in windows:
        same = sum(np.array_equal(a, b) for a, b in zip(ids[window], ids[windows[0]]))
        fewer = statistics.mean(forwards[windows[0]]) / statistics.mean(forwards[window])
        faster = statistics.median(a / b for a, b in zip(seconds[windows[0]], seconds[window]))
        print(
            f"| {window} | {statistics.mean(forwards[window]):.1f} | {fewer:.2f}x fewer "
            f"| {statistics.median(seconds[window]):.3f} | {faster:.2f}x faster | {same} of {count} |"
        )
    sys.stdout.flush()
    for star in stars.values():
        star.close()


class counted(list):
    """Collects the image loops that are made while it is entered."""

    def __enter__(self):
        made, plain = self, decode.ImageLoop.draw

        def draw(loop, *given, **named):
            made.append(loop)
            return plain(loop, *given, **named)

        self.patch = mock.patch.object(decode.ImageLoop, "draw", draw)
        self.patch.start()
        return self

    def __exit__(self, *exception) -> None:
        self.patch.stop()


def last(windows: Windows, drawn: np.ndarray) -> None:
    for ids, first in zip(windows.ids, drawn):
        ids[first:] = ids[first - 1]


def above(windows: Windows, drawn: np.ndarray) -> None:
    row = int(windows.tokens**0.5)
    for ids, first in zip(windows.ids, drawn):
        for at in range(first, windows.tokens):
            ids[at] = ids[max(at - row, 0)]


PREVIOUS: dict[int, np.ndarray] = {}  # by window: the image that it drew before


def previous(windows: Windows, drawn: np.ndarray) -> None:
    """The image drawn before; the last id for the first one."""
    last(windows, drawn)
    for ids, first in zip(windows.ids, drawn):
        if windows.window in PREVIOUS:
            ids[first:] = PREVIOUS[windows.window][first:]
        if first >= windows.tokens:
            PREVIOUS[windows.window] = ids.copy()


GUESSES = {"last id": last, "id above": above, "previous image": previous}


def answers(bundle: str, *, count: int = 60, window: int = 4) -> None:
    """How many forwards greedy answers would take with windows: no noise, and the repetition penalty of the
    prefix with its guesses."""
    print("| task | answers | tokens of an answer | forwards, one token each | forwards, window 4 |")
    print("|---|---|---|---|---|")
    with Star(bundle, window=1) as star:
        chat, limit = star.chat, 48
        for task in ("ask", "reason"):
            found = every(task, count)
            given = images_from_scenes([item.scene for item in found], seed=1) if task == "ask" else []
            tokens, forwards = [], []
            for i, item in enumerate(found):
                vision = None
                if task == "ask":
                    vision = ask_inputs(given[i], star.model)
                    prompt = chat.ask_prompt(item.text, grid_h=vision.grid_h, grid_w=vision.grid_w)
                else:
                    prompt = chat.question_prompt(item.text)
                forward = Answering(star, prompt, star.embedded(prompt, vision=vision), limit)
                one, more = (windowed(forward, limit, width, star.model.tokens.eos) for width in (1, window))
                assert one[0] == more[0]
                tokens.append(len(one[0]))
                forwards.append((one[1], more[1]))
            one, more = np.mean(forwards, axis=0)
            print(f"| {task} | {len(found)} | {np.mean(tokens):.1f} | {one:.1f} | {more:.1f} |", flush=True)


def windowed(forward: Answering, limit: int, width: int, eos: tuple[int, ...]) -> tuple[list[int], int]:
    """The ids of an answer and the forwards after the prefill, `width` tokens per forward."""
    windows = Windows(np.array([forward.first()]), tokens=limit, window=width)
    while True:
        known = windows.ids[0, : windows.known[0]].tolist()
        ends = [at for at, token in enumerate(known) if token in eos]
        if ends or windows.done:
            return known[: ends[0] + 1] if ends else known, windows.forwards
        windows.advance(forward(windows))


class Answering:
    """The forwards of one answer on the runtime's sessions."""

    def __init__(self, star: Star, prompt: Prompt, embeds: np.ndarray, limit: int):
        self.star, self.length = star, prompt.input_ids.shape[1]
        self.ids, self.position = prompt.input_ids[0], int(prompt.position_ids.max()) + 1
        base = star.session("base_ar")
        self.slots = Slots(self.length + limit)
        caches = cache_buffers(base, rows=1, capacity_tokens=self.length + limit)
        self.decoders = [(base, caches)]
        self.hidden = prefill(self.decoders, embeds, prompt.position_ids, self.slots)

    def first(self) -> int:
        return self._id(self.hidden, [])

    def __call__(self, windows: Windows) -> np.ndarray:
        start, fed = int(windows.starts[0]), windows.fed()
        embeds = run(self.star.session("token_embedding"), {"input_ids": fed})["inputs_embeds"]
        ids = windows.ids[0].tolist()
        drawn = []
        for i in range(windows.window):  # position by position: only the count of forwards matters here
            self.slots.used_tokens = self.length + start + i
            at = np.full((3, 1, 1), self.position + start + i)
            hidden = prefill(self.decoders, embeds[:, i : i + 1], at, self.slots)
            drawn.append(self._id(hidden, ids[: start + i + 1]))
        return np.array([drawn])

    def _id(self, hidden: np.ndarray, ids: list[int]) -> int:
        logits = run(self.star.session("text_head"), {"hidden_states": hidden})["logits"][0].copy()
        seen = np.concatenate([self.ids, np.array(ids, np.int64)])
        penalise_repetition(logits, seen, self.star.model.repetition_penalty)
        return int(logits.argmax())


def synthetic(*, size: int = 4096, tokens: int = 256, window: int = 16, images: int = 3) -> None:
    """Tokens per forward of a made-up model, by how much one token changes the distribution of the next ones.

    Logits are normal numbers whose spread leaves several hundred ids after top-k 1000 and top-p 0.8, plus a
    part that the tokens before decide, which fades with their distance. `change` is the total variation by
    which another id of the token before changes a distribution.
    """
    print("| kept ids | change | tokens per forward, window 16 | same id if the token before is wrong |")
    print("|---|---|---|---|")
    for strength in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6):
        rng = np.random.default_rng(3)
        base = rng.standard_normal((tokens, size), dtype=np.float32) * 1.2
        effect = rng.standard_normal((size, size), dtype=np.float32)

        def filtered(ids: np.ndarray, at: int) -> np.ndarray:
            logits = base[at].copy()
            for back in range(1, min(4, at) + 1):
                logits += strength * 0.5 ** (back - 1) * effect[ids[at - back]]
            order = np.argsort(-logits)[:1000]
            shares = np.exp(logits[order] - logits[order[0]])
            shares /= shares.sum()
            keep = order[: int((np.cumsum(shares) <= 0.8).sum()) + 1]
            found = np.full(size, -np.inf, np.float32)
            found[keep] = logits[keep]
            return found

        forwards, kept, changes, same = [], [], [], []
        for image in range(images):
            noise = gumbel_noise(image, image=0, steps=range(tokens), size=size)
            windows = Windows(np.array([noise[0].argmax()]), tokens=tokens, window=window)
            while not windows.done:
                start = int(windows.starts[0])
                ats = range(start + 1, start + 1 + windows.window)
                windows.advance(
                    np.array([[(filtered(windows.ids[0], at) + noise[at]).argmax() for at in ats]])
                )
            forwards.append(windows.forwards)
            ids = windows.ids[0]
            for at in range(8, tokens, 16):
                other = ids.copy()
                other[at - 1] = rng.integers(size)
                one, two = filtered(ids, at), filtered(other, at)
                p, q = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (one, two))
                kept.append((p > 0).sum())
                changes.append(np.abs(p - q).sum() / 2)
                same.append((one + noise[at]).argmax() == (two + noise[at]).argmax())
        print(
            f"| {np.mean(kept):.0f} | {np.mean(changes):.2f} "
            f"| {(tokens - 1) / np.mean(forwards):.2f} | {np.mean(same):.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
