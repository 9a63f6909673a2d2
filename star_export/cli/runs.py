"""The sub-commands that run a bundle: draw, edit, answer and measure, one function each."""

from __future__ import annotations

import math

from .arguments import (
    add_backend,
    add_command,
    add_decoder,
    add_drawing,
    add_new_tokens,
    add_painting,
    add_pixels,
    add_progress,
    add_running,
    add_window,
    count,
    memory,
    number,
    port,
)


def add_generate(commands) -> None:
    c = add_command(
        commands,
        "generate",
        "draw an image from a prompt",
        'star-3b-bf16 "a photo of a red cat" -o cat.png',
        'star-3b-bf16 "the animal on the flag of Wales" -o dragon.png --reason',
        'star-3b-bf16 "a photo of a red cat" -o large.png --decoder diffusion --resolution 512',
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument("prompt", metavar="PROMPT")
    add_drawing(c)
    add_painting(c, edit=False)
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
    add_painting(c, edit=True)
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
        "measure ms per step, and its share of what this machine can do",
        "star-3b-bf16",
        "star-3b-bf16 --decoder diffusion --resolution 512 --steps 4",
    )
    c.add_argument("bundle", metavar="BUNDLE")
    add_window(c)
    add_decoder(c, steps="40")
    add_backend(c)
    add_progress(c)


def add_serve(commands) -> None:
    c = add_command(
        commands,
        "serve",
        "serve a bundle to OpenAI's clients and to a browser",
        "star-3b-bf16",
        "star-3b-bf16 --backend tensorrt:rtx-4090 --host 0.0.0.0 --api-key-file key",
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="H",
        help="address to listen on (default: 127.0.0.1, this machine only; any other needs a key)",
    )
    c.add_argument("--port", type=port, default=8000, metavar="P", help="default: 8000; 0 takes a free one")
    c.add_argument(
        "--api-key-file", metavar="F", help="a file whose first line is the key that clients must give"
    )
    c.add_argument(
        "--allow-host",
        action="append",
        metavar="NAME",
        help="another name of this server, beside localhost, that clients may address; may be repeated",
    )
    c.add_argument(
        "--queue", type=count, default=64, metavar="N", help="most images and answers that wait (default: 64)"
    )
    c.add_argument(
        "--images",
        type=count,
        default=8,
        metavar="N",
        help="most images that are drawn together (default: 8; no more than the plan's rows allow)",
    )
    for name, default, what in (
        ("deadline", 600, "a request is given up after so many seconds"),
        ("grace", 30, "what is drawn when the server must stop may take so many seconds more"),
    ):
        c.add_argument(
            f"--{name}",
            type=number(0, math.inf),
            default=float(default),
            metavar="S",
            help=f"{what} (default: {default})",
        )
    c.add_argument("--log-json", action="store_true", help="log a JSON object per request")
    c.add_argument("--log-prompts", action="store_true", help="log what was asked, too")
    add_window(c)
    c.add_argument(
        "--memory",
        type=memory,
        metavar="BYTES",
        help="load components in turn within this budget, such as 8G or 512M (default: keep all loaded)",
    )
    add_backend(c)
