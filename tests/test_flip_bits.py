"""A flipped bit of any file that a verb reads is refused, or changes nothing of what the file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.bundle.reader import Bundle
from star_export.validator.certificate import certificate_path, json_from_certificate, new_certificate
from tests.flip_bits import ACCEPTED, REFUSED, SAME, flipped, verdict
from tests.helpers.decoder_bundle import write_decoder_bundle


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A bundle with plans and a certificate."""
    pytest.importorskip("tensorrt_rtx")
    from engines.tensorrt.build import build_plans

    bundle = Bundle.open(write_decoder_bundle(tmp_path / "bundle"))
    build_plans(bundle, ["rtx-3090"], capacity_tokens=32)
    path = certificate_path(bundle.path, "onnxruntime-exact", "this CPU")
    path.parent.mkdir()
    path.write_text(json_from_certificate(new_certificate(bundle, "onnxruntime-exact", "fp32", ())))
    return bundle.path


def test_no_flipped_bit_of_a_bundle_with_plans_and_a_certificate_is_accepted(whole: Path) -> None:
    counts = flipped(whole, flips=600, seed=0)
    assert not [name for name, found in counts.items() if found[ACCEPTED]]
    assert all(found[REFUSED] for found in counts.values())
    text = {name for name, found in counts.items() if found[SAME]}
    assert text <= {name for name in counts if name.endswith(".json")}
    assert {"manifest.json", "plans/rtx-3090/build.json", "plans/rtx-3090/base_ar.plan"} < set(counts)
    assert any(name.startswith("certificates/") for name in counts)


def test_a_reader_that_does_not_look_is_seen(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert verdict(tmp_path / "x", 9, (tmp_path / "x").read_bytes, b"abc") == ACCEPTED
    assert verdict(tmp_path / "x", 9, lambda: b"abc", b"abc") == SAME
    assert (tmp_path / "x").read_bytes() == b"abc"
