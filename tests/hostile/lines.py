"""Command lines: words and numbers that no verb takes, before any file is opened."""

from __future__ import annotations

from .harness import Case

DRAW = ("generate", "{bundle}", "a cat", "-o", "out.png")
ASK = ("ask", "{bundle}", "cat.png", "what?")
EXPORT = ("export", "{checkpoint}", "--out", "new")

WORDS = {
    "an unknown verb": (("paint",), "VERB"),
    "a verb with a typing error": (("generat", "b", "p"), "did you mean generate"),
    "the beginning of a verb": (("gen", "b", "p"), "did you mean generate"),
    "a shell in capitals": (("completion", "BASH"), "did you mean bash"),
    "an option with a typing error": ((*DRAW, "--sed", "3"), "did you mean --seed"),
    "an abbreviated option": ((*DRAW, "--gree"), "--greedy"),
    "a prompt without quotes": (("generate", "{bundle}", "a", "red", "cat"), "quotes"),
    "no prompt": (("generate", "{bundle}"), "PROMPT"),
    "no bundle": (("ask",), "BUNDLE"),
    "no target": (("build", "{bundle}"), "--target"),
    "no output of an export": (("export", "{checkpoint}"), "--out"),
    "an option without its value": ((*DRAW, "--seed"), "--seed"),
    "a precision that there is not": ((*EXPORT, "--precision", "int5"), "did you mean int[48]"),
    "a format that is not written": (("generate", "{bundle}", "p", "-o", "cat.gif"), "webp"),
    "ids that are not numpy's": ((*DRAW, "--save-ids", "ids.txt"), ".npy"),
    "a backend that there is not": ((*DRAW, "--backend", "gpu"), "onnxruntime"),
    "a target of no name": (("build", "{bundle}", "--target", ""), "target"),
    "a target as people write it": (("build", "{bundle}", "--target", "RTX-4090"), "did you mean rtx-4090"),
    "a target by its number": (("build", "{bundle}", "--target", "4090"), "did you mean rtx-4090"),
    "the CPU as a target": (("build", "{bundle}", "--target", "cpu"), "--backend onnxruntime"),
    "CUDA as a target": (("build", "{bundle}", "--target", "cuda"), "--backend onnxruntime-cuda"),
    "an unknown component": ((*EXPORT, "--components", "paint"), "token_embedding"),
    "no component": ((*EXPORT, "--components", ","), "component"),
    "a bisection without a source": (("validate", "{bundle}", "--bisect"), "--source"),
    "a source without a bisection": (("validate", "{bundle}", "--source", "nano"), "--bisect"),
    "a component without a target": (("inspect", "{bundle}", "--component", "base_ar"), "--target"),
    "mixed precision without a budget": ((*EXPORT, "--precision", "mixed"), "--bits"),
    "a budget without mixed precision": ((*EXPORT, "--bits", "5"), "mixed"),
    "a calibration of nothing": ((*EXPORT, "--calibration", "."), "--calibrate"),
    "threads of a backend on a GPU": (
        (*DRAW, "--threads", "1", "--backend", "tensorrt:rtx-4090"),
        "threads: expected the backend onnxruntime",
    ),
    "threads of interpreted plans": (
        ("validate", "{bundle}", "--threads", "1", "--backend", "interpreter:rtx-4090"),
        "threads",
    ),
    "threads of a bisection": (
        ("validate", "{bundle}", "--bisect", "--source", "nano", "--threads", "1"),
        "--bisect",
    ),
    "completion of no shell": (("completion",), "SHELL"),
    "completion of an unknown shell": (("completion", "zhs"), "did you mean zsh"),
    "help about nothing": (("help", "painting"), "VERB"),
    "pictures of several bundles": (
        ("score", "{bundle}", "--compare", "{bundle}", "--pictures", "."),
        "--compare",
    ),
}
NUMBERS = {
    "--seed": ("-1", "1.5", "18446744073709551616", "", "nan", "1e3"),
    "--cfg": ("0", "-1", "nan", "inf", "1e39", "1e400", "x"),
    "--top-k": ("0", "-1", "1.5", "1" * 5000, "x"),
    "--top-p": ("0", "1.1", "-0.1", "nan", "x"),
    "--num-images": ("0", "-3", "1000000000", "129", "x"),
    "--window": ("0", "-1", "2.5", "1000001"),
    "--memory": ("0", "8 apples", "-1G", "nan", "1e30"),
    "--threads": ("0", "-1", "1.5", "1000000", "x"),
    "--max-new-tokens": ("0", "-1", "1000000001", "100000"),
}
OF_ASK = ("--min-pixels", "--max-pixels")
OF_EXPORT = {
    "--bits": ("0", "-1", "nan", "x"),
    "--calibrate": ("0", "-1", "x"),
    "--part-bytes": ("0", "-1", "x"),
}
OF_BUILD = dict.fromkeys(("--capacity-tokens", "--prefill-tokens", "--rows"), ("0", "-1", "x", "10000000000"))
BUILD = ("build", "{bundle}", "--target", "rtx-4090")

CASES = [
    *(Case(name, words, 2, said) for name, (words, said) in WORDS.items()),
    *(
        Case(f"{option} {value[:20]!r}", (*DRAW, f"{option}={value}"), 2, option.strip("-").replace("-", "."))
        for option, values in NUMBERS.items()
        for value in values
    ),
    *(
        Case(f"{option} {value!r}", (*ASK, f"{option}={value}"), 2, "pixels")
        for option in OF_ASK
        for value in ("0", "-1", "x", "10000000000")
    ),
    *(
        Case(f"{option} {value!r}", (*EXPORT, f"{option}={value}"), 2, option)
        for option, values in OF_EXPORT.items()
        for value in values
    ),
    *(
        Case(f"{option} {value!r}", (*BUILD, f"{option}={value}"), 2, option)
        for option, values in OF_BUILD.items()
        for value in values
    ),
    Case("no verb at all", (), 0, "usage: star-export"),
    Case("help", ("help",), 0, "usage: star-export"),
    Case("help about a verb", ("help", "edit"), 0, "usage: star-export edit"),
    Case("the version", ("--version",), 0, "star-export [0-9]"),
    Case("JSON before the verb", ("--json", "targets"), 0, '"rtx-4090": {'),
    Case("an error as JSON", ("inspect", "nothing", "--json"), 3, '"exit_code": 3'),
    Case("an error with its place in the code", ("inspect", "nothing", "-q"), 3, "nothing"),
]
