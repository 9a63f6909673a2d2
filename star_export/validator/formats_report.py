"""The part of a report on mixed precision: a table of the layers, and a plot of bytes against divergence."""

from __future__ import annotations

import html

from ..choice import LARGE, SMALL, Formats, upgrades
from .plots import Plot, Scale


def html_from_formats(formats: Formats) -> str:
    """Make the section: the budget, the plot, and a row for each layer."""
    budget = formats.budget
    asked = f"{budget.bits:g} bits per weight" if budget.bits is not None else ""
    if budget.target and budget.memory_bytes and budget.share:
        asked = (
            f"what generate leaves in {budget.share:.0%} of the {budget.memory_bytes / 1e9:g} GB of "
            f"{html.escape(budget.target)}"
        )
    head = ("layer", "format", *(f"{unit}, {name}" for unit in ("bytes", "KL") for name in (SMALL, LARGE)))
    rows = "".join(
        f"\n<tr><td>{html.escape(layer.layer)}<td>{html.escape(layer.chosen)}"
        + "".join(f'<td class="n">{layer.bytes[name]}' for name in (SMALL, LARGE))
        + "".join(f'<td class="n">{layer.kl[name]:.3g}' for name in (SMALL, LARGE))
        for layer in formats.layers
    )
    return "\n".join(
        [
            "<h2>Formats of the layers</h2>",
            f"<p>The budget was {budget.bytes} bytes: {asked}. The layers take {formats.bytes} bytes, "
            f"{formats.bits:.3f} bits per weight; {len(formats.wide())} of {len(formats.layers)} are in "
            f"{LARGE}. KL is the mean divergence per image token in nats, with only that layer rounded to "
            f"nearest, on {formats.images} images of {formats.image_tokens} tokens.",
            f'<figure class="plot">{svg_from_formats(formats)}</figure>',
            '<div class="scroll"><table><tr>' + "".join(f"<th>{name}" for name in head) + rows,
            "</table></div>",
        ]
    )


def frontier(formats: Formats) -> list[tuple[str, int, float]]:
    """The way from int4 everywhere, layer by layer in the order of `upgrades`.

    Each point is what changed, the bytes of all layers, and the sum of their divergences, in nats.
    """
    taken = sum(layer.bytes[SMALL] for layer in formats.layers)
    kl = sum(layer.kl[SMALL] for layer in formats.layers)
    points = [(f"all in {SMALL}", taken, kl)]
    for layer in upgrades(formats.layers):
        taken, kl = taken + layer.extra_bytes, kl - layer.saved_kl
        points.append((f"{layer.layer} in {LARGE}", taken, kl))
    return points


def svg_from_formats(formats: Formats) -> str:
    """Plot the frontier: filled points are layers that were chosen, the dashed line is the budget."""
    points, wide = frontier(formats), {f"{layer} in {LARGE}" for layer in formats.wide()}
    high = max(points[-1][1], formats.budget.bytes)
    top = max(max(kl for _, _, kl in points), 1e-12)
    plot = Plot(Scale(points[0][1] / 1e6, high / 1e6), Scale(0, top))
    plot.line([(size / 1e6, max(kl, 0.0)) for _, size, kl in points])
    for what, size, kl in points:
        plot.point(size / 1e6, max(kl, 0.0), f"{what}: {size} bytes, {kl:.4g} nats", filled=what in wide)
    plot.limit(x=formats.budget.bytes / 1e6, says="budget")
    return plot.svg(
        "Bytes against divergence",
        f"From {SMALL} everywhere, each point gives {LARGE} to one more layer; {len(wide)} were chosen.",
        x_label="MB of the layers",
        y_label="sum of the layers' KL per image token, in nats",
    )
