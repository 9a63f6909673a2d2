"""Types of command-line arguments, and the groups of arguments that several verbs share."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

DEFAULT_BACKEND = "onnxruntime"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")  # those of `engines.inputs.image_io.FORMATS`


def add_backend(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--backend",
        default=DEFAULT_BACKEND,
        metavar="NAME",
        help="onnxruntime (default), onnxruntime-exact, onnxruntime-cuda, or tensorrt:TARGET",
    )
    add_threads(c)


def add_threads(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--threads",
        type=threads,
        metavar="N",
        help="threads that ONNX Runtime computes with on the CPU (default: one per core)",
    )


def add_drawing(c: argparse.ArgumentParser) -> None:
    """How an image is drawn, and where it goes."""
    c.add_argument(
        "-o",
        "--output",
        type=named(*SUFFIXES),
        metavar="F.png",
        help="the image to write: .png, .jpg or .webp (default: a new name, of text and seed)",
    )
    c.add_argument(
        "--cfg",
        type=number(0, math.inf),
        metavar="W",
        help="guidance scale; 1 turns guidance off (default: the model's; STAR: 1.1)",
    )
    c.add_argument(
        "--top-k",
        type=count,
        metavar="K",
        help="draw from the K likeliest ids (default: the model's; STAR: 1000)",
    )
    c.add_argument(
        "--top-p",
        type=number(0, 1),
        metavar="P",
        help="draw from the likeliest ids that hold P of the probability; 1 turns this off "
        "(default: the model's; STAR: 0.8)",
    )
    c.add_argument(
        "--seed",
        type=seed,
        default=100,
        metavar="S",
        help="the same seed gives the same image (default: 100)",
    )
    c.add_argument("--greedy", action="store_true", help="take the arg-max after guidance instead of a draw")
    add_window(c)
    add_running(c, "the image token ids, int64 [N,T]")


def add_decoder(c: argparse.ArgumentParser, *, steps: str) -> None:
    """Which decoder makes an image, and the size of its paintings; `steps` is the default."""
    c.add_argument(
        "--decoder",
        default="vq",
        choices=("vq", "diffusion"),
        help="what makes an image of the image tokens (default: vq)",
    )
    c.add_argument(
        "--resolution",
        type=count,
        metavar="R",
        help="side of a painted image in pixels, a multiple of 16 from 64 to 1024; the release was trained "
        "for 512 and 1024 (default: 1024)",
    )
    c.add_argument("--steps", type=count, metavar="N", help=f"steps of a painting (default: {steps})")


def add_painting(c: argparse.ArgumentParser, *, edit: bool) -> None:
    """How the diffusion decoder paints; every option but the first is for it alone."""
    text, image = ("3", "1.8") if edit else ("4.5", "1.05")
    add_decoder(c, steps="50" if edit else "40")
    c.add_argument(
        "--text-guidance",
        type=number(-math.inf, math.inf),
        metavar="W",
        help=f"weight of the text; at most 1 turns all guidance of the painting off (default: {text})",
    )
    seen = "source image" if edit else "image tokens"
    c.add_argument(
        "--image-guidance",
        type=number(-math.inf, math.inf),
        metavar="W",
        help=f"weight of the {seen} (default: {image})",
    )
    if edit:
        c.add_argument(
            "--vq-guidance",
            type=number(-math.inf, math.inf),
            metavar="W",
            help="weight of the image tokens (default: 1)",
        )
    more = " and source_noise [1,16,q,q]" if edit else ""
    c.add_argument(
        "--noise",
        type=named(".npz"),
        metavar="F.npz",
        help=f"noise [N,16,q,q]{more}, q = R / 8, in place of what the seed gives",
    )
    c.add_argument(
        "--latents",
        choices=("fp32", "bf16"),
        help="type of the latents between steps; the release rounds them to bf16 (default: fp32)",
    )
    c.add_argument(
        "--previews",
        metavar="FOLDER",
        help="an existing folder for what each step leads to: step-001.png, step-002.png, ...",
    )


def add_window(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--window",
        type=window,
        metavar="W",
        help="tokens of an image that a forward draws; the image is the same (default: auto, what should be "
        "fastest here)",
    )


def add_running(c: argparse.ArgumentParser, ids: str) -> None:
    """What every verb that runs a model on a prompt has; `ids` says what `--save-ids` writes."""
    c.add_argument("--save-ids", type=named(".npy"), metavar="F.npy", help=f"also write {ids}")
    c.add_argument("--force", action="store_true", help="replace files that are there already")
    c.add_argument(
        "--memory",
        type=memory,
        metavar="BYTES",
        help="load components in turn within this budget, such as 8G or 512M (default: keep all loaded)",
    )
    add_backend(c)
    add_progress(c)


def add_new_tokens(c: argparse.ArgumentParser) -> None:
    c.add_argument(
        "--max-new-tokens",
        type=count,
        default=256,
        metavar="N",
        help="most tokens of the answer (default: 256)",
    )


def add_pixels(c: argparse.ArgumentParser) -> None:
    for bound, word in (("min", "smallest"), ("max", "largest")):
        c.add_argument(
            f"--{bound}-pixels",
            type=count,
            metavar="N",
            help=f"{word} input of the vision encoder, in pixels (default: the release's)",
        )


def add_progress(c: argparse.ArgumentParser) -> None:
    c.add_argument("--no-progress", dest="progress", action="store_false", help="show no progress on stderr")


def count(text: str) -> int:
    """A whole number of at least 1."""
    return _integer(text, 1, 10**9)


def memory(text: str) -> int:
    """A size in bytes of at least 1: `8G`, `1.5G`, `512M`, `100K` in powers of 1000, or a plain number."""
    scale = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:].upper(), 1)
    try:
        size = float(text[:-1] if scale > 1 else text) * scale
    except ValueError:
        size = math.nan
    if not 1 <= size < 2**63:
        raise argparse.ArgumentTypeError(
            f"expected a number of bytes, such as 8G, 512M or 100000, got {text!r:.40}"
        )
    return int(size)


def window(text: str) -> int | None:
    """A number of tokens of at least 1, or `auto`: None."""
    try:
        return None if text == "auto" else _integer(text, 1, 10**6)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(str(error).replace("expected", "expected auto or", 1)) from None


def threads(text: str) -> int:
    """A number of threads: at most one per processor of this machine."""
    return _integer(text, 1, os.cpu_count() or 1)


def seed(text: str) -> int:
    """A seed: 64 bits, unsigned."""
    return _integer(text, 0, 2**64 - 1)


def port(text: str) -> int:
    """A port of TCP; 0 is any that is free."""
    return _integer(text, 0, 65535)


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r:.40}")
    return value


def number(low: float, high: float) -> Callable[[str], float]:
    """A type of finite numbers above `low` and at most `high`, neither of which counts if it is infinite."""

    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high and math.isfinite(value)):
            bounds = [("above", low), ("at most", high)]
            wanted = " and ".join(f"{word} {bound}" for word, bound in bounds if math.isfinite(bound))
            raise argparse.ArgumentTypeError(f"expected a number {wanted or 'such as 1.5'}, got {text!r:.40}")
        return value

    return number


def named(*suffixes: str) -> Callable[[str], str]:
    """A type of file names that end in one of `suffixes`."""

    def name(text: str) -> str:
        if not text.lower().endswith(suffixes):
            wanted = " or ".join(suffixes)
            raise argparse.ArgumentTypeError(f"expected a file name that ends in {wanted}, got {text!r:.200}")
        return text

    return name


def words(text: str) -> list[str]:
    """A comma-separated list of names."""
    return [word.strip() for word in text.split(",") if word.strip()]


def add_command(commands, name: str, help: str, *examples: str) -> argparse.ArgumentParser:
    lines = "\n".join(f"  star-export {name} {example}".rstrip() for example in examples)
    command = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example:\n{lines}"
    )
    add_common(command, argparse.SUPPRESS)
    return command


def add_common(parser: argparse.ArgumentParser, default: object = False) -> None:
    """The options that stand before a verb or after it: what is there already keeps its value."""
    for short, name, help in (
        ("", "json", "print the result, or the error, as JSON"),
        ("-q", "quiet", "print nothing but errors"),
        ("-v", "verbose", "say of an error where in the code it arose, too"),
    ):
        flags = [flag for flag in (short, f"--{name}") if flag]
        parser.add_argument(*flags, action="store_true", default=default, help=help)
