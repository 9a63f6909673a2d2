"""The diffusion decoder in low precision: what a bundle stores, and that every executor computes it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.sessions import open_session
from engines.targets import TARGETS
from engines.tensorrt.build import check_types
from star_export.components import DIFFUSION
from star_export.exporter.export import export
from star_export.golden.cases import recorded_cases
from star_export.golden.run_case import run_case
from star_export.golden.tolerances import compute_of, compute_type, tolerances_of
from star_export.planner.plan import plan as planned
from tests.helpers.plan_layers import compiled, written_out

GRAPHS = ("text_encoder", "dit", "vae_encoder", "vae_decoder")
ADDED = 3.0 * 2**-7  # what a planted fault adds to one scale, as a share of it


@pytest.fixture(scope="module")
def stored_in(
    diffusion_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """precision -> a bundle of the miniature's diffusion decoder alone."""
    made: dict[str, Bundle] = {}

    def bundle(precision: str) -> Bundle:
        if precision not in made:
            out = tmp_path_factory.mktemp("diffusion") / precision
            export(str(diffusion_checkpoint), out=out, precision=precision, components=[*DIFFUSION])
            made[precision] = Bundle.open(out)
        return made[precision]

    return bundle


@pytest.mark.parametrize(
    ("precision", "dit", "text_encoder"),
    [
        ("int8", {"bf16", "int8"}, {"bf16", "int8"}),
        ("fp8", {"bf16", "int8", "fp8"}, {"bf16", "int8"}),
        ("fp16", {"bf16"}, {"bf16"}),
    ],
)
def test_the_manifest_says_which_formats_its_weights_have(stored_in, precision, dit, text_encoder) -> None:
    components = stored_in(precision).manifest.components
    assert components["dit"].weights.keys() == dit
    assert components["text_encoder"].weights.keys() == text_encoder
    assert components["vae_encoder"].weights.keys() == components["vae_decoder"].weights.keys() == {"bf16"}
    if precision == "fp8":
        assert components["dit"].weights["fp8"] > components["dit"].weights["int8"] / 2


