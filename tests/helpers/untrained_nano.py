"""A STAR-Nano that learnt nothing, with a sampling of its own: its checkpoint takes a second."""

from __future__ import annotations

import json
from pathlib import Path

from reference.nano.checkpoint import layout

SAMPLING = {
    "generate": {"guidance": 2.0, "top_k": 100, "top_p": 0.9},
    "edit": {"guidance": 1.5, "top_k": 3, "top_p": 0.8},
}


def write_untrained(folder: Path) -> Path:
    """Write the checkpoint and return its folder."""
    layout.save_star(layout.new_star(layout.write_config(folder)), folder)
    (folder / "sampling.json").write_text(json.dumps(SAMPLING))
    return folder
