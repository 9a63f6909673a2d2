"""`generate` and `edit` with `--decoder diffusion` paint the official images, from the command line on."""

from __future__ import annotations

import json
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines import MissingError, Painting, Star, UsageError
from engines.fit.memory import stage_bytes, task_memory
from star_export.cli.parser import main
from tests.helpers.official import CASES as SOURCES
from tests.helpers.official_diffusion import CASES, arrays, check_image

VARIANT = "bf16_tables."  # what an export computes by default
CHAINED = ["t2i0", "t2i1", "t2i2", "plain0", "edit0", "edit1", "t2i40", "edit50"]
PIXELS = ["--min-pixels", str(28 * 28 * 4), "--max-pixels", str(28 * 28 * 16)]  # the miniature's


def noise_file(case: str, folder: Path) -> str:
    names = ["noise"] + ["source_noise"] * (CASES[case]["task"] == "edit")
    path = folder / "noise.npz"
    np.savez(path, **{name: arrays()[f"{case}.{name}"] for name in names})
    return str(path)


def command(case: str, bundle: Path, folder: Path) -> list[str]:
    """The command line of a case, which writes `out.png` into `folder`."""
    c, source = CASES[case], SOURCES[CASES[case]["source"]]
    words = ["edit", str(bundle), str(folder / "image.png"), source["prompt"], *PIXELS]
    if c["task"] == "edit":
        Image.fromarray(arrays()[f"{case}.image"]).save(folder / "image.png")
        words += ["--vq-guidance", str(c["g_vq"])]
    else:
        words = ["generate", str(bundle), source["prompt"], "--num-images", str(c["num_images"])]
    if source["task"] == "reason":
        words += ["--reason", "--max-new-tokens", str(source["answer_tokens"])]
    words += ["--greedy", "--cfg", str(source["cfg"]), "--decoder", "diffusion"]
    words += ["--resolution", str(c["resolution"]), "--steps", str(c["steps"])]
    words += ["--text-guidance", str(c["g_txt"]), "--image-guidance", str(c["g_img"])]
    return [*words, "--noise", noise_file(case, folder), "-o", str(folder / "out.png"), "--no-progress"]


@pytest.mark.parametrize("case", CHAINED)
def test_the_command_line_paints_the_official_image(
    diffusion_bundle: Path, tmp_path: Path, case: str
) -> None:
    assert main(command(case, diffusion_bundle, tmp_path)) == 0
    names = ["out.png", *(f"out-{i}.png" for i in range(1, CASES[case]["num_images"]))]
    images = np.stack([np.asarray(Image.open(tmp_path / name)) for name in names])
    check_image(images, f"{case}.{VARIANT}result")


def test_the_defaults_are_the_releases(diffusion_bundle: Path, tmp_path: Path) -> None:
    """Steps and guidance of `t2i40` need not be given."""
    words = command("t2i40", diffusion_bundle, tmp_path)
    for option in ("--steps", "--text-guidance", "--image-guidance"):
        at = words.index(option)
        del words[at : at + 2]
    assert main(words) == 0
    check_image(np.asarray(Image.open(tmp_path / "out.png"))[None], f"t2i40.{VARIANT}result")


