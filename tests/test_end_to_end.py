"""From text and image files through the command line to ids: what the official code computed, in float32."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.inputs.image_io import read_image, write_image
from engines.runtime.star import Star
from engines.sessions import onnxruntime
from star_export.cli.parser import main

GOLDEN = Path(__file__).parent / "golden"
CASES = {case["name"]: case for case in json.loads((GOLDEN / "cases.json").read_text())}
PIXELS = [
    "--min-pixels",
    str(28 * 28 * 4),
    "--max-pixels",
    str(28 * 28 * 16),
]  # of the miniature (tests/golden)


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "official_bf16_rope.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def names(task: str) -> list[str]:
    return [name for name, case in CASES.items() if case["task"] == task]


def official_ids(official: dict[str, np.ndarray], case: str) -> np.ndarray:
    """[N, T]; an edit's ids are the arg-max of its stored logits."""
    return official[f"{case}.cfg_logits"].argmax(-1).T


def official_images(official: dict[str, np.ndarray], case: str) -> np.ndarray:
    return np.clip((official[f"{case}.images"] + 1) / 2 * 255, 0, 255).astype(np.uint8)


def drawn(tmp_path: Path, *words: str, images: int = 1) -> tuple[np.ndarray, list[np.ndarray]]:
    """Ids and images that a command line writes."""
    assert (
        main(
            [*words, "-o", str(tmp_path / "p.png"), "--save-ids", str(tmp_path / "ids.npy"), "--no-progress"]
        )
        == 0
    )
    files = [tmp_path / "p.png"] + [tmp_path / f"p-{i}.png" for i in range(1, images)]
    ids = np.load(tmp_path / "ids.npy", allow_pickle=False)
    assert ids.dtype == np.int64
    return ids, [read_image(file) for file in files]


def check_images(got: list[np.ndarray], expected: np.ndarray) -> None:
    """Equal but for pixels that rounding puts on the other side of a whole number."""
    difference = np.abs(np.stack(got).astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("case", names("generate"))
def test_generate(mini_bundle: Path, tmp_path: Path, official: dict, case: str) -> None:
    spec = CASES[case]
    ids, images = drawn(
        tmp_path,
        "generate",
        str(mini_bundle),
        spec["prompt"],
        "--cfg",
        str(spec["cfg"]),
        "--greedy",
        "--num-images",
        str(spec["num_images"]),
        images=spec["num_images"],
    )
    np.testing.assert_array_equal(ids, official[f"{case}.tokens"])
    check_images(images, official_images(official, case))


@pytest.mark.parametrize("case", names("reason"))
def test_reason(
    mini_bundle: Path, tmp_path: Path, official: dict, capsys: pytest.CaptureFixture, case: str
) -> None:
    spec = CASES[case]
    ids, images = drawn(
        tmp_path,
        "generate",
        str(mini_bundle),
        spec["prompt"],
        "--cfg",
        str(spec["cfg"]),
        "--greedy",
        "--reason",
        "--max-new-tokens",
        str(spec["answer_tokens"]),
    )
    assert capsys.readouterr().out.splitlines()[0] == str(official[f"{case}.answer_text"])
    np.testing.assert_array_equal(ids, official[f"{case}.tokens"])
    check_images(images, official_images(official, case))


@pytest.mark.parametrize("case", names("edit"))
def test_edit(mini_bundle: Path, tmp_path: Path, official: dict, case: str) -> None:
    write_image(tmp_path / "in.png", official[f"{case}.image"])
    ids, images = drawn(
        tmp_path,
        "edit",
        str(mini_bundle),
        str(tmp_path / "in.png"),
        CASES[case]["prompt"],
        "--cfg",
        str(CASES[case]["cfg"]),
        "--greedy",
        *PIXELS,
    )
    np.testing.assert_array_equal(ids, official_ids(official, case))
    check_images(images, official_images(official, case))


@pytest.mark.parametrize("case", names("understand"))
def test_ask(mini_bundle: Path, tmp_path: Path, official: dict, case: str) -> None:
    write_image(tmp_path / "in.png", official[f"{case}.image"])
    assert (
        main(
            [
                "ask",
                str(mini_bundle),
                str(tmp_path / "in.png"),
                CASES[case]["prompt"],
                "--greedy",
                *PIXELS,
                "--no-progress",
                "--max-new-tokens",
                str(CASES[case]["new_tokens"]),
                "--save-ids",
                str(tmp_path / "ids.npy"),
            ]
        )
        == 0
    )
    prompt = official[f"{case}.input_ids"].shape[1]
    np.testing.assert_array_equal(np.load(tmp_path / "ids.npy"), official[f"{case}.output_ids"][0, prompt:])


@pytest.mark.parametrize(
    "settings",
    [{"seed": 1}, {"seed": 2, "cfg": 3.0, "top_k": 50, "top_p": 1.0}, {"seed": 3, "num_images": 2}],
)
def test_the_same_seed_gives_the_same_ids_in_pytorch(
    mini_checkpoint: Path, mini_bundle: Path, settings: dict
) -> None:
    import torch

    from engines.runtime.gumbel import gumbel_noise
    from reference import tasks
    from reference.weights import load_star, resolve_checkpoint

    with Star(mini_bundle) as star:
        images = star.generate("a photo of a red cat", **settings)
        rows = star.chat.generate_prompt(
            "a photo of a red cat", num_images=settings.get("num_images", 1)
        ).input_ids

    def noise(step: int) -> torch.Tensor:
        images = range(settings.get("num_images", 1))
        made = [gumbel_noise(settings["seed"], image=i, steps=[step], size=1024) for i in images]
        return torch.from_numpy(np.concatenate(made))

    with torch.inference_mode():
        expected = tasks.generate(
            load_star(resolve_checkpoint(str(mini_checkpoint))),
            torch.from_numpy(rows),
            guidance=settings.get("cfg", 1.1),
            top_k=settings.get("top_k", 1000),
            top_p=settings.get("top_p", 0.8),
            noise=noise,
        )
    np.testing.assert_array_equal(images.image_ids, expected.image_ids.numpy())
    assert len(np.unique(images.image_ids)) > 8  # a draw, not one id again and again


def test_no_cache_is_copied(
    mini_bundle: Path,
    tmp_path: Path,
    official: dict,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        onnxruntime, "LOG_SEVERITY", 2
    )  # tests/engines/sessions/test_onnxruntime.py shows that the warning is seen there
    write_image(tmp_path / "in.png", official["edit0.image"])
    drawn(tmp_path, "edit", str(mini_bundle), str(tmp_path / "in.png"), "the red dog")
    assert (
        main(
            [
                "ask",
                str(mini_bundle),
                str(tmp_path / "in.png"),
                "what is a dog?",
                "--max-new-tokens",
                "4",
                "--no-progress",
            ]
        )
        == 0
    )
    assert "copying" not in capfd.readouterr().err


def test_the_program_itself(mini_bundle: Path, tmp_path: Path) -> None:
    """One run as a person makes it: a process, its exit code, its two streams."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "star_export",
            "generate",
            str(mini_bundle),
            "a photo of a red cat",
            "-o",
            "p.png",
            "--json",
        ],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == ["p.png"] and read_image(tmp_path / "p.png").shape == (
        64,
        64,
        3,
    )
