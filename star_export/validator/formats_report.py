"""The part of a report on mixed precision: a table of the layers, and a plot of bytes against divergence.

The plot is SVG in the page itself, so the report stays one file without a plotting library.
"""

from __future__ import annotations

import html

from ..choice import LARGE, SMALL, Formats, upgrades

WIDTH, HEIGHT, MARGIN = 760, 320, 64  # of the plot, in pixels


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
            svg_from_formats(formats),
            "<table><tr>" + "".join(f"<th>{name}" for name in head) + rows,
            "</table>",
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
    low, high = points[0][1], max(points[-1][1], formats.budget.bytes)
    top = max(max(kl for _, _, kl in points), 1e-12)

    def x(size: int) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * (size - low) / max(1, high - low)

    def y(kl: float) -> float:
        return HEIGHT - MARGIN + (2 * MARGIN - HEIGHT) * max(kl, 0.0) / top

    line = " ".join(f"{x(size):.1f},{y(kl):.1f}" for _, size, kl in points)
    dots = [
        f'<circle cx="{x(size):.1f}" cy="{y(kl):.1f}" r="4" stroke="#24569c" '
        f'fill="{"#24569c" if what in wide else "#fff"}"><title>{html.escape(what)}: {size} bytes, '
        f"{kl:.4g} nats</title></circle>"
        for what, size, kl in points
    ]
    bottom, budget = HEIGHT - MARGIN, x(formats.budget.bytes)
    words = [
        (MARGIN, bottom + 18, "middle", f"{low / 1e6:.2f} MB"),
        (WIDTH - MARGIN, bottom + 18, "middle", f"{high / 1e6:.2f} MB"),
        (budget, MARGIN - 8, "middle", "budget"),
        (MARGIN - 6, bottom, "end", "0"),
        (MARGIN - 6, MARGIN + 4, "end", f"{top:.3g}"),
        (WIDTH / 2, HEIGHT - 12, "middle", "bytes of the layers; each point gives int8 to one more"),
        (MARGIN, 20, "start", "sum of the layers' KL per image token, in nats"),
    ]
    return "\n".join(
        [
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
            'font-size="12" font-family="system-ui,sans-serif">',
            f'<path d="M{MARGIN},{MARGIN}V{bottom}H{WIDTH - MARGIN}" fill="none" stroke="#999"/>',
            f'<path d="M{budget:.1f},{MARGIN}V{bottom}" stroke="#a30b0b" stroke-dasharray="5 4"/>',
            f'<polyline points="{line}" fill="none" stroke="#24569c"/>',
            *dots,
            *(
                f'<text x="{left:.1f}" y="{base:.1f}" text-anchor="{anchor}">{text}</text>'
                for left, base, anchor, text in words
            ),
            "</svg>",
        ]
    )
