"""The ladder passes what is right in every precision,
and names component, tensor, limit and value of what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from engines.bundle.files import sha256_of
from engines.bundle.reader import Bundle
from engines.errors import InputError, MissingError, ParityError, UsageError
from star_export.cli.parser import main
from star_export.graph import nvfp4
from star_export.validator.ladder import validate
from star_export.validator.run_golden import identity
from tests.helpers.spoilt_bundle import copied, rehash, spoil_golden, spoil_weight


@pytest.fixture
def bundle(mini_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the miniature bundle to spoil."""
    return copied(mini_bundle, tmp_path)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4", "fp8", "nvfp4"])
def test_every_precision_passes_at_rounding_level(
    bundle_of: Callable[[str], Path], tmp_path: Path, precision: str
) -> None:
    root = copied(bundle_of(precision), tmp_path)
    certificate = validate(root, report=tmp_path / "r.html")
    assert certificate.passed and [rung.name for rung in certificate.rungs] == [
        "files and graphs",
        "prepared inputs",
        "golden tensors",
        "dialects",
        "decoder steps",
        "whole runs",
        "other ways",
        "fast path",
    ]
    checked = {row.component for rung in certificate.rungs for row in rung.rows}
    manifest = Bundle.open(root).manifest
    assert checked == {*manifest.components, *manifest.tables, "runtime"}
    stored = json.loads((root / "certificates/onnxruntime-exact-cpu.json").read_text())
    assert stored["passed"] is True and stored["manifest_sha256"] == sha256_of(root / "manifest.json")
    assert any("fp32 twins" in gap for gap in certificate.not_proven) is (precision != "fp32")
    assert "passed" in (tmp_path / "r.html").read_text() and "FAILED" not in (tmp_path / "r.html").read_text()
    assert Bundle.open(root).manifest.precision == precision  # a certificate is no file of the bundle
    fast = certificate.rungs[-1]
    if precision not in ("int8", "int4"):
        assert not fast.rows and "are one path" in fast.note
        return
    assert {row.component for row in fast.rows} == {*manifest.components, "runtime"}
    for row in fast.rows:  # int8 rounding is there, and is what export recorded: a third of the tolerance
        if row.worst.tensor == "hidden_states":
            assert row.worst.value > 1e-2 and row.worst.value / row.worst.tolerance < 0.5
    assert any("ids as the exact path's: " in row.check for row in fast.rows)


