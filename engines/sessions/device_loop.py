"""The decode steps of an image on TensorRT, without the host: its arithmetic is kernels, a step a CUDA graph.

Where each image is, its ids, noise and next inputs are device memory, which the kernels of
engines/tensorrt/loop.cu advance. The host writes the settings of an image, launches, and reads the ids. The
first step is enqueued plainly, because TensorRT needs that before a capture, and because a prefill may have
given its contexts other shapes since the last one. Then a step is captured and launched as often as needed;
with several tokens per step a WHILE node repeats it until all images are done. Where that cannot be captured,
`why` says so, and the host launches as before, but still writes nothing.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingError
from ..tensorrt import device, graphs, nvrtc
from . import Buffer, Session
from .tensorrt import DeviceBuffer

SOURCE = Path(nvrtc.__file__).with_name("loop.cu")
KERNELS = ("advance", "noise", "feed")
THREADS = 256  # kThreads in loop.cu
NOISY, REMAINING, FORWARDS, IMAGES = 4, 5, 6, 7  # places in `state`: State in loop.cu
WHOLE, STEPS, PLAIN = "one CUDA graph per image", "one CUDA graph per step", "without a CUDA graph"


@dataclass(frozen=True)
class Head:
    """The bound image head: `step` computes image_ids [N, D] and embeds [2N, D, H], with noise [N, D, V]."""

    step: Callable[[], None]
    noise: Any
    image_ids: Any
    embeds: Any


@dataclass(frozen=True)
class Decoders:
    """The bound decoders: `steps` in order, and what the first is fed, embeds [2N, W, H], and all are."""

    steps: Sequence[Callable[[], None]]
    embeds: Any
    write_indices: Any
    position_ids: Any


def refusal(buffer: Buffer, *, tokens: int) -> str | None:
    """Why the host must advance a loop of `tokens` tokens on buffers like this one: a session of another
    backend, or kernels that do not compile. None where a DeviceLoop can."""
    if not isinstance(buffer, DeviceBuffer):
        return "the sessions are not TensorRT's"
    if tokens < 2:
        return "one token takes no step"
    try:
        _kernels()
    except MissingError as error:
        return f"{error.what} ({error.where})"
    except RuntimeError as error:
        return str(error)
    return None


def _kernels() -> tuple[nvrtc.Kernel, ...]:
    return nvrtc.kernels_from_source(SOURCE, *KERNELS)  # compiled once per process


class DeviceLoop:
    """Draws `tokens` tokens for N images, W per step, after their prefill, where `refusal` gives None.

    `first` is the head of the first token, after the prefill, and `head` that of all others.
    After `decode`, `forwards` counts the steps, `counts` the host's launches, writes and waits, `how` says
    how the steps were launched, and `why` why not better (None where there is nothing better).
    """

    def __init__(
        self,
        sessions: Sequence[Session],
        decoders: Decoders,
        *,
        first: Head,
        head: Head,
        tokens: int,
        quantiles: np.ndarray,
    ):
        self._advance, self._noise, self._feed = _kernels()
        self._sessions, self._decoders, self._first, self._head = sessions, decoders, first, head
        self.tokens, (self.images, self.window, _) = tokens, head.noise.shape
        self.ids = DeviceBuffer((self.images, tokens), "int64")
        self.state = DeviceBuffer((IMAGES + 4 * self.images,), "int64")
        self.quantiles = DeviceBuffer(quantiles.shape, "float32")
        self.quantiles.write(quantiles)
        self.forwards, self.counts = 0, Counter[str]()
        self.how = PLAIN
        self.why: str | None = None

    def decode(
        self, *, first_slot: int, position: int, seed: int | None, progress: Callable[[str, int, int], None]
    ) -> np.ndarray:
        """Draw image ids int64 [N, T].

        `first_slot` is the first free slot of the caches, and `position` that of the first image token.
        """
        before = Counter(device.counts)
        self._start(first_slot, position, seed)
        self._step()  # plainly: TensorRT needs it before a capture
        with contextlib.ExitStack() as graphs_in_use:
            launch = self._captured(graphs_in_use)
            if self.how == WHOLE:
                launch()
            elif self.window == 1:
                for _ in range(self.tokens - 2):
                    launch()
            else:
                self._in_batches(launch)
            ids, self.forwards = self.ids.read(), int(self.state.read()[FORWARDS])
        self.counts = Counter(device.counts)
        self.counts.subtract(before)
        progress("draw, in tokens", self.tokens, self.tokens)
        return ids

    def _start(self, first_slot: int, position: int, seed: int | None) -> None:
        """Draw the first token of each image, and make what the next step is fed."""
        state = np.zeros(self.state.shape, np.int64)
        seed_words = [(seed or 0) >> shift & (1 << 64) - 1 for shift in (0, 64)]
        state[:2], state[2:4] = (first_slot, position), np.array(seed_words, np.uint64).view(np.int64)
        state[NOISY], state[REMAINING], state[FORWARDS] = seed is not None, self.images, -1
        state[IMAGES + self.images : IMAGES + 2 * self.images] = -1  # windows start before the first token
        self.state.write(state)
        self._launch(self._noise, self._first)
        self._first.step()
        self._take_over(self._first)

    def _step(self, condition: int = 0) -> None:
        for step in self._decoders.steps:
            step()
        self._head.step()
        self._take_over(self._head, condition)

    def _take_over(self, head: Head, condition: int = 0) -> None:
        """Take the draws of `head` over, and prepare the next step."""
        self._launch(self._advance, head, condition)
        self._launch(self._noise, self._head)
        if head.embeds is not self._decoders.embeds:
            self._launch(self._feed, head)

    def _launch(self, kernel: nvrtc.Kernel, head: Head, condition: int = 0) -> None:
        rows, hidden, codebook = 2 * self.images, self._decoders.embeds.shape[-1], head.noise.shape[-1]
        draws = head.noise.shape[1]
        blocks = {
            self._advance: (1, 1),
            self._noise: (-(-codebook // (8 * THREADS)), self.images * draws),
            self._feed: (-(-hidden // THREADS), rows),
        }
        buffers = (
            self.state,
            self.quantiles,
            self.ids,
            self._decoders.write_indices,
            self._decoders.position_ids,
            self._decoders.embeds,
            head.noise,
            head.image_ids,
            head.embeds,
        )
        sizes = (self.images, self.window, self.tokens, hidden, codebook, draws)
        fields = [*sizes, condition, *(buffer.address for buffer in buffers)]  # Loop in loop.cu
        kernel.launch(np.array(fields, np.uint64), blocks=blocks[kernel], threads=THREADS)

    def _captured(self, graphs_in_use: contextlib.ExitStack) -> Callable[[], None]:
        """The function that launches a step, or all of them, in the best way that works: sets `how` and
        `why`.
        """
        self.how, self.why = PLAIN, self._refusal()
        if self.why:
            return self._step
        captures: list[tuple[str, Callable[..., graphs.Graph]]] = [(STEPS, graphs.graph_of)]
        if self.window > 1:
            self.why = graphs.while_refusal()
            if not self.why:
                captures.insert(0, (WHOLE, graphs.while_graph_of))
        for how, capture in captures:
            try:
                graph = capture(self._step)
            except RuntimeError as error:
                self.why = str(error)
                continue
            graphs_in_use.callback(graph.close)
            self.how = how
            return graph.launch
        return self._step

    def _refusal(self) -> str | None:
        """Why TensorRT cannot run a step in a capture; None where it can, or does not say."""
        for session in self._sessions:
            for part in getattr(session, "sessions", [session]):  # of a chain
                if not part.capturable():
                    return f"TensorRT cannot run {part.spec.graph} in a capture"
        return None

    def _in_batches(self, launch: Callable[[], None]) -> None:
        """Launch as many steps as are needed in any case, look, and repeat."""
        known = 2  # after the first step at least
        while known < self.tokens:
            for _ in range(-(-(self.tokens - known) // self.window)):
                launch()
            known = int(self.state.read()[IMAGES : IMAGES + self.images].min())
