"""The command line: flags are the verbs' keywords,
errors are three lines and an exit code, nothing is half written."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.manifest import SamplingSpec
from engines.errors import InputError, MissingError, ParityError, UsageError
from engines.inputs.image_io import write_image
from star_export.cli import parser as cli
from star_export.cli import verbs
from star_export.cli.parser import build_parser, main

VERBS = (
    "export",
    "build",
    "validate",
    "certificate",
    "generate",
    "edit",
    "ask",
    "bench",
    "score",
    "plan",
    "inspect",
    "targets",
    "doctor",
    "completion",
)
REQUIRED = {
    "export": ["s", "--out", "o"],
    "build": ["b", "--target", "rtx-4090"],
    "validate": ["b"],
    "certificate": ["b"],
    "generate": ["b", "p", "-o", "f.png"],
    "edit": ["b", "i.png", "p", "-o", "f.png"],
    "ask": ["b", "i.png", "q"],
    "bench": ["b"],
    "score": ["b"],
    "plan": ["s"],
    "inspect": ["x"],
    "targets": [],
    "doctor": [],
    "completion": ["bash"],
}


@pytest.mark.parametrize("verb", VERBS)
def test_the_flags_are_the_keywords_of_the_verb(verb: str) -> None:
    arguments = vars(build_parser().parse_args([verb, *REQUIRED[verb]]))
    assert set(arguments) - {"verb", "json", "quiet", "verbose"} == set(
        inspect.signature(getattr(verbs, verb)).parameters
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture) -> None:
    assert main([verb, "-h"]) == 0
    text = capsys.readouterr().out
    assert f"star-export {verb}" in text.split("example:")[1]


def test_defaults_are_the_models_and_the_releases() -> None:
    given = build_parser().parse_args(["generate", *REQUIRED["generate"]])
    assert (given.cfg, given.top_k, given.top_p, given.seed, given.max_new_tokens) == (
        None,
        None,
        None,
        100,
        256,
    )
    assert SamplingSpec() == SamplingSpec(guidance=1.1, top_k=1000, top_p=0.8)


@pytest.mark.parametrize(
    "words",
    [
        ["paint"],
        ["generate", "b"],
        ["generate", "b", "p", "-o", "f.gif"],
        ["generate", "b", "p", "-o", "f.png", "--top-p", "0"],
        ["generate", "b", "p", "-o", "f.png", "--top-p", "nan"],
        ["generate", "b", "p", "-o", "f.png", "--cfg", "inf"],
        ["generate", "b", "p", "-o", "f.png", "--seed", "-1"],
        ["generate", "b", "p", "-o", "f.png", "--top-k", "1.5"],
        ["generate", "b", "p", "-o", "f.png", "--save-ids", "ids.txt"],
        ["ask", "b", "i", "q", "--max-new-tokens", "0"],
        ["ask", "b", "i", "q", "--max-new-tokens", "-1"],
        ["generate", "b", "p", "-o", "f.png", "--memory", "0"],
        ["ask", "b", "i", "q", "--memory", "8 apples"],
        ["plan", "s", "--precision", "fp7"],
        ["export", "s"],
        ["export", "s", "--out", "o", "--precision", "fp7"],
        ["generate", "b", "p", "-o", "f.png", "--gree"],
    ],
)
def test_a_wrong_command_line_is_three_lines_and_exit_code_2(
    words: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        len(lines) == 3
        and lines[0].startswith("error: ")
        and lines[1].startswith("  where: ")
        and lines[2].startswith("  fix: ")
    )


@pytest.mark.parametrize(
    "error, code",
    [(UsageError, 2), (InputError, 3), (ParityError, 4), (MissingError, 5), (KeyboardInterrupt, 130)],
)
def test_each_kind_of_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, error: type, code: int
) -> None:
    def verb():
        raise error("what", where="w\nh", fix="f") if error is not KeyboardInterrupt else error

    monkeypatch.setattr(verbs, "doctor", verb)
    assert main(["doctor"]) == code
    assert len(capsys.readouterr().err.splitlines()) == (3 if code != 130 else 1)


def test_a_bad_file_that_is_a_lack_of_memory_is_told_as_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def verb():
        try:
            raise MemoryError
        except MemoryError:
            raise InputError("This is not an ONNX file", where="w", fix="f") from None

    monkeypatch.setattr(verbs, "doctor", verb)
    assert main(["doctor"]) == MissingError.exit_code
    assert "too little memory" in capsys.readouterr().err


def test_a_bug_of_ours_is_a_traceback_and_exit_code_1() -> None:
    code = (
        "import sys; from star_export.cli import parser as cli, verbs\n"
        "verbs.doctor = lambda: 1 / 0; sys.exit(cli.main(['doctor']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(cli.__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    code = "import sys; from star_export.cli.parser import main; sys.exit(main(['targets', '--json']))"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(cli.__file__).parents[2],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert done.returncode == 130 and "Traceback" not in done.stderr


@pytest.fixture
def image(tmp_path: Path) -> str:
    write_image(tmp_path / "in.png", np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    return str(tmp_path / "in.png")


# Rows 42, 44: a bad input keeps what was there before
@pytest.mark.parametrize(
    "words, code, said",
    [
        (["generate", "BUNDLE", " ", "-o", "OUT"], 3, "empty"),
        (["generate", "BUNDLE", "cat " * 40_000, "-o", "OUT"], 3, "too long"),
        (["edit", "BUNDLE", "HTML", "p", "-o", "OUT"], 3, "image"),
        (["edit", "BUNDLE", "nothing.png", "p", "-o", "OUT"], 3, "nothing.png"),
        (["edit", "BUNDLE", "IMAGE", "p", "-o", "OUT", "--min-pixels", "9", "--max-pixels", "8"], 2, "pixel"),
        (["generate", "nowhere", "p", "-o", "OUT"], 3, "nowhere"),
        (["generate", "BUNDLE", "p", "-o", "OUT", "--backend", "gpu"], 2, "backend"),
        (["generate", "BUNDLE", "p", "-o", "OUT", "--backend", "tensorrt:rtx-4090"], 3, "star-export build"),
        (
            ["generate", "BUNDLE", "p", "-o", "OUT", "--backend", "onnxruntime-cuda"],
            5,
            "onnxruntime-gpu|CUDA",
        ),
        (["generate", "BUNDLE", "p", "-o", "nowhere/p.png"], 3, "nowhere"),
        (["inspect", "HTML"], 3, "inspect"),
        (["validate", "BUNDLE", "--report", "nowhere/r.html"], 3, "nowhere"),
        (["build", "BUNDLE", "--target", "rtx-1"], 2, "rtx-4090"),
        (["plan", "nobody/nothing"], 3, "downloads nothing"),
        (["plan", "BUNDLE", "--target", "rtx-1"], 2, "rtx-4090"),
        (["generate", "BUNDLE", "p", "-o", "OUT", "--memory", "1K"], 5, "1000 bytes"),
        (["build", "BUNDLE", "--target", "rtx-4090", "--rows", "1"], 2, "rows"),
        (["build", "BUNDLE", "--target", "rtx-4090"], 3, "fp32"),
    ],
)
def test_a_bad_input_is_three_lines_and_the_old_file_stays(
    mini_bundle: Path,
    tmp_path: Path,
    image: str,
    capsys: pytest.CaptureFixture,
    words: list[str],
    code: int,
    said: str,
) -> None:
    import re

    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "out.png").write_bytes(b"old")
    names = {
        "BUNDLE": str(mini_bundle),
        "OUT": str(tmp_path / "out.png"),
        "IMAGE": image,
        "HTML": str(tmp_path / "page.png"),
    }
    force = ["--force"] if "OUT" in words else []
    assert main([*(names.get(word, word) for word in words), *force]) == code
    text = capsys.readouterr().err
    lines = [line for line in text.splitlines() if line.startswith(("error: ", "  where: ", "  fix: "))]
    assert len(lines) == 3 and re.search(said, text), text
    assert (tmp_path / "out.png").read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == [
        "in.png",
        "out.png",
        "page.png",
    ]


def test_n_images_get_n_names(mini_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert (
        main(
            [
                "generate",
                str(mini_bundle),
                "a cat",
                "-o",
                str(tmp_path / "p.png"),
                "--num-images",
                "3",
                "--json",
                "--no-progress",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["images"] == [
        str(tmp_path / name) for name in ("p.png", "p-1.png", "p-2.png")
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p-1.png", "p-2.png", "p.png"]


def test_inspect_reads_a_bundle_and_a_graph(mini_bundle: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["inspect", str(mini_bundle), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["precision"] == "fp32" and data["components"]["text_head"]["outputs"] == {
        "logits": "float32[B,151936]"
    }
    assert main(["inspect", str(mini_bundle / "base_ar/model.onnx"), "--json"]) == 0
    graph = json.loads(capsys.readouterr().out)
    assert graph["operators"]["star::KVCacheAttention"] == 4 and graph["opsets"]["ai.onnx"] == 24
    assert graph["functions"]["star::KVCacheAttention"] == {"Attention": 1, "TensorScatter": 2}
    assert main(["inspect", str(mini_bundle / "base_ar/model.onnx")]) == 0
    assert "more caches" in capsys.readouterr().out


def test_inspect_shows_the_layers_that_tensorrt_sees(
    bundle_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = tmp_path / "int4"
    shutil.copytree(bundle_of("int4"), bundle)
    assert main(["inspect", str(bundle), "--target", "rtx-4090", "--component", "base_ar", "--json"]) == 0
    network = json.loads(capsys.readouterr().out)["networks"]["base_ar"]
    assert (
        network["plan"] is None
        and network["kinds"]["ATTENTION_INPUT"] == 4
        and network["kinds"]["KV_CACHE_UPDATE"] == 8
    )
    assert {f["kind"] for f in network["fused"]} == {"attention", "quantised weights"}
    assert {f["causal"] for f in network["fused"] if f["kind"] == "attention"} == {
        "NONE"
    }  # the mask is explicit
    assert (
        main(["build", str(bundle), "--target", "rtx-4090", "--components", "base_ar", "--no-progress"]) == 0
    )
    capsys.readouterr()
    plan = bundle / "plans/rtx-4090/base_ar.plan"
    assert main(["inspect", str(plan), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)["network"]
    assert described == network | {"plan": "this network"}
    assert main(["inspect", str(plan)]) == 0
    text = capsys.readouterr().out
    assert (
        "KV_CACHE_UPDATE  name: " in text
        and "quantised weights  layer: " in text
        and network["sha256"] in text
    )
    assert (
        main(["inspect", str(bundle), "--target", "nowhere"]) == 2 and "rtx-4090" in capsys.readouterr().err
    )
    assert (
        main(["inspect", str(bundle), "--component", "base_ar"]) == 2
        and "--target" in capsys.readouterr().err
    )
    assert main(["inspect", str(plan), "--target", "rtx-4090"]) == 2 and "BUNDLE" in capsys.readouterr().err


def test_targets_and_doctor_print_a_table_and_json(capsys: pytest.CaptureFixture) -> None:
    for verb in ("targets", "doctor"):
        assert main([verb]) == 0 and "rtx-4090" in capsys.readouterr().out
        assert main([verb, "--json"]) == 0 and json.loads(capsys.readouterr().out)


def test_memory_is_in_powers_of_1000() -> None:
    def memory(text: str) -> int:
        return build_parser().parse_args(["ask", "b", "i", "q", "--memory", text]).memory

    assert [memory(text) for text in ("8G", "1.5g", "512M", "3K", "100000")] == [
        8 * 10**9,
        1_500_000_000,
        512 * 10**6,
        3000,
        100_000,
    ]


def test_plan_prints_tables_and_json(mini_bundle: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["plan", "star-3b", "--target", "h200", "--target", "rtx-4060", "--precision", "bf16"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "never" in text and "0.24 of the limit" in text and "ask fits only in turn" in text
    assert main([*words, "--json"]) == 0
    assert [p["target"] for p in json.loads(capsys.readouterr().out)["places"]] == ["h200", "rtx-4060"]
    assert main(["plan", str(mini_bundle)]) == 0
    assert "this" not in capsys.readouterr().err


def test_exporting_without_the_hosts_packages_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(verbs, "EXPORT_PACKAGES", ("torch", "no_such_package"))
    assert main(["export", "s", "--out", str(tmp_path / "b")]) == 5
    text = capsys.readouterr().err
    assert "no_such_package" in text and ".[export]" in text
