"""Draw a prompt with two seeds, and a riddle that the base model answers first.

    .venv/bin/python examples/01_draw.py [BUNDLE]

Writes draw-1.png, draw-2.png and riddle.png into the current folder.
"""

from __future__ import annotations

import sys

from PIL import Image

from star_export import Star

bundle = sys.argv[1] if len(sys.argv) > 1 else "demo/bundle"

with Star(bundle) as star:
    for seed in (1, 2):
        drawn = star.generate("three yellow stars on a blue background", seed=seed)
        Image.fromarray(drawn.images[0]).save(f"draw-{seed}.png")  # images: uint8 [N, H, W, 3]
        ids = drawn.image_ids[0]
        print(f"draw-{seed}.png: {len(ids)} image tokens, the first {ids[:4].tolist()}")

    riddle = star.generate("as many yellow stars as a dog has legs, on a blue background", reason=True)
    Image.fromarray(riddle.images[0]).save("riddle.png")
    print(f"riddle.png: reasoned {riddle.answer!r}")
