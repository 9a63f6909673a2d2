"""Draw an image, change it by an instruction, and ask about the result.

    .venv/bin/python examples/02_edit_and_ask.py [BUNDLE]

Writes before.png and after.png into the current folder. `Star.edit` and `Star.ask` take a file or an array.
"""

from __future__ import annotations

import sys

from PIL import Image

from star_export import Star

bundle = sys.argv[1] if len(sys.argv) > 1 else "demo/bundle"
question = "what color is the star?"

with Star(bundle) as star:
    before = star.generate("a green triangle to the left of a purple circle on a white background")
    Image.fromarray(before.images[0]).save("before.png")

    after = star.edit("before.png", "replace the triangle with a red star")
    Image.fromarray(after.images[0]).save("after.png")

    answer = star.ask(after.images[0], question)
    print(f"before.png, after.png; {question} {answer.text!r} ({len(answer.ids)} tokens)")
