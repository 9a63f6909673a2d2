"""A certificate holds for the bytes, device and contents that it was written for, and for no other."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engines.bundle.files import write_atomic
from engines.bundle.manifest import FileSpec
from engines.bundle.reader import Bundle
from engines.bundle.records import json_from_record
from engines.bundle.seal import content_sha256
from engines.errors import InputError, MissingError, ParityError
from engines.targets import TARGETS
from engines.tensorrt import plan as plans
from star_export.cli.inspect import describe, line_from_link
from star_export.cli.parser import main
from star_export.golden.compare import Comparison
from star_export.validator import certificate as certificates
from star_export.validator import chain
from star_export.validator.certificate import (
    Certificate,
    Row,
    Rung,
    certificate_path,
    json_from_certificate,
    new_certificate,
)
from tests.helpers.decoder_bundle import write_decoder_bundle

CPU, GPU = "onnxruntime-exact", "tensorrt:rtx-3090"
PLAN = b"a plan" * 100


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return Bundle.open(write_decoder_bundle(tmp_path / "bundle"))


@pytest.fixture
def with_plan(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """With a plan of `base_ar`, on a machine that seems to have an RTX 3090."""
    put_device(monkeypatch, "NVIDIA GeForce RTX 3090")
    spec = bundle.component("base_ar")
    made = plans.PlanSpec(
        onnx=plans.onnx_hashes(bundle, "base_ar"),
        profiles=(),
        inputs=spec.inputs,
        outputs=spec.outputs,
        plan=FileSpec(len(PLAN), hashlib.sha256(PLAN).hexdigest()),
        kv_cache_updates=2,
        seconds=1.5,
    )
    build = replace(plans.build_header(TARGETS["rtx-3090"], "1.7.1.116"), components={"base_ar": made})
    folder = bundle.path / "plans/rtx-3090"
    folder.mkdir(parents=True)
    (folder / "base_ar.plan").write_bytes(PLAN)
    (folder / "build.json").write_text(json_from_record(build))
    return bundle


def put_device(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    def device_name(backend: str) -> str:
        if ":" not in backend:
            return "cpu"
        if name is None:
            raise MissingError("No GPU was found", where="w", fix="f")
        return name

    for module in (certificates, chain):
        monkeypatch.setattr(module, "device_name", device_name)
    monkeypatch.setattr(certificates, "driver_of", lambda backend: "13.1" if ":" in backend else "")


def certify(bundle: Bundle, backend: str, value: float = 1e-6, psnr: float = math.inf) -> Path:
    """Write the certificate of a validation whose one comparison has `value`."""
    rows = (Row("base_ar", "case prefill", Comparison("hidden_states", value, 2e-4, psnr_db=psnr), 3),)
    made = new_certificate(bundle, backend, "fp32", (Rung("golden tensors", rows, 1.0),))
    path = certificate_path(bundle.path, backend, made.device)
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, json_from_certificate(made).encode())
    return path


def test_a_certificate_is_read_back_as_it_was(bundle: Bundle) -> None:
    path = certify(bundle, CPU, psnr=120.0)
    found = chain.read_certificate(path)
    assert found.passed and found.manifest_sha256 and "onnx" in found.versions and found.driver == ""
    assert json_from_certificate(found) == path.read_text()
    assert isinstance(found, Certificate) and math.isnan(found.rungs[0].rows[0].worst.max_abs)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_stays_a_failure(bundle: Bundle, value: float) -> None:
    found = chain.read_certificate(certify(bundle, CPU, value))
    assert not found.passed and not found.rungs[0].passed


def test_it_holds_for_these_bytes_on_this_device(bundle: Bundle, capsys: pytest.CaptureFixture) -> None:
    certify(bundle, CPU)
    assert main(["certificate", str(bundle.path), "--backend", CPU, "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "onnxruntime-exact-cpu.json  passed" in out and "not proven: inputs other than" in out
    assert main(["certificate", str(bundle.path), "--json", "--no-progress"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["certificates"]
    assert (entry["state"], entry["device"], entry["compared"]) == ("passed", "cpu", {"golden tensors": 3})


def flip_a_number(data: dict) -> None:
    data["rungs"][0]["rows"][0]["worst"]["value"] = 1e-9


DAMAGE: dict[str, tuple[Callable[[dict], object], str]] = {
    "a flipped number": (flip_a_number, "was changed after it was written"),
    "a flipped verdict": (lambda d: d.update(passed=False), "was changed after it was written"),
    "an unknown key": (lambda d: d.update(more=1), "was changed after it was written"),
    "a key less": (lambda d: d.pop("plans"), "was changed after it was written"),
    "no hash": (lambda d: d.pop("content_sha256"), "was changed after it was written"),
    "another manifest": (lambda d: d.update(manifest_sha256="0" * 64), "was changed after it was written"),
    "an old schema": (lambda d: d.update(schema=2), "is of another version"),
    "a schema that is no number": (lambda d: d.update(schema="3"), "is of another version"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_certificate_that_was_changed_by_hand_is_told_as_such(
    bundle: Bundle, capsys: pytest.CaptureFixture, damage: str
) -> None:
    change, words = DAMAGE[damage]
    path = certify(bundle, CPU)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=words):
        chain.read_certificate(path)
    refused(bundle, CPU, "This certificate is damaged", capsys)
    assert "passed" not in describe(bundle.path)["certificates"][0]
    assert main(["certificate", str(bundle.path), "--no-progress"]) == 0, "a list shows what it cannot trust"
    assert "damaged" in capsys.readouterr().out
    assert main(["inspect", str(bundle.path)]) == 3


def test_with_its_hash_made_again_unknown_keys_and_types_are_still_refused(bundle: Bundle) -> None:
    path = certify(bundle, CPU)
    for change in ({"more": 1}, {"passed": "yes"}, {"rungs": [1]}, {"rungs": [{"rows": [{"worst": 3}]}]}):
        data = json.loads(path.read_text()) | change
        data.pop("content_sha256")
        data["content_sha256"] = content_sha256(data)
        with pytest.raises(InputError, match="invalid entry"):
            chain.certificate_from_json(json.dumps(data), where="c.json")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 3, "schema": 3}', '{"schema": NaN}', "\x00"])
def test_what_is_no_json_is_refused(bundle: Bundle, text: str) -> None:
    path = certify(bundle, CPU)
    path.write_text(text)
    assert chain.link(bundle, path).state == chain.DAMAGED
    path.write_bytes(b"\xff\xfe")
    assert chain.link(bundle, path).state == chain.DAMAGED


def test_one_of_other_bytes_is_refused(bundle: Bundle, capsys: pytest.CaptureFixture) -> None:
    certify(bundle, CPU)
    manifest = bundle.path / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    refused(bundle, CPU, "This certificate is of other bytes", capsys, "manifest.json: expected sha256")
    (line,) = describe(bundle.path)["certificates"]
    assert "of other bytes" in line and "passed" not in line


def test_a_changed_plan_is_of_other_bytes(with_plan: Bundle, capsys: pytest.CaptureFixture) -> None:
    certify(with_plan, GPU)
    assert chain.check_certified(with_plan, GPU).plans == {"base_ar": hashlib.sha256(PLAN).hexdigest()}
    assert chain.check_certified(with_plan, GPU).driver == "13.1"
    plan = with_plan.path / "plans/rtx-3090/base_ar.plan"
    plan.write_bytes(PLAN[:-1] + b"!")
    refused(with_plan, GPU, "This certificate is of other bytes", capsys, "another sha256")
    assert main(["inspect", str(with_plan.path)]) == 3, "it shows the plan, and says that it was changed"
    said = capsys.readouterr()
    assert "another sha256" in said.out and "plan rtx-3090/base_ar: another sha256" in said.err
    plan.unlink()
    refused(with_plan, GPU, "This certificate is of other bytes", capsys, "missing")
    (plan.parent / "build.json").unlink()
    refused(with_plan, GPU, "This certificate is of other bytes", capsys, "There are no plans for rtx-3090")


def test_one_of_another_device_is_refused(
    with_plan: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    certify(with_plan, GPU)
    for other in ("NVIDIA GeForce RTX 4090", None):
        put_device(monkeypatch, other)
        refused(with_plan, GPU, "This certificate is of another device", capsys, "NVIDIA GeForce RTX 3090")
        (link,) = chain.links(with_plan)
        assert "passed" not in line_from_link(link)


def test_one_that_failed_and_one_that_is_absent(bundle: Bundle, capsys: pytest.CaptureFixture) -> None:
    refused(bundle, CPU, "There is no certificate of this backend", capsys, "got none")
    certify(bundle, CPU, value=1.0)
    with pytest.raises(ParityError, match="was validated, and failed"):
        chain.check_certified(bundle, CPU)
    assert main(["certificate", str(bundle.path), "--backend", CPU, "--no-progress"]) == 4
    assert "FAILED" in describe(bundle.path)["certificates"][0]


def refused(bundle: Bundle, backend: str, what: str, capsys: pytest.CaptureFixture, where: str = "") -> None:
    """`certificate --backend` exits with 3 and three lines."""
    capsys.readouterr()
    assert main(["certificate", str(bundle.path), "--backend", backend, "--no-progress"]) == 3
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and lines[0] == f"error: {what}" and where in lines[1]
    assert lines[2].startswith("  fix: star-export validate")
