"""The kernels of loop.cu beside what they are, `Windows` and `Noise`: on a GPU, or on emulated blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from engines.runtime.gumbel import Noise, quantiles
from engines.runtime.windows import Windows
from engines.sessions.device_loop import IMAGES, REMAINING, Decoders, DeviceBuffer, DeviceLoop, Head

Compared = tuple[str, np.ndarray, np.ndarray]


def compared(
    rng: np.random.Generator, *, images: int, window: int, tokens: int, codebook: int, seed: int | None
) -> Iterator[Compared]:
    """Walk through the steps of an image whose draws are random, mostly what the window was fed, so that
    images come at their own pace.

    Yields ("kernel: what it made", got, wanted) for all that the kernels write, after each step.
    """
    hidden, slot, position = int(rng.integers(1, 300)), int(rng.integers(100)), int(rng.integers(1000))
    table = rng.standard_normal((5, hidden)).astype(np.float32)
    loop, first, main, decoders = loop_without_model(
        images=images, window=window, tokens=tokens, codebook=codebook, hidden=hidden
    )
    embeds = decoders.embeds

    def draw(head: Head, ids: np.ndarray) -> None:
        head.image_ids.write(ids)
        head.embeds.write(np.repeat(table[ids], 2, axis=0))

    drawn = rng.integers(0, 5, (images, 1))
    draw(first, drawn)
    loop._start(slot, position, seed)  # the head's step leaves what was drawn
    if first is not main:
        noise = Noise(seed or 0, images=images, window=1, size=codebook)
        yield (
            "noise: of the first token",
            first.noise.read(),
            _noise(noise, np.zeros(images, np.int64), seed),
        )
    windows = Windows(drawn[:, 0], tokens=tokens, window=window)
    noise = Noise(seed or 0, images=images, window=window, size=codebook)
    while True:
        state, starts = loop.state.read(), windows.starts.repeat(2)
        places = position + starts[:, None] + np.arange(window)
        left = int((windows.known < tokens).sum())
        yield "advance: ids", loop.ids.read(), windows.ids
        yield "advance: places", state[IMAGES:][: 2 * images], np.append(windows.known, windows.starts)
        yield "advance: counts", state[REMAINING : REMAINING + 2], np.array([left, windows.forwards])
        yield "advance: write indices", decoders.write_indices.read(), slot + starts
        yield "advance: positions", decoders.position_ids.read(), np.broadcast_to(places, (3, *places.shape))
        yield "noise: of a step", main.noise.read(), _noise(noise, windows.starts + 1, seed)
        if window > 1:  # with one token, the head writes where the decoder reads
            yield "feed: rows", embeds.read(), np.repeat(table[windows.fed()], 2, axis=0)
        if windows.done:
            return
        drawn = np.concatenate([windows.fed()[:, 1:], rng.integers(0, 5, (images, 1))], axis=1)
        drawn = np.where(rng.random(drawn.shape) < 0.3, rng.integers(0, 5, drawn.shape), drawn)
        draw(main, drawn)
        loop._take_over(main)
        windows.advance(drawn)


def loop_without_model(
    *, images: int, window: int, tokens: int, codebook: int, hidden: int
) -> tuple[DeviceLoop, Head, Head, Decoders]:
    """(a loop whose decoders and heads do nothing, the head of its first token, that of the others, what the
    decoders are fed).
    """
    rows = 2 * images
    embeds = DeviceBuffer((rows, window, hidden), "float32")

    def head(draws: int) -> Head:
        noise = DeviceBuffer((images, draws, codebook), "float32")
        own = embeds if window == 1 else DeviceBuffer((rows, draws, hidden), "float32")
        return Head(lambda: None, noise, DeviceBuffer((images, draws), "int64"), own)

    main = head(window)
    first = main if window == 1 else head(1)
    decoders = Decoders((), embeds, DeviceBuffer((rows,), "int64"), DeviceBuffer((3, rows, window), "int64"))
    loop = DeviceLoop((), decoders, first=first, head=main, tokens=tokens, quantiles=quantiles())
    return loop, first, main, decoders


def equal(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether two arrays are the same, bit for bit."""
    return (got.shape, got.dtype) == (wanted.shape, wanted.dtype) and got.tobytes() == wanted.tobytes()


def _noise(noise: Noise, steps: np.ndarray, seed: int | None) -> np.ndarray:
    """The noise for the steps from `steps` [N] on; zeros without a seed."""
    rows = noise.at(steps)
    return rows if seed is not None else np.zeros_like(rows)
