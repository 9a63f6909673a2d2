"""`star-export`: parse, call the verb of the same name and keywords, exit code. No logic.

0 done, 1 a bug of ours (traceback), 2 usage, 3 bad input or artifact, 4 parity failed, 5 missing dependency or device, 130 interrupted
(also when the reader of stdout went away). Results go to stdout, progress and errors to stderr. An error of the user is three lines.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys

from engines.errors import StarError, UsageError
from reference.errors import CheckpointError

from .. import __version__
from . import verbs

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code. What is a bug of ours is raised."""
    try:
        arguments = vars(build_parser().parse_args(argv))
        verb, as_json = arguments.pop("verb"), arguments.pop("json")
        outcome = getattr(verbs, verb)(**arguments)
        print(json.dumps(outcome.data, indent=1, ensure_ascii=False) if as_json else outcome.text, flush=True)
        return 0
    except (StarError, CheckpointError) as error:
        print(three_lines(error), file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or the interpreter complains when it flushes at exit
        return INTERRUPTED


def three_lines(error: StarError | CheckpointError) -> str:
    """What; where, with expected and got; what to do. Line breaks inside a part become spaces."""
    what, where, fix = (" ".join(str(part).split("\n")) for part in (error.what, error.where, error.fix))
    return f"error: {what}\n  where: {where}\n  fix: {fix}"


class Parser(argparse.ArgumentParser):
    """argparse with whole words only, whose errors are ours."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise UsageError(
            "The command line cannot be read", where=f"{self.prog}: {message}", fix=f"{self.prog} -h"
        )


def build_parser() -> Parser:
    """One sub-command per verb; the destinations are the keywords of the function of that name in `verbs`."""
    parser = Parser(
        prog="star-export",
        description="STAR from a checkpoint to TensorRT engines, answers and images, with proof.",
    )
    parser.add_argument("--version", action="version", version=f"star-export {__version__}")
    commands = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for add in (
        _export,
        _build,
        _validate,
        _generate,
        _edit,
        _ask,
        _bench,
        _score,
        _inspect,
        _targets,
        _doctor,
    ):
        add(commands)
    return parser


def _command(commands, name: str, help: str, *examples: str) -> Parser:
    lines = "\n".join(f"  star-export {name} {example}".rstrip() for example in examples)
    command = commands.add_parser(
        name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"example:\n{lines}"
    )
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    return command


def _export(commands) -> None:
    c = _command(
        commands,
        "export",
        "a checkpoint to a bundle of ONNX components with golden tensors",
        "nano --out star-nano",
        "MM-MVR/STAR-3B --base Qwen/Qwen2.5-VL-3B-Instruct --out star-3b-bf16 --precision bf16",
    )
    c.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder in the release layout, its config JSON, nano (shipped here), or a hub id",
    )
    c.add_argument("--out", required=True, metavar="BUNDLE", help="the bundle to make; must not exist")
    c.add_argument(
        "--precision", default="fp32", choices=("fp32", "fp16", "bf16", "int8", "int4"), help="default: fp32"
    )
    for part, what in (("checkpoint", "STAR-*.pt"), ("base", "the Qwen2.5-VL folder"), ("vq", "VQ-Model.pt")):
        c.add_argument(f"--{part}", metavar="PATH", help=f"{what}, instead of the one found at SOURCE")
    c.add_argument("--components", type=_words, metavar="A,B", help="only these components (default: all)")
    c.add_argument(
        "--rope",
        default="bf16",
        choices=("bf16", "fp32"),
        help="rounding of rotary frequencies; bf16 as the release (default)",
    )
    _add_progress(c)


def _build(commands) -> None:
    c = _command(
        commands,
        "build",
        "a bundle's ONNX to TensorRT plans",
        "star-3b-bf16 --target rtx-4090 --target rtx-5090",
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument(
        "--target",
        required=True,
        action="append",
        metavar="T",
        help="a device of `star-export targets`; may be repeated",
    )
    c.add_argument("--components", type=_words, metavar="A,B", help="only these components (default: all)")
    c.add_argument(
        "--capacity-tokens",
        type=_count,
        metavar="N",
        help="slots of the KV caches (default: the model's positions, at most 2048)",
    )
    c.add_argument(
        "--prefill-tokens", type=_count, metavar="N", help="longest prompt (default: the capacity)"
    )
    c.add_argument("--rows", type=_count, metavar="N", help="largest batch, two rows per image (default: 4)")
    _add_progress(c)


def _validate(commands) -> None:
    c = _command(
        commands,
        "validate",
        "show with numbers that a bundle computes what the reference computes",
        "star-3b-bf16 --report parity.html",
        "star-3b-bf16 --target rtx-4090",
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("--target", metavar="T", help="run the plans of this target, on the device at hand")
    c.add_argument(
        "--backend", default="onnxruntime", metavar="NAME", help="executor of the ONNX (default: onnxruntime)"
    )
    c.add_argument("--report", metavar="FILE.html", help="also write the numbers as a page")
    _add_progress(c)


def _generate(commands) -> None:
    c = _command(
        commands,
        "generate",
        "draw a prompt",
        'star-3b-bf16 "a photo of a red cat" -o cat.png',
        'star-3b-bf16 "the animal on the flag of Wales" -o dragon.png --reason',
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("prompt", metavar="PROMPT")
    _add_drawing(c)
    c.add_argument(
        "--num-images",
        type=_count,
        default=1,
        metavar="N",
        help="F.png, then F-1.png, F-2.png, ... (default: 1)",
    )
    c.add_argument(
        "--reason", action="store_true", help="let the base model answer first, and draw the answer"
    )
    c.add_argument(
        "--max-new-tokens", type=_count, default=256, metavar="N", help="of that answer (default: 256)"
    )


def _edit(commands) -> None:
    c = _command(
        commands,
        "edit",
        "change an image by an instruction",
        'star-3b-bf16 cat.png "make the cat blue" -o blue.png',
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("image", metavar="IMAGE", help="PNG or JPEG")
    c.add_argument("instruction", metavar="INSTRUCTION")
    _add_drawing(c)
    _add_pixels(c)


def _ask(commands) -> None:
    c = _command(
        commands, "ask", "answer a question about an image", 'star-3b-bf16 cat.png "what is on the sofa?"'
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("image", metavar="IMAGE", help="PNG or JPEG")
    c.add_argument("question", metavar="QUESTION")
    c.add_argument("--max-new-tokens", type=_count, default=256, metavar="N", help="default: 256")
    c.add_argument(
        "--greedy",
        action="store_true",
        help="the only way for now: arg-max after the checkpoint's repetition penalty",
    )
    _add_pixels(c)
    _add_running(c, "the answer's token ids, int64 [n]")


def _bench(commands) -> None:
    c = _command(
        commands, "bench", "ms per step, and its share of this machine's memory bandwidth", "star-3b-bf16"
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("--backend", default="onnxruntime", metavar="NAME", help="default: onnxruntime")
    _add_progress(c)


def _score(commands) -> None:
    c = _command(
        commands, "score", "how many of STAR-Nano's tasks a bundle of it does right", "star-nano-int4 --full"
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument(
        "--full", action="store_true", help="enough items for narrow intervals (default: a small fixed set)"
    )
    c.add_argument(
        "--pictures",
        metavar="FOLDER",
        help="also write grids of what was drawn, edited, answered and reasoned",
    )
    c.add_argument(
        "--backend",
        default="onnxruntime",
        metavar="NAME",
        help="onnxruntime (default), onnxruntime-cuda, or tensorrt:TARGET",
    )
    _add_progress(c)


def _inspect(commands) -> None:
    c = _command(
        commands,
        "inspect",
        "what is in a bundle, an ONNX file or a plan",
        "star-3b-bf16",
        "star-3b-bf16/base_ar/model.onnx",
        "star-3b-bf16 --target rtx-4090 --component base_ar",
    )
    c.add_argument("path", metavar="X", help="a bundle, a .onnx or a .plan")
    c.add_argument(
        "--target",
        metavar="T",
        help="show a bundle's layers as TensorRT reads them for T, and what it will fuse",
    )
    c.add_argument("--component", metavar="A", help="of this component alone (default: all)")


def _targets(commands) -> None:
    _command(commands, "targets", "the device table", "")


def _doctor(commands) -> None:
    _command(commands, "doctor", "what this machine can build and run", "")


def _add_drawing(c: Parser) -> None:
    c.add_argument(
        "-o", "--output", required=True, type=_named(".png"), metavar="F.png", help="the image to write"
    )
    c.add_argument(
        "--cfg",
        type=_number(0, math.inf),
        metavar="W",
        help="guidance; 1 is none (default: the model's; STAR: 1.1)",
    )
    c.add_argument("--top-k", type=_count, metavar="K", help="default: the model's; STAR: 1000")
    c.add_argument(
        "--top-p", type=_number(0, 1), metavar="P", help="1 is off (default: the model's; STAR: 0.8)"
    )
    c.add_argument(
        "--seed",
        type=_seed,
        default=100,
        metavar="S",
        help="the same seed gives the same image (default: 100)",
    )
    c.add_argument("--greedy", action="store_true", help="arg-max after guidance instead of a draw")
    _add_running(c, "the image token ids, int64 [N,T]")


def _add_running(c: Parser, ids: str) -> None:
    c.add_argument("--save-ids", type=_named(".npy"), metavar="F.npy", help=f"also write {ids}")
    c.add_argument(
        "--backend",
        default="onnxruntime",
        metavar="NAME",
        help="onnxruntime (default), onnxruntime-cuda, or tensorrt:TARGET",
    )
    _add_progress(c)


def _add_pixels(c: Parser) -> None:
    for bound in ("min", "max"):
        c.add_argument(
            f"--{bound}-pixels",
            type=_count,
            metavar="N",
            help="limit of the vision encoder's input (default: the release's)",
        )


def _add_progress(c: Parser) -> None:
    c.add_argument("--no-progress", dest="progress", action="store_false", help="no progress on stderr")


def _count(text: str) -> int:
    return _integer(text, 1, 10**9)


def _seed(text: str) -> int:
    return _integer(text, 0, 2**64 - 1)


def _integer(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r:.40}")
    return value


def _number(low: float, high: float):
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high and math.isfinite(value)):
            wanted = f"above {low} and at most {high}" if math.isfinite(high) else f"above {low}"
            raise argparse.ArgumentTypeError(f"expected a number {wanted}, got {text!r:.40}")
        return value

    return number


def _named(suffix: str):
    def name(text: str) -> str:
        if not text.lower().endswith(suffix):
            raise argparse.ArgumentTypeError(f"expected a file name that ends in {suffix}, got {text!r:.200}")
        return text

    return name


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]
