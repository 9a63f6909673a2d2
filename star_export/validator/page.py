"""The frame of a self-contained HTML page: light and dark, wide and on a phone."""

from __future__ import annotations

import html
from collections.abc import Iterable

from .plots import STYLE as PLOT_STYLE

_STYLE = (
    """\
:root{color-scheme:light dark;--page:#fff;--ink:#1a1d21;--soft:#575e68;--line:#cfd4da;--card:#f5f6f8}
:root{--good:#06662d;--bad:#b3261e;--c0:#24569c;--c1:#a65200;--c2:#2a7230;--c3:#74389b}
@media(prefers-color-scheme:dark){
:root{--page:#14171b;--ink:#e6e9ed;--soft:#a8b0bb;--line:#424a54;--card:#1d2228}
:root{--good:#6fd08c;--bad:#ff8a80;--c0:#82b1f7;--c1:#f0a35e;--c2:#7fd18a;--c3:#cf9df0}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:75rem;padding:1rem;overflow-wrap:anywhere}
body{color:var(--ink);background:var(--page)}
h1{font-size:1.5rem;line-height:1.25}h2{font-size:1.2rem;margin:2rem 0 .5rem}h3{font-size:1rem;margin:0}
.lead{font-size:1.05rem;border-left:5px solid var(--good);padding:.1rem 0 .1rem .9rem}
.lead.failed{border-color:var(--bad)}
.pass{color:var(--good)}.fail{color:var(--bad);font-weight:600}
.grid,.cards{display:grid;gap:1rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,21rem),1fr))}
.grid,.cards{align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem;margin:0}
.card p{color:var(--soft);font-size:.9rem;margin:.5rem 0 0}
.plot figcaption{font-weight:600;font-size:.95rem;margin-bottom:.5rem}
.images{display:flex;gap:.5rem;margin-top:.5rem}
.images figure{margin:0;flex:1 1 0;max-width:10rem;text-align:center;font-size:.85rem;color:var(--soft)}
.images img{width:100%;height:auto;image-rendering:pixelated;border:1px solid var(--line)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.9rem}
th,td{text-align:left;padding:.2rem .7rem .2rem 0;border-bottom:1px solid var(--line);vertical-align:top}
.scroll td,.scroll th{overflow-wrap:normal}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
summary{cursor:pointer;padding:.25rem 0}dl{margin:.5rem 0 0}dt{color:var(--soft)}dd{margin:0}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.8rem}
pre{overflow-x:auto;overflow-wrap:normal}
"""
    + PLOT_STYLE
)


def html_page(title: str, body: Iterable[str]) -> str:
    """A page of that title, whose `body` is lines of HTML."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body><main>",
            *body,
            "</main></body></html>",
            "",
        ]
    )