@pytest.mark.parametrize("precision", ["int8", "fp8", "fp16"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_executors_compute_the_golden_tensors(stored_in, name: str, precision: str) -> None:
    """ONNX Runtime with exact and with fast arithmetic; and what TensorRT parses, in float32 and in bf16."""
    pytest.importorskip("tensorrt_rtx")
    bundle = stored_in(precision)
    for backend, compute in {
        "onnxruntime-exact": compute_of("onnxruntime-exact", precision),
        "onnxruntime": compute_of("onnxruntime", precision),
        "interpreter-fp32:rtx-4090": "fp32",
        "interpreter:rtx-4090": compute_type(precision, twin=False),
    }.items():
        session = open_session(bundle, name, backend=backend)
        for case in recorded_cases(bundle, name).values():
            results = run_case(session, case, tolerances=tolerances_of(name, compute, case.noise_in(compute)))
            assert results and all(result.passed for result in results), (backend, results)


@pytest.mark.parametrize(
    ("precision", "weight"),
    [
        ("int8", "dit.noise_refiner.0.attn.to_v.weight"),
        ("int8", "text_encoder.layers.1.mlp.down_proj.weight"),
        ("fp8", "dit.layers.1.feed_forward.linear_2.weight"),
    ],
)
def test_a_scale_that_is_a_little_off_fails(stored_in, precision: str, weight: str, tmp_path: Path) -> None:
    """In float32, by which every graph is judged; one scale of one output of one layer is 2 % larger."""
    bundle, name = stored_in(precision), weight.partition(".")[0]
    twin = bundle.file(bundle.graph_name(name, twin=True))
    model = onnx.load(twin)
    (scales,) = (tensor for tensor in model.graph.initializer if tensor.name == f"{weight}.scales")
    assert scales.data_type == onnx.TensorProto.BFLOAT16
    bits = torch.frombuffer(bytearray(scales.raw_data), dtype=torch.bfloat16)
    bits[bits.numel() // 2] *= 1 + ADDED
    scales.raw_data = bits.view(torch.int16).numpy().tobytes()
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    case = next(iter(recorded_cases(bundle, name).values()))
    (output,) = case.outputs
    got = session.run([output], {key: np.asarray(value) for key, value in case.inputs.items()})[0]
    wanted = case.outputs[output]
    limit = tolerances_of(name, "fp32", {})[output]
    assert float(np.abs(got - wanted).max() / wanted.std()) > limit


def test_a_plan_reads_the_weights_of_the_layers_as_they_are_stored(stored_in, tmp_path: Path) -> None:
    """TensorRT joins products of one input, and writes a joined weight out: of the two context refiners q, k
    and v, and gate and up, and the scales and gates of all five other blocks with the last norm's scale."""
    pytest.importorskip("tensorrt_rtx")
    bundle = stored_in("fp8")
    sizes = {"N": (1, 2, 4), "T": (16, 64, 256), "2T": (32, 128, 512), "L": (1, 32, 256)}
    ranges = {
        spec.name: [[sizes[d][i] if isinstance(d, str) else d for d in spec.shape] for i in range(3)]
        for spec in bundle.component("dit").inputs
    }
    plan = compiled(bundle.graph("dit"), tmp_path, sm="SM89", ranges=ranges)
    found = Counter(tensor.shape for tensor in written_out(plan, 64 * 32))
    assert plan.size and found == {(64, 5 * 4 * 64 + 64): 1, (1, 64, 128): 2, (1, 64, 512): 2}


def test_in_fp16_it_is_the_bundle_in_bf16(stored_in) -> None:
    fp16, bf16 = stored_in("fp16"), stored_in("bf16")
    for name in GRAPHS:
        for file in (fp16.manifest.components[name].graph, *fp16.weights(name)):
            assert fp16.read(file) == bf16.read(file), file
    assert fp16.manifest.tables["text_embedding"].dtype == "bfloat16"
    assert fp16.manifest.tables["codebook"].dtype == "float16"  # the VQ model's, beside which it lies


def test_a_target_without_bf16_is_told_before_the_build(stored_in) -> None:
    bundle = stored_in("fp16")
    with pytest.raises(InputError, match="rtx-2080-ti does not compute in bf16") as error:
        check_types(bundle, TARGETS["rtx-2080-ti"], [*bundle.manifest.components])
    assert "text_encoder, dit, vae_encoder, vae_decoder: expected components that" in error.value.where
    check_types(bundle, TARGETS["rtx-3090"], [*bundle.manifest.components])


def test_a_target_without_bf16_is_told_only_of_components_that_it_can_build(
    diffusion_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(diffusion_bundle)
    components = bundle.manifest.components
    in_bf16 = {name: replace(components[name], weights={"bf16": 1}) for name in GRAPHS}
    monkeypatch.setattr(bundle, "manifest", replace(bundle.manifest, components=components | in_bf16))
    with pytest.raises(InputError) as error:
        check_types(bundle, TARGETS["rtx-2080-ti"], ["dit"])
    assert error.value.where.endswith(
        "dit: expected components that compute in fp16, got bf16, because fp16 may overflow in them"
    )
    named = error.value.fix.rpartition(" ")[2].split(",")
    assert named == [name for name in components if name not in GRAPHS]


def test_a_bundle_with_some_components_only_is_planned_without_tasks_and_times(stored_in) -> None:
    (found,) = planned(str(stored_in("fp16").path), targets=["rtx-4090"]).places
    assert found.tasks == () and found.limit is None and found.paintings == () and found.caches_bytes == 0


def test_a_plan_for_a_target_without_bf16_has_no_paintings(diffusion_checkpoint: Path) -> None:
    found = planned(str(diffusion_checkpoint), targets=["rtx-2080-ti", "rtx-3090"], precisions=["fp16"])
    without, with_bf16 = found.places
    painted = {"paint", "repaint"}
    assert not painted & {task.task for task in without.tasks} and not without.paintings
    assert painted <= {task.task for task in with_bf16.tasks} and with_bf16.paintings