def test_a_long_prompt_is_cut_and_that_is_said(
    diffusion_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    case, c = "t2i3", CASES["t2i3"]
    words = ["generate", str(diffusion_bundle), c["prompt"], "--decoder", "diffusion", "--greedy"]
    words += ["--resolution", "64", "--steps", "2", "-o", str(tmp_path / "out.png"), "--json"]
    assert main([*words, "--no-progress"]) == 0
    cut = json.loads(capsys.readouterr().out)["cut_tokens"]
    with Star(diffusion_bundle) as star:
        ids, same = star.captions.ids(c["prompt"])
        assert np.array_equal(ids[0], arrays()[f"{case}.prompt_ids"]) and cut == same > 100
        noise = arrays()[f"{case}.noise"]
        painter = star._painter(Painting(64, steps=c["steps"], noise=noise), c["prompt"], seed=1)
        images = painter.paint(arrays()[f"{case}.codes"].astype(np.int64))
    check_image(images, f"{case}.{VARIANT}result")


def test_a_seed_is_an_image_and_parts_in_turn_paint_the_same(diffusion_bundle: Path) -> None:
    painting = Painting(64, steps=3)
    with Star(diffusion_bundle) as star:
        first, again = (star.generate("a red cat", greedy=True, painting=painting) for _ in range(2))
        other = star.generate("a red cat", greedy=True, seed=101, painting=painting)
        needed = star.loaded.sizes
    from engines.fit.memory import Use, task_memory

    use = Use(2, 64, 48, on_cpu=True)
    budget = round(1.2 * task_memory(needed, "paint", use).in_turn_bytes)
    with Star(diffusion_bundle, memory=budget) as star:
        in_turn = star.generate("a red cat", greedy=True, painting=painting)
        assert "base_ar" not in star.loaded.open
    assert np.array_equal(first.images, again.images) and np.array_equal(first.images, in_turn.images)
    assert not np.array_equal(first.images, other.images)


def test_latents_in_bf16_paint_almost_the_same(diffusion_bundle: Path) -> None:
    """16 bits between steps change the latents by about a hundredth (docs/diffusion.md)."""
    noise, codes = arrays()["t2i40.noise"], arrays()["t2i40.codes"].astype(np.int64)
    exact, images = arrays()[f"t2i40.{VARIANT}result"].astype(int), {}
    with Star(diffusion_bundle) as star:
        for latents in ("fp32", "bf16"):
            painting = Painting(80, noise=noise, latents=latents)
            images[latents] = star._painter(painting, CASES["t2i40"]["prompt"], seed=1).paint(codes)
    errors = {name: float(np.abs(image - exact).mean()) for name, image in images.items()}
    assert errors["fp32"] < 0.01 < errors["bf16"] < 4


def test_previews_lead_to_the_image(diffusion_bundle: Path, tmp_path: Path) -> None:
    words = command("t2i0", diffusion_bundle, tmp_path)
    (tmp_path / "steps").mkdir()
    words += ["--previews", str(tmp_path / "steps")]
    assert main(words) == 0
    found = sorted((tmp_path / "steps").iterdir())
    assert [path.name for path in found] == [f"step-00{i}.png" for i in (1, 2, 3)]
    final = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    errors = [float(np.abs(np.asarray(Image.open(path)) - final).mean()) for path in found]
    assert errors == sorted(errors, reverse=True) and errors[0] > errors[-1] > 0
    assert main([*words, "--force"]) == 0 and main(words) == 2


def refused(capsys: pytest.CaptureFixture, code: int, *words: str) -> str:
    assert main([*words, "--no-progress"]) == code
    told = capsys.readouterr().err.strip().splitlines()
    assert len(told) == 3
    return " ".join(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--resolution", "500"], "multiple of 16 from 64 to 1024"),
        (["--resolution", "48"], "512 or 1024"),
        (["--resolution", "2048"], "multiple of 16"),
        (["--steps", "0"], "from 1"),
        (["--steps", "1001"], "1 to 1000"),
        (["--text-guidance", "1e30"], "text_guidance"),
        (["--text-guidance", "-1001"], "expected a number from -1000 to 1000, got -1001"),
        (["--image-guidance", "nan"], "expected a number such as 1.5, got 'nan'"),
        (["--latents", "fp8"], "bf16"),
        (["--vq-guidance", "1"], "vq-guidance"),
    ],
)
def test_settings_out_of_range_are_told_before_the_work(
    diffusion_bundle: Path, capsys: pytest.CaptureFixture, tmp_path: Path, words: list[str], told: str
) -> None:
    out = ["-o", str(tmp_path / "a.png"), "--decoder", "diffusion"]
    assert told in refused(capsys, 2, "generate", str(diffusion_bundle), "a cat", *out, *words)
    assert not any(tmp_path.iterdir())


