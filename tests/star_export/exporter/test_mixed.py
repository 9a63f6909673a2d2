"""Mixed precision of the miniature: what is measured, what is refused, and the bundle that comes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.bundle.reader import Bundle
from engines.errors import InputError, UsageError
from engines.fit.memory import Use, task_memory, workspace_bytes
from engines.targets import target_from_name
from engines.tensorrt.build import check_precision
from reference import tasks
from reference.config import config_from_files
from reference.weights import load_star, resolve_checkpoint
from star_export.calibration.effects import Effects
from star_export.choice import Formats, formats_of
from star_export.cli.inspect import describe_bundle
from star_export.exporter import export as exporter
from star_export.exporter import publish
from star_export.exporter.budget import SHARE, budget_of, bytes_of, layers_of
from star_export.exporter.export import export
from star_export.golden.divergence import divergence
from star_export.golden.tolerances import compute_of
from star_export.graph.precisions import EQUAL_LAYERS
from star_export.planner.plan import plan
from star_export.planner.source import Source, find_source, sizes_from_source
from star_export.validator.ladder import validate

BITS = 6.0


@pytest.fixture(scope="module")
def made(mini_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    """A bundle in mixed precision, and what its export had decoded, in memory."""
    kept: dict[str, object] = {}
    patch, measured = pytest.MonkeyPatch(), Effects._pass_through

    def pass_through(self: Effects) -> None:
        kept["effects"] = self
        kept["examples"] = self.decodes.read("examples")
        measured(self)

    patch.setattr(Effects, "_pass_through", pass_through)
    patch.setattr("star_export.calibration.effects.TOKENS", 64)
    out = tmp_path_factory.mktemp("mixed") / "bundle"
    export(str(mini_checkpoint), out=out, precision="mixed", bits=BITS)
    patch.undo()
    return out, kept


def formats_in(path: Path) -> Formats:
    found = formats_of(Bundle.open(path))
    assert found
    return found


def test_the_measured_divergence_of_a_layer_is_that_of_the_whole_model(mini_checkpoint, made) -> None:
    """The same number from two whole models, one of them with rounded weights: no streams, files or steps."""
    out, kept = made
    effects, formats = kept["effects"], formats_in(out)
    images = [example for example in kept["examples"] if example.image]
    assert len(images) == formats.images == 4
    settings = effects.decodes.model.sampling.generate

    def logits(star) -> list[np.ndarray]:
        found = []
        for example in images:
            length = example.embeds.shape[1]
            caches = tasks.new_caches(star, 2, capacity_tokens=length)
            _, hidden = tasks.both_decoders(star, example.embeds, example.positions, 0, caches)
            heads = star.image_head(hidden[:, -star.config.vq.image_tokens :])
            found.append(tasks.guide(heads, settings.guidance)[0].numpy())
        return found

    with torch.inference_mode():
        star = load_star(resolve_checkpoint(str(mini_checkpoint)))
        first = logits(star)
        for layer in (formats.layers[1], formats.layers[-1]):
            for format, measured in layer.kl.items():
                star = load_star(resolve_checkpoint(str(mini_checkpoint)))
                changed = 0
                for name, parameter in star.named_parameters():
                    if name.startswith(f"{layer.layer}.") and parameter.dim() == 2:
                        parameter.data = EQUAL_LAYERS[format].rounded(name, parameter.data)
                        changed += 1
                assert changed == 7
                pairs = zip(logits(star), first, strict=True)
                top_k = min(settings.top_k, star.config.vq.codebook_size)
                kl = [divergence(a, b, top_k=top_k, top_p=settings.top_p).kl for a, b in pairs]
                assert measured == pytest.approx(np.mean(kl), rel=1e-2, abs=1e-7), (layer.layer, format)


def test_every_layer_is_measured_in_both_formats_and_int4_does_more_harm(made) -> None:
    formats = formats_in(made[0])
    assert [found.layer for found in formats.layers] == [
        *(f"base_ar.layers.{i}" for i in range(4)),
        *(f"stacked_ar.layers.{i}" for i in range(2)),
    ]
    assert all(found.kl["int4"] > 3 * found.kl["int8"] > 0 for found in formats.layers)


def test_the_bundle_stores_the_formats_that_were_chosen(made) -> None:
    bundle, formats = Bundle.open(made[0]), formats_in(made[0])
    assert bundle.manifest.precision == "mixed" and "formats.json" in bundle.manifest.files
    assert formats.bytes <= formats.budget.bytes == int(BITS * formats.weights / 8)
    assert 0 < len(formats.wide()) < len(formats.layers)
    for component in ("base_ar", "stacked_ar"):
        ours = [found for found in formats.layers if found.layer.startswith(f"{component}.")]
        for name in ("int4", "int8"):
            stored = sum(found.bytes[name] for found in ours if found.chosen == name)
            assert bundle.manifest.components[component].weights.get(name, 0) == stored
    said = f"{formats.bytes} bytes of a budget of {formats.budget.bytes}"
    assert said in describe_bundle(made[0])["layers"]


def test_the_bundle_validates_and_its_report_has_the_table_and_the_plot(made, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    certificate = validate(made[0], report=report)
    assert certificate.passed and {rung.name for rung in certificate.rungs} >= {"whole runs", "fast path"}
    page = report.read_text()
    assert "<h2>Formats of the layers</h2>" in page and "<svg" in page
    assert all(found.layer in page for found in formats_in(made[0]).layers)


@pytest.mark.parametrize("damaged", [False, True], ids=["killed", "killed and damaged"])
def test_an_export_that_was_killed_while_it_measured_gives_the_same_bytes(
    mini_checkpoint, made, tmp_path: Path, monkeypatch, damaged: bool
) -> None:
    """Layers that were measured are not measured again, unless a file of one is damaged."""
    monkeypatch.setattr("star_export.calibration.effects.TOKENS", 64)
    out, measured, calls = tmp_path / "bundle", Effects._measure, []

    def measure(self: Effects, at: int) -> None:
        calls.append(at)
        if calls == [0, 1, 2]:
            raise KeyboardInterrupt
        measured(self, at)

    monkeypatch.setattr(Effects, "_measure", measure)
    options = {"precision": "mixed", "bits": BITS, "components": ["stacked_ar"]}
    with pytest.raises(KeyboardInterrupt):
        export(str(mini_checkpoint), out=out, **options)
    stage = publish.stage_path(out)
    assert stage.exists() and not out.exists()
    if damaged:
        (stage / "scratch" / "calibration" / "base_ar.layers.0.kl.json").write_text("{}")
    export(str(mini_checkpoint), out=out, **options)
    assert calls == ([0, 1, 2, 0, 1, 2, 3, 4, 5] if damaged else [0, 1, 2, 2, 3, 4, 5])
    files, others = (json.loads((b / "manifest.json").read_text())["files"] for b in (out, made[0]))
    assert "formats.json" in files and "stacked_ar/model.onnx.data" in files
    assert all(others[name] == spec for name, spec in files.items())


def test_a_calibrated_export_measures_on_the_examples_of_its_calibration(
    mini_checkpoint, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("star_export.calibration.effects.TOKENS", 64)
    options = {"precision": "mixed", "bits": BITS, "components": ["stacked_ar"]}
    out = export(str(mini_checkpoint), out=tmp_path / "bundle", calibrate=4, **options)
    manifest, formats = Bundle.open(out).manifest, formats_in(out)
    assert manifest.calibration and formats.sha256 == manifest.calibration.sha256
    table = json.loads((out / "calibration.json").read_text())
    chosen = {found.layer: found.chosen for found in formats.layers}
    for weight, row in table.items():
        if weight.startswith(("base_ar", "stacked_ar")):
            assert row["format"] == chosen[".".join(weight.split(".")[:3])], weight


def test_a_device_runs_the_bundle_if_it_has_both_formats(made) -> None:
    bundle = Bundle.open(made[0])
    check_precision(bundle, target_from_name("rtx-4060"))
    with pytest.raises(InputError, match="does not run mixed"):
        check_precision(bundle, target_from_name("rtx-2080-ti"))
    places = plan(str(made[0]), targets=["rtx-4060", "rtx-2080-ti"]).places
    assert [place.reason for place in places] == [None, "runs fp16"]
    assert compute_of("onnxruntime", "mixed") == "int8" and compute_of("tensorrt:t", "mixed") == "bf16"


@pytest.mark.parametrize(
    "options,said",
    [
        ({"precision": "mixed"}, ("needs one budget", "neither")),
        ({"precision": "mixed", "bits": 5.0, "target": "rtx-4060"}, ("one budget", "bits 5.0 and target")),
        ({"precision": "int4", "bits": 5.0}, ("without mixed precision", "got int4")),
        ({"precision": "mixed", "bits": 4.0}, ("below the smallest", "got 129024 bytes (4.000 bits")),
        ({"precision": "mixed", "bits": 9.0}, ("above the largest", "bits per weight) in int8")),
        ({"precision": "mixed", "bits": float("nan")}, ("below the smallest", "got 0 bytes")),
        ({"precision": "mixed", "bits": float("inf")}, ("below the smallest", "got 0 bytes")),
        ({"precision": "mixed", "target": "rtx-9090"}, ("No such target", "rtx-4060")),
        ({"precision": "mixed", "target": "rtx-2080-ti"}, ("does not run mixed", "int4 and int8")),
        ({"precision": "mixed", "target": "rtx-4060"}, ("above the largest", "--precision int8")),
    ],
)
def test_what_cannot_be_met_is_refused_before_anything_is_written(
    mini_checkpoint, tmp_path: Path, monkeypatch, options, said
) -> None:
    monkeypatch.setattr(exporter, "checkpoint_hashes", lambda *_: pytest.fail("the checkpoint was read"))
    with pytest.raises(UsageError) as error:
        export(str(mini_checkpoint), out=tmp_path / "out", **options)
    text = f"{error.value.what} {error.value.where} {error.value.fix}"
    assert all(words in text for words in said), text
    assert not list(tmp_path.iterdir())


def test_the_budget_of_a_device_is_what_generate_leaves_in_its_share_of_the_memory() -> None:
    """With every layer in int8, less what the budget lacks for that, the share is filled."""
    config = find_source("star-7b").config
    budget, layers = budget_of(config, bits=None, target="rtx-5070"), layers_of(config).values()
    smallest, largest = (
        sum(bytes_of(shapes, EQUAL_LAYERS[name]) for shapes in layers) for name in ("int4", "int8")
    )
    assert smallest < budget.bytes < largest
    assert (budget.memory_bytes, budget.share) == (12 * 10**9, SHARE)
    sizes = sizes_from_source(Source(config, 0), "int8")
    use = Use(rows=2, capacity_tokens=2048, prefill_tokens=2048, on_cpu=False)
    taken = task_memory(sizes, "generate", use).resident_bytes + workspace_bytes(sizes, use)
    assert taken + budget.bytes - largest == int(SHARE * budget.memory_bytes)
    with pytest.raises(UsageError, match="below the smallest"):
        budget_of(config, bits=None, target="rtx-4060")


def test_the_layers_are_those_of_both_decoders(mini_checkpoint) -> None:
    files = resolve_checkpoint(str(mini_checkpoint))
    layers = layers_of(config_from_files(files.config_json, files.qwen_folder))
    assert len(layers) == 4 + 2 and all(len(shapes) == 7 for shapes in layers.values())
