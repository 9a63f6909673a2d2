"""A calibrated export: it validates, says what it was calibrated on, and goes on where it was stopped.

docs/bad_inputs.md 7 and 64 to 66.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engines.bundle.reader import Bundle
from engines.errors import InputError, UsageError
from engines.progress import silent
from reference.containers import LazyTensor
from reference.errors import CheckpointError
from star_export.calibration.decodes import Decodes
from star_export.calibration.examples import Material
from star_export.calibration.run import CALIBRATED, Calibration, material_hash
from star_export.cli.parser import main
from star_export.exporter import publish
from star_export.exporter.export import CALIBRATION, export
from star_export.graph.precisions import PRECISIONS
from star_export.validator.ladder import validate

# All layers are calibrated; few components are exported, so that a run takes seconds.
OPTIONS = {"precision": "int4", "components": ["base_ar", "image_head"], "calibrate": 2}


@pytest.fixture(scope="module")
def calibrated(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(str(mini_checkpoint), out=tmp_path_factory.mktemp("calibrated") / "bundle", **OPTIONS)


def test_a_calibrated_bundle_validates_and_says_what_it_was_calibrated_on(
    calibrated: Path, tmp_path: Path
) -> None:
    manifest = Bundle.open(calibrated).manifest
    assert manifest.calibration is not None
    found = asdict(manifest.calibration)
    assert len(found.pop("sha256")) == 64
    assert found == {"prompts": 2, "edits": 1, "questions": 1, "images": 0}
    table = json.loads((calibrated / CALIBRATION).read_text())
    assert CALIBRATION in manifest.files
    assert {name.partition(".")[0] for name in table} == set(CALIBRATED)
    assert {row["format"] for name, row in table.items() if name.startswith("image_head")} == {"int8"}
    assert sum(row["format"] == "int4" for row in table.values()) == 7 * 4  # the layers of base_ar
    better = [row["lost"] <= row["lost_if_rounded_to_nearest"] for row in table.values()]
    assert np.mean(better) > 0.9 and all(row["bytes"] > 0 for row in table.values())
    assert validate(shutil.copytree(calibrated, tmp_path / "b")).passed  # it writes a certificate


def test_its_codes_are_not_those_of_rounding_to_nearest(calibrated: Path, bundle_of) -> None:
    data = "base_ar/model.onnx.data"
    assert (calibrated / data).read_bytes() != (bundle_of("int4") / data).read_bytes()
    assert Bundle.open(bundle_of("int4")).manifest.calibration is None


def test_floats_with_scales_of_scales_are_stored_as_they_were_chosen(
    mini_checkpoint: Path, bundle_of, tmp_path: Path
) -> None:
    options = OPTIONS | {"precision": "nvfp4", "components": ["base_ar"]}
    out = export(str(mini_checkpoint), out=tmp_path / "bundle", **options)
    data = "base_ar/model.onnx.data"
    assert (out / data).read_bytes() != (bundle_of("nvfp4") / data).read_bytes()
    assert {row["format"] for row in json.loads((out / CALIBRATION).read_text()).values()} >= {"nvfp4"}
    assert validate(out).passed  # the golden tensors are of the codes that were chosen


STOPPED = "calibrate stacked_ar layer 0"


@pytest.fixture
def stopped(mini_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an export was to go that was killed in a layer, with half of the layer's files written."""

    def stopping(stage: publish.Stage, name: str, write, original=publish.Stage.step) -> None:
        if name == STOPPED:
            write()
            raise KeyboardInterrupt
        original(stage, name, write)

    with monkeypatch.context() as patch:
        patch.setattr(publish.Stage, "step", stopping)
        with pytest.raises(KeyboardInterrupt):
            export(str(mini_checkpoint), out=tmp_path / "out", **OPTIONS)
    return tmp_path / "out"


