"""Counts of what the server did, in the text format that Prometheus reads (version 0.0.4)."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOGETHER = (1, 2, 4, 8, 16, 32, 64)
_HELP = {
    "star_requests_total": ("counter", "requests by path and status"),
    "star_request_seconds": ("histogram", "seconds of a request, waiting included"),
    "star_images_total": ("counter", "images that were drawn"),
    "star_paintings_total": ("counter", "images that the diffusion decoder painted"),
    "star_painting_steps_total": ("counter", "steps of the diffusion decoder"),
    "star_image_tokens_total": ("counter", "image tokens that were drawn"),
    "star_forwards_total": ("counter", "forwards of the decoders"),
    "star_images_together": ("histogram", "images of a batch"),
    "star_answers_total": ("counter", "questions that were answered"),
    "star_answer_tokens_total": ("counter", "tokens of answers"),
    "star_draws_given_up_total": ("counter", "batches and answers that ended because nobody waited"),
    "star_waiting": ("gauge", "images and answers that wait"),
    "star_drawing": ("gauge", "images and answers that are drawn"),
    "star_bodies_bytes": ("gauge", "bytes of bodies in memory"),
}


class Metrics:
    """Counters and histograms; for many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[tuple[str, str], float] = defaultdict(float)
        self._seconds, self._together = Histogram(_SECONDS), Histogram(_TOGETHER)

    def add(self, name: str, count: float = 1, **labels: str | int) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, _labels(labels)] += count

    def request(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered."""
        self.add("star_requests_total", path=path, status=status)
        with self._lock:
            self._seconds.observe(seconds)

    def batch(self, images: int, *, forwards: int, tokens: int) -> None:
        """Count a batch that was drawn."""
        self.add("star_images_total", images)
        self.add("star_image_tokens_total", tokens)
        self.add("star_forwards_total", forwards)
        with self._lock:
            self._together.observe(images)

    def value(self, name: str) -> float:
        """The sum of a counter over its labels."""
        with self._lock:
            return sum(count for (found, _), count in self._counts.items() if found == name)

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything, with the `gauges` of this moment."""
        with self._lock:
            lines = []
            for name, (kind, help) in _HELP.items():
                lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}"]
                if kind == "counter":
                    found = sorted(
                        (labels, n) for (known, labels), n in self._counts.items() if known == name
                    )
                    lines += [f"{name}{labels} {_text(count)}" for labels, count in found] or [f"{name} 0"]
                elif kind == "gauge":
                    lines.append(f"{name} {_text(gauges.get(name, 0))}")
                else:
                    histogram = self._seconds if name == "star_request_seconds" else self._together
                    lines += histogram.lines(name)
        return "\n".join(lines) + "\n"


class Histogram:
    """Counts of values up to each of `bounds`."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[sum(value > bound for bound in self.bounds)] += 1
        self.sum += value

    def lines(self, name: str) -> list[str]:
        """The lines of the text format, whose buckets add up."""
        found, total = [], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], self.counts):
            total += count
            found.append(f'{name}_bucket{{le="{bound}"}} {total}')
        return [*found, f"{name}_sum {_text(self.sum)}", f"{name}_count {total}"]


def _labels(labels: Mapping[str, str | int]) -> str:
    pairs = ",".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{{{pairs}}}" if pairs else ""


def _text(value: float) -> str:
    """Every digit of a value: the rate of a counter is the difference of two of them."""
    return str(int(value)) if value == int(value) else repr(float(value))
