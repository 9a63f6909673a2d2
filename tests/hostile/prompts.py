"""Texts that no prompt may hold."""

from __future__ import annotations

from reference.mini import SPECIAL, WORDS

from .harness import Case

LETTERS = " ".join(WORDS)
TEXTS = {
    "nothing": ("", "empty"),
    "spaces": (" \n\t ", "empty"),
    "more than the model holds": ("cat " * 20_000, "too long"),
    "bytes that are no UTF-8": ("\udcff\udcfe", ""),
    **{f"the special token {token}": (f"a {token} cat", "special") for token in SPECIAL if token[:2] == "<|"},
}
CASES = [
    *(
        Case(f"a prompt of {name}", ("generate", "{bundle}", text, "-o", "out.png"), 3, said)
        for name, (text, said) in TEXTS.items()
    ),
]