def goes_on(checkpoint: Path, out: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Repeat the export, which must give the same bytes; what it calibrated anew."""
    done: list[str] = []
    for owner, name in ((Decodes, "decode"), (Calibration, "_calibrate")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner,
            name,
            lambda self, *given, original=original: (
                done.append(" ".join(map(str, given[:2]))) or original(self, *given)
            ),
        )
    export(str(checkpoint), out=out, **OPTIONS)
    assert (out / "manifest.json").read_bytes() == (calibrated / "manifest.json").read_bytes()
    Bundle.open(out).verify()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    return done


def test_a_calibration_that_was_killed_goes_on_at_its_layer(
    mini_checkpoint: Path, stopped: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish.stage_path(stopped) / publish.SCRATCH / "calibration"
    streams = {path.name.removesuffix(".stream.safetensors") for path in folder.glob("*.stream.*")}
    # Of layers that are done, only what the next one reads is there; the stopped one's own will be removed.
    assert streams == {"base_ar.layers.3", "stacked_ar.layers.0"}
    assert len(list(folder.glob("*.weights.safetensors"))) == 4 + 1
    assert goes_on(mini_checkpoint, stopped, calibrated, monkeypatch) == ["stacked_ar 0", "stacked_ar 1"]


def test_a_layer_that_was_damaged_is_calibrated_anew_from_the_first_on(
    mini_checkpoint: Path, stopped: Path, calibrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it was made from is gone."""
    folder = publish.stage_path(stopped) / publish.SCRATCH / "calibration"
    damaged = folder / "base_ar.layers.1.weights.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    layers = [*(f"base_ar {i}" for i in range(4)), "stacked_ar 0", "stacked_ar 1"]
    assert goes_on(mini_checkpoint, stopped, calibrated, monkeypatch) == ["", *layers]


def test_the_hash_is_that_of_all_that_is_given() -> None:
    image = np.zeros((4, 6, 3), np.uint8)
    materials = [
        Material(("a", "b"), (), ("c",)),
        Material(("a",), ("b",), ("c",)),
        Material(("ab",), (), ("c",)),
        Material(("a", "b"), (), ("c",), (image,)),
        Material(("a", "b"), (), ("c",), (image.reshape(6, 4, 3),)),
        Material(("a", "b"), (), ("c",), (image + np.uint8(1),)),
    ]
    assert len({material_hash(material) for material in materials}) == len(materials)
    assert material_hash(materials[3]) == material_hash(Material(("a", "b"), (), ("c",), (image.copy(),)))


# Row 65
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": -1}, "expected 1 prompt or more, or 0 for the default, got -1"),
        ({"calibrate": 2, "precision": "bf16"}, "expected a precision with quantised weights, got bf16"),
        ({"calibration": "images"}, "expected --calibrate as well, got images alone"),
        ({"calibrate": 2, "components": ["vq_decoder"]}, "expected one of base_ar, stacked_ar, image_head"),
    ],
    ids=lambda value: "",
)
def test_a_calibration_of_nothing_is_refused_before_the_checkpoint_is_read(
    tmp_path: Path, options: dict, words: str
) -> None:
    with pytest.raises(UsageError) as error:
        export("/no/such/checkpoint", out=tmp_path / "out", **({"precision": "int4"} | options))
    assert words in error.value.where and len(str(error.value).splitlines()) == 3
    assert not list(tmp_path.iterdir())


# Row 64
def test_a_folder_is_refused_before_the_checkpoint_is_read(tmp_path: Path, capsys) -> None:
    (tmp_path / "images").mkdir()
    words = ["export", "/no/such/checkpoint", "--out", str(tmp_path / "out"), "--precision", "int4"]
    assert main([*words, "--calibrate", "2", "--calibration", str(tmp_path / "images")]) == 3
    what, where, fix = capsys.readouterr().err.splitlines()
    assert "holds nothing to use" in what and str(tmp_path / "images") in where and fix
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert main([*words, "--calibrate", "x"]) == 2
    (tmp_path / "images" / "prompts.txt").write_text("a cat")
    assert main([*words, "--calibrate", "2", "--calibration", str(tmp_path / "images")]) == 3
    assert "expected 2 prompts to draw, got 1" in capsys.readouterr().err


def run_until(miniature, folder: Path, planted: dict[str, Tensor], last: str) -> None:
    """Calibrate the miniature with other weights up to the step `last`."""
    given = planted | {"image_table.weight": miniature.star.image_table.weight.detach()}
    lazy = {
        name: LazyTensor(
            name, tuple(value.shape), torch.float32, folder / "planted", lambda value=value: value
        )
        for name, value in given.items()
    }
    decodes = Decodes(
        folder,
        miniature.config,
        {**miniature.tensors, **lazy},
        True,
        miniature.chat,
        miniature.model,
        Material(("a red cat",), (), ("what is",)),
        silent,
    )
    for name, (run, _) in Calibration(decodes, PRECISIONS["int4"]).steps().items():
        run()
        if name == last:
            break


WEIGHT = "base_ar.layers.1.mlp.down_proj.weight"


# Row 66
def test_activations_that_are_not_finite_are_refused_with_their_layer(miniature, tmp_path: Path) -> None:
    """Every weight is finite, and their products are not."""
    huge = torch.full(miniature.tensors[WEIGHT].shape, 3e38)
    with pytest.raises(InputError) as error:
        run_until(miniature, tmp_path, {WEIGHT: huge}, "calibrate base_ar layer 1")
    assert "base_ar.layers.1: expected" in error.value.where and len(str(error.value).splitlines()) == 3


# Row 7
def test_a_weight_that_is_not_finite_is_refused_by_the_first_step(miniature, tmp_path: Path) -> None:
    broken = miniature.tensors[WEIGHT].load().float().clone()
    broken[3, 5] = torch.nan
    with pytest.raises(CheckpointError) as error:
        run_until(miniature, tmp_path, {WEIGHT: broken}, "decode the examples")
    assert f"{WEIGHT}: 1 of {broken.numel()} numbers are NaN" in error.value.where
