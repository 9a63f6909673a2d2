"""The sub-commands that make, prove and describe bundles, a function each; `runs.py` has the others."""

from __future__ import annotations

import math

from .arguments import (
    add_backend,
    add_command,
    add_decoder,
    add_progress,
    add_threads,
    add_window,
    count,
    number,
    words,
)

SHELLS = ("bash", "zsh", "fish", "powershell")
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "nvfp4")


def add_export(commands) -> None:
    c = add_command(
        commands,
        "export",
        "export a checkpoint to a bundle of ONNX components with golden tensors",
        "nano --out star-nano",
        "star-3b --out star-3b --precision int4",
        "star-7b --from downloads --out star-7b --precision int4",
        "star-7b --out star-7b-mixed --precision mixed --target rtx-5070 --calibrate",
    )
    c.add_argument(
        "source",
        metavar="SOURCE",
        help="star-3b, star-7b (downloaded as far as needed), nano (shipped here), a folder in the release "
        "layout, its config JSON, or a hub id",
    )
    c.add_argument(
        "--out", required=True, metavar="BUNDLE", help="the bundle to create; absent or an empty folder"
    )
    c.add_argument(
        "--precision",
        default="fp32",
        choices=(*PRECISIONS, "mixed"),
        help="default: fp32; `mixed` needs --bits or --target",
    )
    budget = c.add_mutually_exclusive_group()
    budget.add_argument(
        "--bits",
        type=number(0, math.inf),
        metavar="B",
        help="with --precision mixed: int8 for the layers of the decoders where it helps most, and int4 for "
        "the others, at most B bits per weight on average, scales included",
    )
    budget.add_argument(
        "--target",
        metavar="T",
        help="with --precision mixed: as many layers in int8 as let `generate` stay loaded in 90 %% of the "
        "memory of T, a device of `star-export targets`",
    )
    for part, what in (
        ("checkpoint", "STAR-*.pt"),
        ("base", "the Qwen2.5-VL folder"),
        ("vq", "VQ-Model.pt"),
        ("lumina", "the diffusion decoder's folder, lumina-image2,"),
    ):
        c.add_argument(f"--{part}", metavar="PATH", help=f"{what} to use instead of the one in SOURCE")
    c.add_argument(
        "--from",
        dest="from_folder",
        metavar="FOLDER",
        help="a folder with parts of star-3b or star-7b: STAR-*.pt, VQ-Model.pt, Qwen2.5-VL-*-Instruct/; "
        "only what it lacks is downloaded",
    )
    c.add_argument(
        "--revision",
        metavar="R",
        help="branch, tag or commit of a hub id (default: the newest); the manifest records its commit",
    )
    c.add_argument("--components", type=words, metavar="A,B", help="only these components (default: all)")
    c.add_argument(
        "--calibrate",
        type=count,
        nargs="?",
        const=0,
        metavar="N",
        help="quantise the decoders for what the model computes when it draws N prompts, edits and answers "
        "(default N: as many as give 13,000 inputs), and not by rounding to nearest",
    )
    c.add_argument(
        "--calibration",
        metavar="FOLDER",
        help="prompts.txt (one per line; `edit: TEXT` and `ask: TEXT` too) and images to calibrate with "
        "(default: shipped prompts)",
    )
    c.add_argument(
        "--part-bytes",
        type=count,
        metavar="N",
        help="store what has equal layers and more bytes in parts of at most N (default: 1 GiB)",
    )
    c.add_argument(
        "--rope",
        default="bf16",
        choices=("bf16", "fp32"),
        help="type that rotary frequencies are rounded to (default: bf16, as in the release)",
    )
    add_progress(c)


