"""The sizes of a bundle are predicted from shapes: weights to the byte, the whole within 2 %."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from engines.bundle.reader import Bundle
from engines.fit.sizes import sizes_from_bundle
from reference.releases import RELEASES
from star_export.exporter.export import export
from star_export.planner.source import find_source, largest_tensor_bytes, sizes_from_source
from tests.helpers.refusals import refused
from tests.helpers.released import SIZES, qwen_json, star_json, write_configs


def test_mixed_is_planned_as_the_smallest_bundle_with_both_decoders_in_int4() -> None:
    source = find_source("star-3b")
    sizes = {name: sizes_from_source(source, name) for name in ("int8", "int4", "mixed")}
    assert sizes["mixed"].bundle_bytes < sizes["int4"].bundle_bytes < sizes["int8"].bundle_bytes
    for name, decoder in (("mixed", "stacked_ar"), ("mixed", "base_ar"), ("int4", "base_ar")):
        parts = [found for part, found in sizes[name].formats.items() if part.startswith(decoder)]
        assert parts and all("int8" not in found and "int4" in found for found in parts), (name, decoder)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4", "fp8", "nvfp4"])
def test_a_source_has_the_sizes_of_its_exported_bundle(
    mini_checkpoint: Path, bundle_of, precision: str
) -> None:
    wanted = sizes_from_bundle(Bundle.open(bundle_of(precision)))
    got = sizes_from_source(find_source(str(mini_checkpoint)), precision)
    assert got.graphs == wanted.graphs and got.tables == wanted.tables
    assert (got.model, got.precision) == (wanted.model, wanted.precision)
    assert got.bundle_bytes == pytest.approx(wanted.bundle_bytes, rel=0.02)


def test_a_decoder_in_parts_has_the_sizes_of_its_parts(mini_checkpoint: Path, tmp_path: Path) -> None:
    options = {"precision": "int4", "components": ["base_ar", "token_embedding"], "part_bytes": 60_000}
    bundle = export(str(mini_checkpoint), out=tmp_path / "b", **options)
    wanted = sizes_from_bundle(Bundle.open(bundle))
    got = sizes_from_source(
        find_source(str(mini_checkpoint)), "int4", ["base_ar", "token_embedding"], part_bytes=60_000
    )
    assert got.graphs == wanted.graphs and len(got.graphs) > 1
    assert got.tables == wanted.tables and got.tables["token_embedding"] > 0


@pytest.mark.parametrize("size", SIZES)
def test_a_release_needs_no_file_and_no_network(
    size: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(*_, **__):
        raise AssertionError("a plan went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    source = find_source(f"star-{size.lower()}")
    assert source.config == write_configs(tmp_path, star_json(size), qwen_json(size))
    sizes = sizes_from_source(source, "bf16")
    facts = SIZES[size]
    assert (
        sizes.model.hidden_size == facts["hidden"] and sizes.model.cache["base_ar"].layers == facts["layers"]
    )
    base, kv = facts["hidden"], 128 * facts["kv_heads"]
    layer = base * base * 2 + base + 2 * (base * kv + kv) + 3 * base * facts["intermediate"] + 2 * base
    assert sizes.weights["base_ar"] == pytest.approx(2 * facts["layers"] * layer, rel=1e-4)
    assert sizes.weights["stacked_ar"] == pytest.approx(2 * facts["stacked"] * layer, rel=1e-4)
    assert sizes.weights["text_head"] == 2 * base * facts["vocab"]
    assert sizes.tables["token_embedding"] == (0 if facts["tied"] else 2 * base * facts["vocab"])
    assert sizes.tables["image_embedding"] == 0  # the head's file holds it
    assert sum(name.startswith("base_ar/") for name in sizes.graphs) > 1
    int4 = sizes_from_source(source, "int4").weights["base_ar"]
    assert int4 / sizes.weights["base_ar"] == pytest.approx((0.5 + 2 / 128) / 2, rel=0.01)
    assert largest_tensor_bytes(source.config) == 4 * base * facts["vocab"]


def test_the_hub_id_of_a_release_is_the_release() -> None:
    assert find_source(RELEASES["star-3b"].star.repository) == find_source("star-3b")


# Row 52
def test_a_source_that_is_not_here_is_not_downloaded() -> None:
    with refused("downloads nothing", "someone/else", "star-3b"):
        find_source("someone/else")


def test_a_checkpoint_that_does_not_match_its_configuration_is_refused(
    mini_checkpoint: Path, tmp_path: Path
) -> None:
    for path in mini_checkpoint.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(mini_checkpoint)
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(path.read_bytes())
    json = tmp_path / "STAR-mini.json"
    json.write_text(json.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    with refused("does not match its configuration", "missing"):
        find_source(str(tmp_path))
