"""The sub-commands that run a bundle: draw, edit, answer and measure, one function each."""

from __future__ import annotations

from .arguments import (
    add_backend,
    add_command,
    add_drawing,
    add_new_tokens,
    add_pixels,
    add_progress,
    add_running,
    add_window,
    count,
)


def add_generate(commands) -> None:
    c = add_command(
        commands,
        "generate",
        "draw an image from a prompt",
        'star-3b-bf16 "a photo of a red cat" -o cat.png',
        'star-3b-bf16 "the animal on the flag of Wales" -o dragon.png --reason',
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("prompt", metavar="PROMPT")
    add_drawing(c)
    c.add_argument(
        "--num-images",
        type=count,
        default=1,
        metavar="N",
        help="F.png, then F-1.png, F-2.png, ... (default: 1)",
    )
    c.add_argument(
        "--reason", action="store_true", help="let the base model answer first, and draw the answer"
    )
    add_new_tokens(c)


def add_edit(commands) -> None:
    c = add_command(
        commands,
        "edit",
        "edit an image by an instruction",
        'star-3b-bf16 cat.png "make the cat blue" -o blue.png',
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("image", metavar="IMAGE", help="PNG, JPEG or WebP; - for stdin")
    c.add_argument("instruction", metavar="INSTRUCTION")
    add_drawing(c)
    add_pixels(c)


def add_ask(commands) -> None:
    c = add_command(
        commands, "ask", "answer a question about an image", 'star-3b-bf16 cat.png "what is on the sofa?"'
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("image", metavar="IMAGE", help="PNG, JPEG or WebP; - for stdin")
    c.add_argument("question", metavar="QUESTION")
    add_new_tokens(c)
    c.add_argument(
        "--greedy",
        action="store_true",
        help="take the arg-max after the checkpoint's repetition penalty; always on",
    )
    add_pixels(c)
    add_running(c, "the answer's token ids, int64 [n]")


def add_bench(commands) -> None:
    c = add_command(
        commands,
        "bench",
        "measure ms per step, and its share of this machine's memory bandwidth",
        "star-3b-bf16",
    )
    c.add_argument("bundle", metavar="BUNDLE")
    add_window(c)
    add_backend(c)
    add_progress(c)