def add_build(commands) -> None:
    c = add_command(
        commands,
        "build",
        "build TensorRT plans from a bundle's ONNX",
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
    c.add_argument("--components", type=words, metavar="A,B", help="only these components (default: all)")
    c.add_argument(
        "--capacity-tokens",
        type=count,
        metavar="N",
        help="slots of the KV caches (default: the model's positions, at most 2048)",
    )
    c.add_argument("--prefill-tokens", type=count, metavar="N", help="longest prompt (default: the capacity)")
    c.add_argument("--rows", type=count, metavar="N", help="largest batch, two rows per image (default: 4)")
    add_progress(c)


def add_validate(commands) -> None:
    c = add_command(
        commands,
        "validate",
        "show with numbers that a bundle computes what the reference computes",
        "star-3b-bf16 --report parity.html",
        "star-3b-bf16 --target rtx-4090",
        "star-3b-bf16 --bisect base_ar --source star-3b",
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument(
        "--target",
        metavar="T",
        help="validate the plans of this target on this device, or their networks where it cannot run them",
    )
    c.add_argument(
        "--backend",
        default="onnxruntime-exact",
        metavar="NAME",
        help="what runs the ONNX (default: onnxruntime-exact)",
    )
    add_threads(c)
    c.add_argument("--report", metavar="FILE.html", help="also write the numbers to an HTML page")
    c.add_argument(
        "--bisect",
        nargs="?",
        const="",
        metavar="COMPONENT",
        help="compare COMPONENT layer by layer with the reference, and name the first wrong tensor; without "
        "COMPONENT, the one that fails the validation",
    )
    c.add_argument(
        "--source", metavar="SOURCE", help="with --bisect: the checkpoint that the bundle was exported from"
    )
    add_progress(c)


def add_certificate(commands) -> None:
    c = add_command(
        commands,
        "certificate",
        "list what was proved of a bundle and where, and check that it still holds",
        "star-3b-bf16",
        "star-3b-bf16 --backend tensorrt:rtx-4090",
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument(
        "--backend",
        metavar="NAME",
        help="only the certificate of this backend, which must hold here: exit code 3 if it is absent, "
        "damaged, of other bytes or of another device, 4 if it failed",
    )
    add_progress(c)


def add_score(commands) -> None:
    c = add_command(
        commands,
        "score",
        "count how many of STAR-Nano's tasks its bundle gets right",
        "star-nano-int4 --full",
        "star-nano-fp32 --compare star-nano-int8 star-nano-int4",
    )
    c.add_argument("bundle", metavar="BUNDLE")
    c.add_argument(
        "--compare",
        nargs="+",
        metavar="B",
        help="score these bundles too, and say how far each one is from BUNDLE: points, identical images, "
        "and the distributions that tokens are drawn from",
    )
    c.add_argument(
        "--full",
        action="store_true",
        help="run enough items, and compare enough images, for narrow intervals (default: a small fixed set)",
    )
    c.add_argument(
        "--pictures",
        metavar="FOLDER",
        help="also write grids of what was drawn, edited, answered and reasoned",
    )
    add_window(c)
    add_decoder(c, steps="40, of an edit 50")
    add_backend(c)
    add_progress(c)


def add_plan(commands) -> None:
    c = add_command(
        commands,
        "plan",
        "say what fits where and how fast it can be, from headers alone",
        "star-3b --target rtx-4060 --target rtx-4090",
        "star-7b --target thor-jp72 --precision bf16 --precision int4 --rows 4",
        "star-3b-int4",
    )
    c.add_argument(
        "source",
        metavar="SOURCE_OR_BUNDLE",
        help="a bundle, or what `export` takes; nothing is downloaded and no weight is read",
    )
    c.add_argument(
        "--target",
        action="append",
        metavar="T",
        help="a device of `star-export targets`, or cpu for this host (default); may be repeated",
    )
    c.add_argument(
        "--precision",
        action="append",
        choices=(*PRECISIONS, "mixed"),
        help="may be repeated (default: all, of a bundle its own); `mixed` with its fewest bits per weight",
    )
    c.add_argument(
        "--rows", type=count, default=2, metavar="N", help="batch, two rows per image (default: 2)"
    )
    c.add_argument(
        "--capacity-tokens",
        type=count,
        metavar="N",
        help="slots of the KV caches (default: the model's positions, at most 2048)",
    )


def add_inspect(commands) -> None:
    c = add_command(
        commands,
        "inspect",
        "show what is in a bundle, an ONNX file or a plan",
        "star-3b-bf16",
        "star-3b-bf16/base_ar/model.onnx",
        "star-3b-bf16 --target rtx-4090 --component base_ar",
        "star-3b-bf16 --polygraphy parity --component base_ar",
    )
    c.add_argument("path", metavar="X", help="a bundle, a .onnx or a .plan")
    c.add_argument(
        "--target",
        metavar="T",
        help="show a bundle's layers as TensorRT parses them for T, and what it will fuse",
    )
    c.add_argument(
        "--polygraphy",
        metavar="FOLDER",
        help="write a bundle's golden tensors to FOLDER, absent or empty, for `polygraphy run` "
        "(docs/parity.md)",
    )
    c.add_argument("--component", metavar="A", help="only this component (default: all)")


def add_targets(commands) -> None:
    add_command(commands, "targets", "list the devices that plans can be built for", "")


def add_doctor(commands) -> None:
    add_command(commands, "doctor", "report what this machine can build and run", "")


def add_completion(commands) -> None:
    c = add_command(
        commands,
        "completion",
        "print the script with which a shell completes verbs, options and their values",
        "bash > ~/.local/share/bash-completion/completions/star-export",
        'zsh > "${fpath[1]}/_star-export"',
        "fish > ~/.config/fish/completions/star-export.fish",
    )
    c.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