def test_a_fast_path_that_is_off_by_more_than_its_recorded_noise_is_refused(
    bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    root = copied(bundle_of("int4"), tmp_path)

    def shrink(tensors: dict) -> dict:
        return {k: v / 10 if "/int8/" in k else v for k, v in tensors.items()}

    spoil_golden(root, "stacked_ar/golden.safetensors", shrink)
    with pytest.raises(ParityError, match="stacked_ar: case .*expected at most"):
        validate(root)


def test_an_nvfp4_decoder_that_does_not_round_its_activations_is_refused(
    bundle_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its tolerance is wide, since a rounding that falls the other way is seen; leaving it out exceeds it."""
    root = copied(bundle_of("nvfp4"), tmp_path)
    twin = onnx.load(root / "base_ar/twin.onnx", load_external_data=False)
    (function,) = [function for function in twin.functions if function.name == nvfp4.NAME]
    (last,) = [node for node in function.node if "rounded" in node.output]
    last.CopyFrom(helper.make_node("Identity", ["x"], ["rounded"]))
    (root / "base_ar/twin.onnx").write_bytes(twin.SerializeToString())
    rehash(root)
    with pytest.raises(ParityError, match="base_ar: case .*expected at most"):
        validate(root)


def test_identity_counts_equal_ids_and_names_the_first_other() -> None:
    wanted = np.array([5, 6, 7, 8])
    for got, said, share in (
        ([5, 6, 7, 8], "all", 0.0),
        ([5, 9, 7, 8], "3 of 4, first other at 1", 0.25),
        ([5, 6], "2 of 4, first other at 2", 0.5),
    ):
        row = identity("answer", "ids", np.array(got), wanted)
        assert row.check == f"answer: ids as the exact path's: {said}" and row.worst.value == share


FAULTS = {
    "a bias dropped": ("base_ar", "layers.0.self_attn.q_proj.bias", np.zeros_like),
    "a weight transposed": ("stacked_ar", "layers.1.self_attn.q_proj.weight", lambda w: w.T),
    "a layer zeroed": ("vision_encoder", "blocks.2.attn.proj.weight", np.zeros_like),
    "one wrong number": (
        "text_head",
        "text_head.weight",
        lambda w: w + 1e-1 * (np.arange(w.size).reshape(w.shape) == 70),
    ),
    "a number that is not one": (
        "base_ar",
        "layers.3.mlp.down_proj.weight",
        lambda w: np.where(np.arange(w.size).reshape(w.shape) == 7, np.nan, w),
    ),
    "channels reversed": ("vq_decoder", "conv_out.weight", lambda w: w[::-1]),
    "head shifted by one id": ("image_head", "image_head.weight", lambda w: np.roll(w, 1, axis=1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(bundle: Path, capsys: pytest.CaptureFixture, fault: str) -> None:
    component, weight, change = FAULTS[fault]
    spoil_weight(bundle, component, weight, change)
    assert main(["validate", str(bundle), "--no-progress"]) == 4
    what, where, fix = capsys.readouterr().err.strip().splitlines()
    assert what.startswith("error: ") and fix.startswith("  fix: ")
    assert f"where: {component}: case " in where and "expected" in where and "got" in where
    assert json.loads((bundle / "certificates/onnxruntime-exact-cpu.json").read_text())["passed"] is False


def test_a_failed_validation_takes_the_old_certificate_away(bundle: Path) -> None:
    path = bundle / "certificates/onnxruntime-exact-cpu.json"
    assert validate(bundle).passed and json.loads(path.read_text())["passed"] is True
    spoil_weight(bundle, "base_ar", "layers.3.mlp.up_proj.weight", lambda w: w * 2)
    with pytest.raises(ParityError):
        validate(bundle)
    assert json.loads(path.read_text())["passed"] is False


def test_ids_of_whole_runs_are_compared(bundle: Path) -> None:
    spoil_golden(
        bundle, "golden.safetensors", lambda g: g | {"sample/out/image_ids": g["sample/out/image_ids"] ^ 1}
    )
    with pytest.raises(ParityError, match="image_ids: expected at most 0, got 1") as caught:
        validate(bundle)
    assert caught.value.where.startswith("runtime: sample")


def constant(golden: dict) -> dict:
    return golden | {k: np.full_like(v, 2) for k, v in golden.items() if "/out/hidden_states" in k}


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda g: {}, "at least one case"),
        (constant, "hidden_states"),
        (lambda g: {k: np.zeros_like(v) if "/out/" in k else v for k, v in g.items()}, "zero"),
        (lambda g: {k.replace("hidden_states", "hidden"): v for k, v in g.items()}, "hidden"),
        (
            lambda g: {
                k: np.where(v == v.max(), np.inf, v).astype(v.dtype) if "/out/hidden" in k else v
                for k, v in g.items()
            },
            "finite",
        ),
        (lambda g: {k: v for k, v in g.items() if "present.1.value" not in k}, "present.1.value"),
    ],
    ids=["no case", "constant", "zeros", "renamed", "not finite", "one output less"],
)
def test_a_golden_set_that_proves_nothing_is_refused(bundle: Path, change: Callable, words: str) -> None:
    spoil_golden(bundle, "base_ar/golden.safetensors", change)
    with pytest.raises(InputError) as caught:
        validate(bundle)
    assert not isinstance(caught.value, ParityError) and words in caught.value.where


def test_a_graph_that_breaks_a_rule_is_refused(bundle: Path) -> None:
    path = bundle / "base_ar/model.onnx"
    model = onnx.load(path, load_external_data=False)
    [attention] = [node for node in model.functions[0].node if node.op_type == "Attention"]
    attention.attribute.append(onnx.helper.make_attribute("is_causal", 1))
    path.write_bytes(model.SerializeToString())
    rehash(bundle)
    with pytest.raises(InputError, match="rule"):
        validate(bundle)


def test_a_changed_file_is_found_before_anything_runs(bundle: Path) -> None:
    data = bytearray((bundle / "base_ar/model.onnx.data").read_bytes())
    data[1000] ^= 1
    (bundle / "base_ar/model.onnx.data").write_bytes(data)
    with pytest.raises(InputError, match="has changed since the export"):
        validate(bundle)


def test_what_cannot_be_validated_here_is_said(bundle: Path) -> None:
    with pytest.raises(UsageError, match="No such target"):
        validate(bundle, target="rtx-4091")
    with pytest.raises(UsageError, match="No such backend"):
        validate(bundle, backend="onnx")
    with pytest.raises(MissingError):
        validate(bundle, backend="onnxruntime-cuda")