def test_a_folder_without_a_name_is_not_taken_for_none(
    diffusion_bundle: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["generate", str(diffusion_bundle), "a cat", "-o", str(tmp_path / "a.png"), "--previews", ""]
    assert "an empty text" in refused(
        capsys, 3, *words, "--decoder", "diffusion", "--resolution", "64", "--steps", "1"
    )


def test_options_of_the_other_decoder_are_told(
    diffusion_bundle: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["generate", str(diffusion_bundle), "a cat", "-o", str(tmp_path / "a.png"), "--steps", "4"]
    assert "--steps: expected --decoder diffusion" in refused(capsys, 2, *words)


def test_a_bundle_without_a_diffusion_decoder_is_told(
    mini_bundle: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["generate", str(mini_bundle), "a cat", "-o", str(tmp_path / "a.png"), "--decoder", "diffusion"]
    assert "no diffusion decoder" in refused(capsys, 3, *words)


@pytest.mark.parametrize(
    ("arrays_of", "told"),
    [
        ({"noise": np.zeros((1, 16, 10, 10), np.float32)}, "[1, 16, 8, 8]"),
        ({"noise": np.full((1, 16, 8, 8), np.nan, np.float32)}, "NaN or Inf"),
        ({"noise": np.full((1, 16, 8, 8), 1e300)}, "float64[1, 16, 8, 8] with NaN or Inf in float32"),
        ({"noise": np.zeros((1, 16, 8, 8), np.int64)}, "int64"),
        ({"source_noise": np.zeros((1, 16, 8, 8), np.float32)}, "an array `noise`"),
        ({"noise": np.array([None])}, "Object arrays"),
        (None, "an .npz file"),
    ],
)
def test_noise_that_does_not_fit_is_told(
    diffusion_bundle: Path, capsys: pytest.CaptureFixture, tmp_path: Path, arrays_of: dict | None, told: str
) -> None:
    path = tmp_path / "noise.npz"
    path.write_bytes(b"PK nothing") if arrays_of is None else np.savez(path, **arrays_of)
    words = ["generate", str(diffusion_bundle), "a cat", "-o", str(tmp_path / "a.png"), "--noise", str(path)]
    assert told in refused(capsys, 3, *words, "--decoder", "diffusion", "--resolution", "64")


def npy(shape: str) -> bytes:
    """An .npy file whose header states float32 of `shape`, before 4096 bytes."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(4096)


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (["(1099511627776,)"], "a header of 4398046511104 bytes before 4096"),
        (["(1, 16, 8, 8)", "(1, 16, 8, 8)"], "one array noise, got several"),
    ],
)
def test_noise_of_a_false_header_takes_no_memory_and_none_stands_twice(
    diffusion_bundle: Path, capsys: pytest.CaptureFixture, tmp_path: Path, shapes: list[str], told: str
) -> None:
    path = tmp_path / "noise.npz"
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for shape in shapes:
            archive.writestr("noise.npy", npy(shape))
    words = ["generate", str(diffusion_bundle), "a cat", "-o", str(tmp_path / "a.png"), "--noise", str(path)]
    assert told in refused(capsys, 3, *words, "--decoder", "diffusion", "--resolution", "64", "--steps", "1")


def test_memory_that_cannot_hold_a_part_is_told(
    diffusion_bundle: Path, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    words = ["generate", str(diffusion_bundle), "a cat", "-o", str(tmp_path / "a.png"), "--memory", "100K"]
    told = refused(capsys, 5, *words, "--decoder", "diffusion", "--resolution", "64")
    assert "memory: expected at least" in told


def test_previews_that_memory_cannot_hold_are_told_before_anything_is_drawn(diffusion_bundle: Path) -> None:
    with Star(diffusion_bundle) as star:
        use = star.use("base_ar", rows=2, length=64, tokens=star.model.image_tokens)
        budget = stage_bytes(star.loaded.sizes, ("dit", "vae_decoder"), use) - 1
        assert task_memory(star.loaded.sizes, "paint", use).in_turn_bytes <= budget
    painting = Painting(64, steps=2, preview=lambda step, images: None)
    with Star(diffusion_bundle, memory=budget) as star:
        with pytest.raises(MissingError, match="budget") as told:
            star.generate("a cat", painting=painting)
        assert "for dit, vae_decoder" in told.value.where and not star.loaded.open
        star.generate("a cat", painting=replace(painting, preview=None))


def test_the_library_refuses_what_the_command_line_does(diffusion_bundle: Path) -> None:
    with Star(diffusion_bundle) as star, pytest.raises(UsageError, match="latents"):
        star.generate("a cat", painting=Painting(64, latents="int4"))
