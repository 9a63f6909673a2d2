"""The step of released widths, on the CPU at a tiny size: what it counts, what it reports, and that its parts
fail alone."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest

from star_export.graph.precisions import PRECISIONS, Precision
from star_export.graph.repeat import in_layer
from tests.gpu import real_widths, torch_decode
from tests.gpu.graphs import load_graph, read_graph, save_graph
from tests.gpu.noise import write_noise
from tests.gpu.ort_decode import DecodeStep, open_session
from tests.gpu.report import Report
from tests.gpu.sizes import PARTS, SIZES

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the graphs of the tiny size."""
    folder = tmp_path_factory.mktemp("graphs")
    for name in PARTS:
        save_graph(read_graph("tiny", name, None), folder / "tiny" / f"{name}.onnx")
    return folder


@pytest.fixture
def measured(graphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Measure the tiny size in a precision; the record."""
    monkeypatch.setattr(real_widths, "STEPS", 1)

    def run(precision: str) -> dict:
        report = Report(tmp_path / "report.json")
        plan = real_widths.Plan(
            device="cpu",
            graphs=graphs,
            copy_bytes=1 << 20,
            repeats=1,
            compile=False,
            shapes={"N1": (1, 1), "W16": (1, 4)},
        )
        real_widths.measure(plan, tmp_path, report, "tiny", precision)
        return json.loads((tmp_path / "report.json").read_text())

    return run


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_the_sizes_are_the_released_ones(size: str) -> None:
    """The stacked AR and the output head, from the key list of the released checkpoint."""
    rows = (
        line.split("\t")
        for line in (GOLDEN / f"star_keys_STAR-{size}.tsv").read_text().splitlines()
        if not line.startswith("#")
    )
    shapes = {row[0]: tuple(map(int, row[1].split("x"))) for row in rows if len(row) > 1}
    config, stack = SIZES[size], SIZES[size].stacked_ar
    layers = {
        int(name.split(".layers.")[1].split(".")[0])
        for name in shapes
        if name.startswith("stacked_ar") and ".layers." in name
    }
    first = (
        next(name for name in shapes if name.startswith("stacked_ar") and ".layers.0." in name).split(
            ".layers.0."
        )[0]
        + ".layers.0."
    )
    assert layers == set(range(stack.num_layers))
    assert shapes[first + "mlp.up_proj.weight"] == (stack.intermediate_size, stack.hidden_size)
    assert shapes[first + "self_attn.q_proj.weight"] == (stack.num_heads * stack.head_dim, stack.hidden_size)
    assert shapes[first + "self_attn.k_proj.weight"] == (
        stack.num_kv_heads * stack.head_dim,
        stack.hidden_size,
    )
    assert (config.vq.codebook_size, config.base_ar.hidden_size) in shapes.values()


def test_every_executor_is_measured_against_the_bytes_it_reads(measured) -> None:
    record = measured("fp32")
    figures = record["figures"]
    for shape in ("N1", "W16"):
        for name in ("ONNX Runtime", "PyTorch eager"):
            title = f"tiny fp32 {shape}: {name}"
            share = figures[f"{title}, share of the copy bandwidth"]
            bandwidth = figures["tiny fp32: copy bandwidth"]["max"] * 1e12
            floor_ms = 1e3 * share["context"]["read_bytes"] / bandwidth
            assert share["median"] == pytest.approx(floor_ms / figures[title]["median"])
        assert f"tiny fp32 {shape}: ONNX Runtime over PyTorch eager" in figures
    for cache in ("dynamic", "static"):
        assert figures[f"tiny fp32 N1: Hugging Face generate, {cache} cache"]["unit"] == "ms per step"
    assert record["checks"] == {}


def test_the_bytes_of_a_step_are_the_same_from_the_graphs_and_from_the_sizes(
    graphs: Path, tmp_path: Path
) -> None:
    stored = sum(
        write_noise(
            read_graph("tiny", name, graphs), tmp_path / name, precision=PRECISIONS["bf16"]
        ).read_bytes
        for name in PARTS
    )
    parts = real_widths.Parts(Report(tmp_path / "report.json"), limit_seconds=1, device="cpu")
    of = real_widths.Measurement(real_widths.Plan(device="cpu"), parts, tmp_path, "tiny", "bf16", 1.0)
    assert of.read_bytes(None) == stored


def test_what_pytorch_raises_does_not_lose_onnx_runtime(measured, monkeypatch: pytest.MonkeyPatch) -> None:
    def planted(*arguments, **options):
        raise RuntimeError("planted")

    monkeypatch.setattr(torch_decode, "modules_of", planted)
    monkeypatch.setattr(torch_decode, "hugging_face_model", planted)
    record = measured("fp32")
    assert "tiny fp32 N1: ONNX Runtime" in record["figures"]
    assert record["checks"]["tiny fp32: PyTorch"] == {"passed": False, "detail": "RuntimeError: planted"}
    assert not record["checks"]["tiny fp32: Hugging Face"]["passed"]


def test_a_precision_that_is_refused_says_so_in_the_library_s_words(measured) -> None:
    """ONNX Runtime on the CPU has no bfloat16, as on CUDA it has no DequantizeLinear with it."""
    facts = measured("int4")["facts"]
    assert "DequantizeLinear" in facts["tiny int4: ONNX Runtime runs"]
    assert "MatMulNBits" in facts["tiny int4: ONNX Runtime, MatMulNBits runs"]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_writes_its_slots_and_feeds_its_embedding_back(
    graphs: Path, tmp_path: Path, fused: bool
) -> None:
    precision = Precision(ir.DataType.FLOAT, PRECISIONS["int4"].formats)
    made = {
        name: write_noise(read_graph("tiny", name, graphs), tmp_path / name, precision=precision, fused=fused)
        for name in PARTS
    }
    sessions = {name: open_session(graph.path, device="cpu") for name, graph in made.items()}
    step = DecodeStep(
        sessions,
        SIZES["tiny"],
        images=2,
        positions=3,
        capacity_tokens=16,
        device="cpu",
        cache_dtype="float32",
    )
    embeds = step.tensors["base_ar"][0]["inputs_embeds"]
    before = embeds.clone()
    for index in (0, 3, 6):
        step.step(index)
    for caches in step.caches.values():
        for cache in caches.values():
            assert cache[:, :, :9].abs().amin((0, 1, 3)).min() >= 0 and cache[:, :, :9].abs().sum() > 0
            assert not cache[:, :, 9:].any()
    assert not embeds.equal(before) and step.hidden_states.isfinite().all() and step.hidden_states.std() > 0.1
    assert ((step.image_ids >= 0) & (step.image_ids < SIZES["tiny"].vq.codebook_size)).all()


def test_layers_share_one_layer_s_noise_in_the_file_and_nothing_else(graphs: Path, tmp_path: Path) -> None:
    graph = write_noise(read_graph("tiny", "base_ar", graphs), tmp_path, precision=PRECISIONS["bf16"])
    weights = {
        v.name: v.const_value
        for v in ir.load(graph.path).graph.initializers.values()
        if isinstance(v.const_value, ir.ExternalTensor)
    }
    assert (
        sum(w.length for w in weights.values())
        == graph.weight_bytes
        > 2 * (tmp_path / "noise.data").stat().st_size
    )
    for name, weight in weights.items():
        assert weight.offset == weights[in_layer(name, 0) if ".layers." in name else name].offset
    assert len({w.offset for w in weights.values()}) == len(
        {in_layer(n, 0) if ".layers." in n else n for n in weights}
    )


def test_a_graph_that_travelled_is_the_one_that_was_traced(graphs: Path) -> None:
    traced, read = read_graph("tiny", "base_ar", None), load_graph(graphs / "tiny" / "base_ar.onnx")
    for model in (traced, read):
        assert any(value.const_value is None for value in model.graph.initializers.values())
    described = [
        [
            (v.name, v.dtype, str(v.shape), v.const_value is None, dict(v.metadata_props))
            for v in m.graph.initializers.values()
        ]
        for m in (traced, read)
    ]
    assert described[0] == described[1]
    nodes = [
        [(n.op_type, [v.name if v else None for v in n.inputs]) for n in m.graph] for m in (traced, read)
    ]
    assert nodes[0] == nodes[1]
