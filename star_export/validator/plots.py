"""Plots as SVG text, for a page that has no other file: axes, lines, points and bars, and nothing else.

Colours are classes of the page's style, so that one plot serves light and dark. A plot is drawn narrow, so
that its labels stay readable on a phone. No plotting library is needed at run time: matplotlib would be a
dependency of the device for a dozen lines and rectangles.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 380, 54, 14, 28, 44  # of a plot and its margins, in pixels
COLOURS = 4  # classes c0 to c3 of the style
STYLE = """\
svg{width:100%;height:auto;display:block}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}
svg .small{font-size:11px;fill:var(--soft)}
svg .axis{stroke:var(--line);fill:none}
svg .limit{stroke:var(--bad);stroke-dasharray:5 4;fill:none}
svg .c0{stroke:var(--c0)}svg .c1{stroke:var(--c1)}svg .c2{stroke:var(--c2)}svg .c3{stroke:var(--c3)}
svg .f0{fill:var(--c0)}svg .f1{fill:var(--c1)}svg .f2{fill:var(--c2)}svg .f3{fill:var(--c3)}
svg .bad{fill:var(--bad)}svg .hollow{fill:var(--page)}"""


class Scale:
    """One axis from `low` to `high`, linear or logarithmic. Values outside of it are drawn at its end."""

    def __init__(self, low: float, high: float, *, log: bool = False):
        self.low, self.high, self.log = low, high if high > low else low + 1, log
        if log:
            self.low = 10.0 ** math.floor(math.log10(low))
            self.high = 10.0 ** math.ceil(math.log10(max(high, 10 * self.low)))

    def share(self, value: float) -> float:
        """Where `value` is, from 0 at `low` to 1 at `high`; NaN is at the end, because it is never good."""
        if math.isnan(value):
            return 1.0
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log10(value / self.low) / math.log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """At most seven round numbers."""
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            return [10.0**e for e in range(first, last + 1, max(1, math.ceil((last - first) / 6)))]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


class Plot:
    """A plot with two axes, to which lines, points and columns are added before `svg`."""

    def __init__(self, x: Scale, y: Scale, *, height: int = 230):
        self.x, self.y, self.height = x, y, height
        self.marks: list[str] = []
        self.names: list[tuple[int, str]] = []

    def line(self, points: Sequence[tuple[float, float]], *, name: str = "", colour: int = 0) -> None:
        """Add a line through `points`; with a `name` it gets an entry in the legend."""
        places = " ".join(f"{self._left(x):.1f},{self._top(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline points="{places}" fill="none" stroke-width="1.8" class="c{colour}"/>')
        if name:
            self.names.append((colour, name))

    def point(self, x: float, y: float, says: str, *, filled: bool = True, colour: int = 0) -> None:
        """Add a point; a pointer over it shows what it `says`."""
        fill = f"f{colour}" if filled else "hollow"
        self.marks.append(
            f'<circle cx="{self._left(x):.1f}" cy="{self._top(y):.1f}" r="3.2" class="c{colour} {fill}">'
            f"<title>{_text(says)}</title></circle>"
        )

    def column(self, low: float, high: float, y: float, says: str) -> None:
        """Add a column from `low` to `high` on the x axis, as high as `y`."""
        left, right, top = self._left(low), self._left(high), self._top(y)
        self.marks.append(
            f'<rect x="{left + 0.5:.1f}" y="{top:.1f}" width="{max(right - left - 1, 1):.1f}" '
            f'height="{self.height - BOTTOM - top:.1f}" class="f0"><title>{_text(says)}</title></rect>'
        )

    def limit(self, *, x: float | None = None, y: float | None = None, says: str) -> None:
        """Add a dashed line across the plot at `x` or `y`, with its words."""
        if x is not None:
            left = self._left(x)
            self.marks.append(f'<path d="M{left:.1f},{TOP}V{self.height - BOTTOM}" class="limit"/>')
            anchor = "end" if left > WIDTH / 2 else "start"
            self.marks.append(_words(left + (-5 if anchor == "end" else 5), TOP + 10, anchor, says, "small"))
        if y is not None:
            top = self._top(y)
            self.marks.append(f'<path d="M{LEFT},{top:.1f}H{WIDTH - RIGHT}" class="limit"/>')
            self.marks.append(_words(WIDTH - RIGHT, top - 4, "end", says, "small"))

    def svg(self, title: str, description: str, *, x_label: str, y_label: str) -> str:
        """The plot with its axes, numbers and legend; the words above it are `y_label`."""
        bottom, columns = self.height - BOTTOM, 2 if all(len(name) <= 22 for _, name in self.names) else 1
        rows = math.ceil(len(self.names) / columns)
        parts = [f'<path d="M{LEFT},{TOP}V{bottom}H{WIDTH - RIGHT}" class="axis"/>']
        parts += [_words(4, 12, "start", y_label, "small")]
        for value in self.x.ticks():
            parts.append(_words(self._left(value), bottom + 15, "middle", _number(value), "small"))
        for value in self.y.ticks():
            parts.append(f'<path d="M{LEFT - 4},{self._top(value):.1f}H{LEFT}" class="axis"/>')
            parts.append(_words(LEFT - 7, self._top(value) + 4, "end", _number(value), "small"))
        parts.append(_words((LEFT + WIDTH - RIGHT) / 2, bottom + 33, "middle", x_label, "small"))
        for i, (colour, name) in enumerate(self.names):
            left, top = 8 + (i % columns) * WIDTH / 2, self.height + 8 + 18 * (i // columns)
            parts.append(f'<rect x="{left}" y="{top - 9}" width="10" height="10" class="f{colour}"/>')
            parts.append(_words(left + 15, top, "start", name))
        return _svg(title, description, self.height + 18 * rows + (6 if rows else 0), parts + self.marks)

    def _left(self, x: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * self.x.share(x)

    def _top(self, y: float) -> float:
        return self.height - BOTTOM - (self.height - BOTTOM - TOP) * self.y.share(y)


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    description: str,
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    limit: tuple[float, str] | None = None,
    floor: float = 1e-6,
) -> str:
    """Plot the lines of `series`, name -> points, with `limit` as a dashed line. On a logarithmic axis values
    below `floor` are drawn at it."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points if math.isfinite(y)]
    ends = [*ys, *([limit[0]] if limit else [])] or [1.0]
    low = max(min(ends), floor) if log else 0.0
    plot = Plot(Scale(min(xs), max(xs)), Scale(low, max(*ends, low), log=log))
    for i, (name, points) in enumerate(series.items()):
        plot.line(points, name=name if len(series) > 1 else "", colour=i % COLOURS)
        for x, y in points if len(points) <= 32 else ():
            plot.point(x, y, f"{name}: {_number(x)}: {y:.3g}", colour=i % COLOURS)
    if limit:
        plot.limit(y=limit[0], says=limit[1])
    return plot.svg(title, description, x_label=x_label, y_label=y_label)


