"""The diffusion transformer and its text encoder in parts: the same image, and memory for one part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from engines import Painting, Star
from engines.bundle.reader import Bundle
from engines.bundle.tensors import HANDED_ON
from engines.errors import InputError, MissingError
from engines.fit.memory import part_bytes, weight_bytes
from engines.sessions import open_session
from reference.weights import named_tensors, resolve_checkpoint
from star_export.components import Part
from star_export.exporter.export import export
from star_export.golden.cases import recorded_cases
from star_export.golden.record import component_golden, oracle_of, outputs_of
from star_export.golden.run_case import run_case
from star_export.golden.tolerances import tolerances_of
from star_export.graph.precisions import PRECISIONS
from star_export.planner.source import find_source, sizes_from_source
from tests.helpers.official_diffusion import CASES, arrays

PARTS = {"dit": 3, "text_encoder": 3}  # a part for each layer of the miniature
OPTIONS = {
    "components": ["codebook", "text_embedding", "text_encoder", "dit", "vae_decoder"],
    "part_bytes": 100_000,
}


@pytest.fixture(scope="module")
def in_parts(diffusion_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(str(diffusion_checkpoint), out=tmp_path_factory.mktemp("bundle") / "parts", **OPTIONS)


def image(bundle: Path, *, memory: int | None = None) -> tuple[np.ndarray, set[str]]:
    """An official case's image from its image tokens, and the components whose parts were loaded in turn."""
    case = CASES["t2i0"]
    painting = Painting(case["resolution"], steps=case["steps"], noise=arrays()["t2i0.noise"])
    with Star(bundle, memory=memory) as star:
        painter = star._painter(painting, case["prompt"], seed=1)
        drawn = painter.paint(arrays()["t2i0.codes"].astype(np.int64))
        return drawn, star.loaded.in_turn


def test_a_bundle_in_parts_paints_what_a_whole_one_does(diffusion_bundle: Path, in_parts: Path) -> None:
    bundle = Bundle.open(in_parts)
    assert {name: len(bundle.parts(name)) for name in PARTS} == PARTS
    wanted, _ = image(diffusion_bundle)
    drawn, in_turn = image(in_parts)
    assert np.array_equal(drawn, wanted) and not in_turn


def test_with_memory_for_one_part_the_parts_are_loaded_in_turn(
    diffusion_bundle: Path, in_parts: Path
) -> None:
    with Star(in_parts) as star:
        sizes = star.loaded.sizes
    largest = max(part_bytes(sizes, name, on_cpu=True) for name in PARTS)
    budget = max(largest, weight_bytes(sizes, "vae_decoder", on_cpu=True))
    assert budget < weight_bytes(sizes, "dit", on_cpu=True)
    drawn, in_turn = image(in_parts, memory=budget)
    assert "dit" in in_turn
    assert np.array_equal(drawn, image(diffusion_bundle)[0])
    with pytest.raises(MissingError, match="budget"):
        image(in_parts, memory=part_bytes(sizes, "dit", on_cpu=True) - 1)


def test_a_session_whose_parts_are_loaded_in_turn_holds_one(in_parts: Path) -> None:
    with Star(in_parts, memory=1 << 21) as star:
        (session,) = star.loaded.sessions("dit")
        assert star.loaded.in_turn == {"dit"} and session.held is None
        name, case = next(iter(recorded_cases(star.bundle, "dit/0").items()))
        wanted = recorded_cases(star.bundle, "dit/2")[name].outputs["velocity"]
        buffers = {t.name: session.buffer(case.inputs[t.name].shape, t.dtype) for t in session.spec.inputs}
        for key, buffer in buffers.items():
            buffer.write(case.inputs[key])
        velocity = buffers["velocity"] = session.buffer(case.inputs["latents"].shape, "float32")
        step = session.bind(buffers)
        step()
        assert session.held[0] == PARTS["dit"] - 1
        np.testing.assert_allclose(velocity.read(), wanted, atol=1e-4)
        del buffers["caption"]
        with pytest.raises(InputError, match="caption: missing"):
            session.bind(buffers)


def test_each_part_computes_its_golden_tensors_and_is_handed_the_last_ones(in_parts: Path) -> None:
    bundle = Bundle.open(in_parts)
    for name in PARTS:
        before: dict[str, np.ndarray] = {}
        for part in bundle.parts(name):
            session = open_session(bundle, part)
            for case, recorded in recorded_cases(bundle, part).items():
                results = run_case(session, recorded, tolerances=tolerances_of(part, "fp32", {}))
                assert results and all(result.passed for result in results), (part, results)
                for out, into in HANDED_ON.items():
                    if (made := before.get(f"{case}/out/{out}")) is not None:
                        assert np.array_equal(made, recorded.inputs[into])
            before = load_file(in_parts / part / "golden.safetensors")


@pytest.mark.parametrize("given", ["caption_embeds", "image_embeds", "time_embeds", "image_cos"])
def test_a_part_that_is_handed_another_input_fails(in_parts: Path, given: str) -> None:
    bundle = Bundle.open(in_parts)
    session, cases = open_session(bundle, "dit/1"), recorded_cases(bundle, "dit/1")
    case = max(cases.values(), key=lambda case: case.inputs[given].size)
    case.inputs[given] = np.roll(case.inputs[given], 1, axis=-1).copy()
    results = run_case(session, case, tolerances=tolerances_of("dit/1", "fp32", {}))
    assert not all(result.passed for result in results)


def test_recorded_parts_of_several_layers_chain_to_the_whole(
    diffusion_checkpoint: Path, tmp_path: Path
) -> None:
    """Also: what the first layer alone gives is recorded of the first part."""
    files = resolve_checkpoint(str(diffusion_checkpoint))
    config = files.config()
    oracle = oracle_of(config, named_tensors(files, config), PRECISIONS["fp32"], rope_bf16=True)
    parts = [Part("dit/0", "dit", range(2)), Part("dit/1", "dit", range(2, 3))]
    component_golden(parts[0], oracle, tmp_path / "0")
    component_golden(parts[1], oracle, tmp_path / "1", before=tmp_path / "0")
    first, last = load_file(tmp_path / "0"), load_file(tmp_path / "1")
    case = next(iter(first)).partition("/")[0]
    feeds = {key.rpartition("/")[2]: array for key, array in first.items() if key.startswith(f"{case}/in/")}
    whole = outputs_of(Part("dit", "dit", range(3)), oracle.star, feeds)
    assert np.array_equal(last[f"{case}/in/time_embeds"], first[f"{case}/out/time_states"])
    np.testing.assert_allclose(last[f"{case}/out/velocity"], whole["velocity"], atol=1e-5)


def test_a_plan_knows_the_sizes_of_the_parts(diffusion_checkpoint: Path, in_parts: Path) -> None:
    bundle = Bundle.open(in_parts)
    names = OPTIONS["components"]
    predicted = sizes_from_source(find_source(str(diffusion_checkpoint)), "fp32", names, part_bytes=100_000)
    actual = {
        name: sum(bundle.manifest.files[file].size for file in bundle.weights(name))
        for name in bundle.manifest.components
    }
    assert predicted.graphs == actual
