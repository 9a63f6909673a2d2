"""The words of the world: names of things, colours, numbers and places, and how phrases are built from them.

Every function takes a `Random` and chooses among the ways to say something. With None it says it in the one
plain way, which is how answers and captions are worded. `held_out` keeps a share of all texts away from
training.
"""

from __future__ import annotations

import zlib
from random import Random

NOUNS = {
    "circle": ("circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
    None: ("shape", "thing", "object"),
}
PLURALS = {"box": "boxes", "cross": "crosses"}
COLOR_WORDS = {"purple": ("purple", "violet"), "black": ("black",), "red": ("red",), "yellow": ("yellow",)}
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
NUMBERS = ("zero", "one", "two", "three", "four")
COUNT_WORDS = {1: ("a", "one", "a single"), 2: ("two", "a pair of", "2"), 3: ("three", "3"), 4: ("four", "4")}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
BACKGROUND_WORDS = (
    "on a {} background",
    "on {}",
    "with a {} background",
    "against a {} backdrop",
    "in front of a {} background",
)
FRAMES = (
    "{}",
    "a picture of {}",
    "an image of {}",
    "a photo of {}",
    "draw {}",
    "paint {}",
    "please draw {}",
    "show me {}",
    "I want to see {}",
    "create an image with {}",
    "a drawing of {}",
    "make a picture of {}",
)
PLAIN_SHARE = 0.6  # share of the choices that take the plain word
HELD_OUT_ONE_IN = 8


def held_out(text: str) -> bool:
    """Whether training must never see this text; decided by the text alone."""
    return zlib.crc32(("held out " + text).encode()) % HELD_OUT_ONE_IN == 0


def choose(random: Random | None, options: tuple[str, ...]) -> str:
    """The first, plain option for None; otherwise often the first and sometimes another."""
    if random is None or random.random() < PLAIN_SHARE:
        return options[0]
    return random.choice(options)


def noun(random: Random | None, shape: str | None, *, plural: bool = False) -> str:
    word = choose(random, NOUNS[shape])
    return PLURALS.get(word, word + "s") if plural else word


def described(
    random: Random | None,
    *,
    shape: str | None,
    color: str | None = None,
    size: str | None = None,
    plural: bool = False,
) -> str:
    """Size, colour and noun, like "small red circle"."""
    words = [choose(random, SIZE_WORDS[size])] if size else []
    words += [choose(random, COLOR_WORDS.get(color, (color,)))] if color else []
    return " ".join([*words, noun(random, shape, plural=plural)])


def counted(random: Random | None, count: int, phrase: str) -> str:
    """A number before a phrase, with the right article."""
    word = choose(random, COUNT_WORDS[count])
    return f"{article(phrase)} {phrase}" if word == "a" else f"{word} {phrase}"


def article(phrase: str) -> str:
    return "an" if phrase[0] in "aeiou" else "a"


def joined(phrases: list[str]) -> str:
    """A list of phrases, like "a, b and c"."""
    return " and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]]))


def on_background(random: Random | None, color: str) -> str:
    pattern = choose(random, BACKGROUND_WORDS)
    word = choose(random, COLOR_WORDS.get(color, (color,)))
    return pattern.replace("a {}", f"{article(word)} {{}}").format(word)


def framed(random: Random | None, phrase: str) -> str:
    """A phrase as a request, like "draw ..." or "a picture of ..."."""
    return choose(random, FRAMES).format(phrase)