def histogram(
    values: Iterable[float], title: str, description: str, *, x_label: str, y_label: str, bins: int = 12
) -> str:
    """Plot how many finite `values` lie in each of `bins` equal ranges from 0 on."""
    found = [value for value in values if math.isfinite(value)]
    width = (max(found, default=1.0) or 1.0) / bins
    counts = [0] * bins
    for value in found:
        counts[min(int(value / width), bins - 1)] += 1
    plot = Plot(Scale(0, width * bins), Scale(0, max(counts)))
    for i, count in enumerate(counts):
        if count:
            plot.column(
                i * width, (i + 1) * width, count, f"{i * width:.3g} to {(i + 1) * width:.3g}: {count}"
            )
    return plot.svg(title, description, x_label=x_label, y_label=y_label)


def bars(
    rows: Sequence[tuple[str, float, str]],
    title: str,
    description: str,
    *,
    scale: Scale,
    limit: float | None = None,
) -> str:
    """Plot horizontal bars, one per (label, value, what stands at its end), each below its label.

    A bar beyond `limit`, or of NaN, is in the colour of a failure.
    """
    left, right, step = 4, WIDTH - 4, 34
    parts = []

    def place(value: float) -> float:
        return left + (right - left) * scale.share(value)

    for i, (label, value, said) in enumerate(rows):
        top = i * step + 14
        fill = "f0" if limit is None or value <= limit else "bad"
        parts += [
            _words(left, top, "start", label),
            _words(right, top, "end", said, "small"),
            f'<rect x="{left}" y="{top + 5}" width="{max(place(value) - left, 1.5):.1f}" height="8" '
            f'class="{fill}"><title>{_text(label)}: {_text(said)}</title></rect>',
        ]
    bottom = len(rows) * step + 4
    parts.append(f'<path d="M{left},{bottom}H{right}" class="axis"/>')
    ticks = scale.ticks()
    for i, value in enumerate(ticks):
        anchor = "start" if i == 0 else "end" if i == len(ticks) - 1 else "middle"
        parts.append(_words(place(value), bottom + 15, anchor, _number(value), "small"))
    if limit is not None:
        parts.append(f'<path d="M{place(limit):.1f},18V{bottom}" class="limit"/>')
    return _svg(title, description, bottom + 22, parts)


def _svg(title: str, description: str, height: float, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img">',
            f"<title>{_text(title)}</title><desc>{_text(description)}</desc>",
            *parts,
            "</svg>",
        ]
    )


def _words(left: float, base: float, anchor: str, text: str, style: str = "") -> str:
    styled = f' class="{style}"' if style else ""
    return f'<text x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}"{styled}>{_text(text)}</text>'


def _number(value: float) -> str:
    return "0" if abs(value) < 1e-12 else f"{value:.3g}"


def _text(value: object) -> str:
    return html.escape(str(value))
