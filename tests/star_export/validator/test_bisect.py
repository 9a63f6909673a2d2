"""A bisection finds nothing in a right bundle, fails a wrong one, and refuses what proves nothing.

`test_bisect_nano.py` and `test_bisect_quantised.py` plant the faults that it must find.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError, ParityError, UsageError
from star_export.cli.parser import main
from star_export.validator import bisect as bisecting
from star_export.validator.bisect import bisect
from tests.helpers.planted_in_graph import plant
from tests.star_export.validator.test_ladder import rehash

pytest.importorskip("polygraphy")


def test_every_component_of_a_right_bundle_is_within_its_tolerance(
    mini_bundle: Path, mini_checkpoint: Path
) -> None:
    bundle = Bundle.open(mini_bundle)
    for name in bundle.manifest.components:
        (found,) = bisect(bundle, name, source=str(mini_checkpoint))
        assert found.first is None and len(found.rows) >= 2, (name, found.first)
        assert max(row.result.value for row in found.rows) < bisecting.TOLERANCE / 3


def test_the_interpreter_of_the_parsed_network_is_compared_too(
    mini_bundle: Path, mini_checkpoint: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    found = bisect(Bundle.open(mini_bundle), "base_ar", source=str(mini_checkpoint), target="rtx-4090")
    assert [one.backend for one in found] == ["onnxruntime-exact", "interpreter-fp32:rtx-4090"]
    assert all(one.first is None and len(one.rows) > 60 for one in found)


@pytest.fixture
def spoilt(mini_bundle: Path, tmp_path: Path) -> Path:
    """A bundle whose base decoder has a fault that no hash finds."""
    path = shutil.copytree(
        mini_bundle, tmp_path / "bundle", ignore=shutil.ignore_patterns("plans", "certificates")
    )
    model = onnx.load(path / "base_ar/model.onnx", load_external_data=False)
    plant(model, "layer zeroed", 2)
    (path / "base_ar/model.onnx").write_bytes(model.SerializeToString())
    rehash(path)
    return path


@pytest.mark.parametrize("asked", [["--bisect", "base_ar"], ["--bisect"]])
def test_validate_shows_the_table_and_fails(
    spoilt: Path, mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture, asked: list[str]
) -> None:
    page = tmp_path / "page.html"
    words = ["validate", str(spoilt), *asked, "--source", str(mini_checkpoint), "--no-progress"]
    words += ["--report", str(page)]
    assert main(words) == ParityError.exit_code
    told = capsys.readouterr()
    assert "module of the reference: base_ar.layers.2\n" in told.out and "its inputs were right" in told.out
    assert len(told.err.splitlines()) == 3 and "base_ar" in told.err
    if not asked[1:]:  # the page of the whole validation stands beside it
        assert "FAILED" in page.read_text()
        page = tmp_path / "page-bisection.html"
    text = page.read_text()
    assert "the first beyond its tolerance is base_ar.layers.2" in text and text.count("<svg") == 1


def test_what_proves_nothing_is_refused(
    mini_bundle: Path, mini_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bundle = Bundle.open(mini_bundle)
    assert main(["validate", str(mini_bundle), "--bisect", "base_ar"]) == UsageError.exit_code
    with pytest.raises(UsageError, match="no such component"):
        bisect(bundle, "paint", source=str(mini_checkpoint))
    from tests.helpers.untrained_nano import write_untrained

    with pytest.raises(InputError, match="does not give the golden tensors"):
        bisect(bundle, "text_head", source=str(write_untrained(tmp_path / "other")))
    model = onnx.load(mini_bundle / "base_ar/model.onnx", load_external_data=False)
    for value in (*model.graph.value_info, *model.graph.output):
        del value.metadata_props[:]
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match="which module"):
        bisecting.modules_from_graph(tmp_path / "model.onnx")
