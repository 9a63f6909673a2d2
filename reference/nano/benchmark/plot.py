"""Charts and image grids as PNG, with Pillow alone."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

WIDTH, HEIGHT, MARGIN = 460, 280, 46  # of a chart, in pixels
LETTER, LINE, GAP = 6.5, 12, 8  # of a grid's captions, in pixels: width of a letter, height of a line, space
INKS = (
    (31, 119, 180),
    (214, 39, 40),
    (44, 160, 44),
    (148, 103, 189),
    (255, 127, 14),
    (23, 190, 207),
    (140, 86, 75),
)
Series = dict[str, list[tuple[float, float]]]  # name -> points


def chart(title: str, series: Series, *, x_label: str = "", logarithmic: bool = False):
    """One line chart with its own scale as a Pillow image; `logarithmic` concerns the x axis."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    along, back = (math.log, math.exp) if logarithmic else (float, float)
    points = [(along(x), y) for line in series.values() for x, y in line]
    (left, bottom), (right, top) = (tuple(f(p[axis] for p in points) for axis in (0, 1)) for f in (min, max))
    wide, high = (right - left) or 1.0, (top - bottom) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + (x - left) / wide * (WIDTH - MARGIN - 12),
            HEIGHT - 30 - (y - bottom) / high * (HEIGHT - 60),
        )

    for share in (0, 0.5, 1):
        y = bottom + share * high
        pen.line([place(left, y), place(right, y)], fill=(220, 220, 220))
        pen.text((4, place(left, y)[1] - 6), f"{y:.3g}", fill="black")
        x = left + share * wide
        label = f"{back(x):.0f}" if back(x) >= 1e4 else f"{back(x):.4g}"
        pen.text((place(x, bottom)[0] - 14 * share * 2, HEIGHT - 26), label, fill="black")
    pen.text((MARGIN, 6), title, fill="black")
    pen.text((WIDTH // 2, HEIGHT - 14), x_label, fill="black")
    for number, line in enumerate(series.values()):
        ink = INKS[number % len(INKS)]
        drawn = [place(along(x), y) for x, y in sorted(line)]
        pen.line(drawn, fill=ink, width=2)
        for x, y in drawn if len(drawn) < 20 else ():
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=ink)
    for number, name in enumerate(series):  # on top of the lines
        place_of_name, ink = (WIDTH - 150, 8 + 13 * number), INKS[number % len(INKS)]
        pen.text(place_of_name, name, fill=ink, stroke_width=2, stroke_fill="white")
    return image


def write_charts(path: Path, charts: Sequence) -> None:
    """Write charts as one PNG file, two side by side."""
    from PIL import Image

    rows = -(-len(charts) // 2)
    page = Image.new("RGB", (WIDTH * min(2, len(charts)), HEIGHT * rows), "white")
    for number, image in enumerate(charts):
        page.paste(image, (number % 2 * WIDTH, number // 2 * HEIGHT))
    page.save(path)


def write_curves(folder: Path, stages: Sequence[str]) -> None:
    """Write the loss curves of the stages that have a log in `folder` as `losses.png`.

    Each stage gets a chart of its loss and charts of the other recorded values. Those hold one line per ink,
    and values of similar size share a chart.
    """
    charts = []
    for stage in stages:
        log = folder / f"{stage}.jsonl"
        if log.exists() and (lines := [json.loads(line) for line in log.read_text().splitlines()]):
            names = dict.fromkeys(name for line in lines for name in line if name != "step")
            series = {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}
            rest = [name for name in names if name != "loss"]
            rest.sort(key=lambda name: max(y for _, y in series[name]))
            charts.append(chart(f"{stage}: loss", {"loss": series["loss"]}, x_label="step"))
            for at in range(0, len(rest), len(INKS)):
                shown = {name: series[name] for name in rest[at : at + len(INKS)]}
                charts.append(chart(stage, shown, x_label="step"))
    if charts:
        write_charts(folder / "losses.png", charts)


def write_grid(
    path: Path, images: Sequence[np.ndarray], captions: Sequence[str], *, across: int = 6, scale: int = 3
) -> None:
    """Write images of one size, uint8 [H, W, 3], enlarged and with captions below, as one PNG file.

    A caption breaks at "|" and where a line is full.
    """
    from PIL import Image, ImageDraw

    high, wide = (side * scale for side in images[0].shape[:2])
    texts = [wrapped(caption, int(wide / LETTER)) for caption in captions]
    below = LINE * max(map(len, texts)) + GAP
    page = Image.new(
        "RGB", ((wide + GAP) * min(across, len(images)), (high + below) * -(-len(images) // across)), "white"
    )
    pen = ImageDraw.Draw(page)
    for number, (image, lines) in enumerate(zip(images, texts, strict=True)):
        x, y = number % across * (wide + GAP), number // across * (high + below)
        page.paste(Image.fromarray(image).resize((wide, high), Image.Resampling.NEAREST), (x, y))
        for index, line in enumerate(lines):
            pen.text((x, y + high + 1 + LINE * index), line, fill="black")
    draft = path.with_name(f".{path.name}.tmp")
    page.save(draft, format="PNG")
    draft.replace(path)


def wrapped(caption: str, limit: int) -> list[str]:
    """Lines of at most `limit` letters, broken between words."""
    return [line for part in caption.split("|") for line in textwrap.wrap(part, limit) or [""]]
