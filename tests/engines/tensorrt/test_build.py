"""ONNX becomes plans on a CPU: as the manifest says, whole or not at all, and never again for nothing."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from onnx import helper

from engines.bundle.lock import locked
from engines.bundle.manifest import CacheSpec, TensorSpec
from engines.bundle.reader import Bundle
from engines.errors import InputError, MissingError, UsageError
from engines.targets import TARGETS
from engines.tensorrt import build, compiler, plan
from engines.tensorrt.module import log_of
from tests.helpers.decoder_bundle import DIM, HIDDEN, KV, decoder_io, decoder_model, write_decoder_bundle
from tests.helpers.tiny_bundle import MODEL, write_component, write_manifest

trt = pytest.importorskip("tensorrt_rtx")
TARGET, CAPACITY = "rtx-3090", 32


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(write_decoder_bundle(tmp_path / "bundle"))


def built(bundle, **options):
    return build.build_plans(
        bundle, [TARGET], **{"components": ["base_ar"], "capacity_tokens": CAPACITY} | options
    )[0]


def refused(error, bundle, *words, **options):
    with pytest.raises(error) as caught:
        built(bundle, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def plan_files(bundle):
    return sorted(p.name for p in bundle.path.glob("plans/*/*"))


def test_a_plan_is_recorded_with_all_that_it_was_built_from(bundle):
    steps = []
    result = built(bundle, components=None, progress=lambda *step: steps.append(step))
    assert steps == [
        (f"build base_ar for {TARGET}", 0, 2),
        (f"build token_embedding for {TARGET}", 1, 2),
        ("plans built", 2, 2),
    ]
    record = plan.read_build(bundle, TARGET)
    assert (record.compute_capability, record.builder, record.tensorrt) == (
        (8, 6),
        "tensorrt_rtx",
        trt.__version__,
    )
    assert (
        list(record.components) == ["base_ar", "token_embedding"]
        and record.components["base_ar"] == result.spec
    )
    assert result.spec.kv_cache_updates == 2 and not result.skipped and result.component == "base_ar"
    assert [p.name for p in result.spec.profiles] == ["prefill", "decode"]
    assert result.spec.onnx == {
        name: bundle.manifest.files[name].sha256 for name in ("base_ar/model.onnx", "base_ar/model.onnx.data")
    }
    data = result.path.read_bytes()
    assert (len(data), hashlib.sha256(data).hexdigest()) == (result.spec.plan.size, result.spec.plan.sha256)
    assert plan_files(bundle) == ["base_ar.plan", "build.json", "token_embedding.plan"]


def test_nothing_is_built_twice_until_something_differs(bundle):
    first = built(bundle)
    stamp = first.path.stat().st_mtime_ns
    again = built(bundle)
    assert again.skipped and again.spec == first.spec and first.path.stat().st_mtime_ns == stamp
    assert not built(bundle, capacity_tokens=CAPACITY // 2).skipped
    assert not built(bundle).skipped and built(bundle).skipped


def test_plans_that_are_there_need_no_right_to_write(bundle, monkeypatch):
    def refuse(path, *rest, **options):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    def open_to_read(path, flags, *rest, really=os.open, **options):
        writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        return (refuse if writes else really)(path, flags, *rest, **options)

    first = built(bundle)
    monkeypatch.setattr(os, "open", open_to_read)
    monkeypatch.setattr(os, "mkdir", refuse)
    assert built(bundle).skipped and built(bundle).spec == first.spec
    refused(InputError, bundle, "Read-only file system", capacity_tokens=CAPACITY // 2)


@pytest.mark.parametrize(
    "spoil",
    [
        "plan flipped",
        "plan truncated",
        "plan absent",
        "record absent",
        "record garbage",
        "another TensorRT",
        "ONNX changed",
    ],
)
def test_a_plan_that_is_not_proven_is_built_again(bundle, spoil):
    path, record = built(bundle).path, bundle.path / f"plans/{TARGET}/build.json"
    data = path.read_bytes()
    if spoil == "plan flipped":
        path.write_bytes(data[:99] + bytes([data[99] ^ 1]) + data[100:])
    elif spoil == "plan truncated":
        path.write_bytes(data[:-1])
    elif spoil == "another TensorRT":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"tensorrt": "1.6.0.1"}))
    elif spoil == "record garbage":
        record.write_text("{")
    elif spoil == "ONNX changed":
        bundle = rewritten(bundle, decoder_model(), doc="changed")
    else:
        (path if spoil == "plan absent" else record).unlink()
    assert not built(bundle).skipped
    assert built(bundle).skipped


def rewritten(bundle, model, *, doc="", io=None):
    """The bundle with another `base_ar`; its plans stay."""
    model.doc_string = doc
    plans, aside = bundle.path / "plans", bundle.path.parent / "aside"
    plans.mkdir(exist_ok=True)
    plans.rename(aside)
    components = bundle.manifest.components | {
        "base_ar": write_component(bundle.path, "base_ar", model, *(io or decoder_io()))
    }
    layers = sum(t.name.endswith(".key") for t in components["base_ar"].inputs)
    model_spec = replace(
        bundle.manifest.model,
        cache={"base_ar": replace(bundle.manifest.model.cache["base_ar"], layers=layers)},
    )
    write_manifest(bundle.path, components, precision="bf16", model=model_spec)
    aside.rename(plans)
    return Bundle.open(bundle.path)


def test_plans_of_the_builder_that_knows_the_flag_can_be_captured():
    flag, target = trt.BuilderFlag.REQUIRE_USER_ALLOCATION, TARGETS[TARGET]
    assert compiler._config(trt, trt.Builder(log_of(trt)), target, ()).get_flag(flag)
    proper = SimpleNamespace(BuilderFlag=SimpleNamespace(TF32=7))
    config = object()  # with nothing that could be set
    builder = SimpleNamespace(create_builder_config=lambda: config)
    assert compiler._config(proper, builder, TARGETS["h200"], ()) is config


def test_a_failed_build_leaves_the_old_plan_and_record(bundle, monkeypatch):
    path = built(bundle).path
    before = {p: p.read_bytes() for p in path.parent.iterdir()}
    real = build.atomic_file

    @contextlib.contextmanager
    def full_disk(path):
        with real(path) as file:

            def write(data):
                raise OSError(errno.ENOSPC, "No space left on device")

            yield type("File", (), {"write": staticmethod(write), "flush": file.flush, "fileno": file.fileno})

    monkeypatch.setattr(build, "atomic_file", full_disk)
    refused(InputError, bundle, "cannot be written", "No space left", capacity_tokens=16)
    assert {p: p.read_bytes() for p in path.parent.iterdir()} == before


@pytest.fixture
def heard():
    """The usual handler of SIGINT, which shells let what runs in the background ignore."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_a_build_and_leaves_nothing(bundle, monkeypatch, heard):
    before = heard
    real, started = compiler._stream_writer, time.monotonic()

    def and_interrupt(trt, file):
        handlers.append(real(trt, file))
        return handlers[0]

    handlers = []
    monkeypatch.setattr(compiler, "_stream_writer", and_interrupt)
    install = signal.signal

    def install_and_press(number, handler):
        old = install(number, handler)
        if handler is not before:
            signal.raise_signal(signal.SIGINT)
        return old

    monkeypatch.setattr(signal, "signal", install_and_press)
    with pytest.raises(KeyboardInterrupt):
        built(bundle)
    assert handlers[0].size == 0 and plan_files(bundle) == [], "the build went on to its end"
    assert signal.getsignal(signal.SIGINT) is before and time.monotonic() - started < 10


@pytest.mark.parametrize(
    "fault, words",
    [
        ("caches swapped", "expected from past_key_values.0.value to present.0.value, got to present.0.key"),
        ("positions unused", "input position_ids: no layer reads it"),
        ("two layers promised", "expected 4 (a key and a value per layer), got 2"),
        ("another output name", "output hidden_states: missing; output states: extra"),
        ("another dtype", "input past_key_values.0.key: expected bfloat16, got HALF"),
        ("another size", "output hidden_states: expected shape (-1, -1, 65), got (-1, -1, 64)"),
        (
            "a dynamic axis came back static",
            "input inputs_embeds: expected shape (-1, -1, 64), got (2, -1, 64)",
        ),
        ("an operator that no one knows", "Nope"),
    ],
)
def test_what_tensorrt_parsed_must_be_what_the_manifest_says(bundle, fault, words):
    model, (inputs, outputs) = decoder_model(swap=fault == "caches swapped"), decoder_io()
    hidden = next(v for v in model.graph.output if v.name == "hidden_states")
    if fault == "positions unused":
        model = decoder_model(use_positions=False)
    elif fault == "two layers promised":
        inputs += [replace(t, name=t.name.replace(".0.", ".1.")) for t in inputs if ".0." in t.name]
    elif fault == "another output name":
        next(n for n in model.graph.node if "hidden_states" in n.output).output[0] = hidden.name = "states"
    elif fault == "another dtype":
        model = decoder_model("float16")
    elif fault == "another size":
        outputs[0] = TensorSpec("hidden_states", "float32", ("B", "S", HIDDEN + 1))
    elif fault == "a dynamic axis came back static":
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    elif fault == "an operator that no one knows":
        model.graph.node.insert(
            0, helper.make_node("Nope", ["inputs_embeds"], ["nothing"], name="strange_node")
        )
    refused(InputError, rewritten(bundle, model, io=(inputs, outputs)), words, "base_ar/model.onnx")
    assert plan_files(bundle) == []


def test_all_errors_of_the_parser_are_told_with_their_nodes(bundle):
    model = decoder_model()
    function = model.functions[0]
    function.node[0].attribute[1].CopyFrom(helper.make_attribute("mode", "circular"))
    refused(
        InputError,
        rewritten(bundle, model),
        "TensorRT cannot read this graph",
        "TensorScatter",
        "KVCacheAttention",
    )


def test_the_precision_must_suit_the_target(bundle, tmp_path):
    plain = Bundle.open(write_decoder_bundle(tmp_path / "fp32", precision="fp32"))
    refused(InputError, plain, "rtx-3090 does not run fp32 engines", "export with --precision bf16")
    with pytest.raises(InputError) as error:
        build.build_plans(bundle, ["rtx-2080-ti"])
    assert "export with --precision fp16" in str(error.value)


@pytest.mark.parametrize(
    "precision, target, runs",
    [
        ("fp8", "rtx-3090", "fp16, bf16, int8, int4"),
        ("fp8", "orin-agx-jp72", "fp16, bf16, int8, int4"),
        ("nvfp4", "rtx-4090", "fp16, bf16, int8, int4, fp8"),
        ("nvfp4", "thor-jp71", "fp16, bf16, int8, int4, fp8"),
    ],
)
def test_a_target_without_a_float_format_says_what_it_runs(precision, target, runs, tmp_path):
    bundle = Bundle.open(write_decoder_bundle(tmp_path / "b", precision=precision))
    with pytest.raises(InputError, match=f"{target} does not run {precision} engines") as error:
        build.check_precision(bundle, TARGETS[target])
    assert f"expected one of {runs}, got {precision}" in error.value.where
    assert "--precision bf16" in error.value.fix


def test_bf16_really_cannot_be_built_for_what_the_table_says_has_none(bundle, monkeypatch):
    monkeypatch.setattr(build, "check_precision", lambda bundle, target: None)
    monkeypatch.setattr(build, "check_types", lambda bundle, target, names: None)
    with pytest.raises(InputError) as error:
        build.build_plans(bundle, ["rtx-2080-ti"], capacity_tokens=CAPACITY)
    assert "cannot build this graph for rtx-2080-ti" in str(error.value) and "b16" in str(error.value)


@pytest.mark.parametrize(
    "arguments, error, words",
    [
        ({"targets": ["rtx4090"]}, UsageError, "rtx-4090"),
        ({"targets": []}, UsageError, "at least one"),
        ({"components": ["nope"]}, UsageError, "base_ar"),
        ({"profiles": {"nope": ()}}, UsageError, "nope"),
        ({"profiles": {"base_ar": ()}}, InputError, "at least one profile"),
        ({"capacity_tokens": 10**6}, UsageError, "capacity_tokens"),
        ({"rows": 0}, UsageError, "rows"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_built(bundle, arguments, error, words):
    with pytest.raises(error) as caught:
        build.build_plans(bundle, **{"targets": [TARGET, "rtx-5090"]} | arguments)
    assert words in str(caught.value) and not (bundle.path / "plans").exists()


@pytest.fixture
def in_parts(tmp_path):
    """A bundle whose `base_ar` is two parts."""
    root = tmp_path / "parts"
    layers = {"base_ar/0": 0, "base_ar/1": 1, "stacked_ar": 0}
    components = {}
    for name, layer in layers.items():
        model, io = decoder_model(), decoder_io()
        for value in (*model.graph.input, *model.graph.output):
            value.name = value.name.replace(".0.", f".{layer}.")
        for node in model.graph.node:
            for side in (node.input, node.output):
                side[:] = [value.replace(".0.", f".{layer}.") for value in side]
        io = [[replace(t, name=t.name.replace(".0.", f".{layer}.")) for t in side] for side in io]
        components[name] = write_component(root, name, model, *io)
    cache = {name: CacheSpec(n, KV, DIM) for name, n in (("base_ar", 2), ("stacked_ar", 1))}
    write_manifest(root, components, precision="bf16", model=replace(MODEL, cache=cache))
    return Bundle.open(root)


def test_a_component_stands_for_its_parts_and_each_has_a_plan(in_parts):
    results = build.build_plans(in_parts, [TARGET], components=["base_ar"], capacity_tokens=CAPACITY)
    assert [r.component for r in results] == ["base_ar/0", "base_ar/1"]
    assert [r.path.relative_to(in_parts.path).as_posix() for r in results] == [
        f"plans/{TARGET}/base_ar/{i}.plan" for i in (0, 1)
    ]
    assert list(plan.read_build(in_parts, TARGET).components) == ["base_ar/0", "base_ar/1"]
    shown = plan.describe_plans(in_parts.path / "plans" / TARGET)["components"]
    assert {name: row["state"] for name, row in shown.items()} == {"base_ar/0": "ok", "base_ar/1": "ok"}
    assert sorted(p.name for p in (in_parts.path / f"plans/{TARGET}").iterdir()) == ["base_ar", "build.json"]


def test_a_lost_part_is_built_again_alone(in_parts):
    first, second = build.build_plans(in_parts, [TARGET], components=["base_ar"], capacity_tokens=CAPACITY)
    second.path.unlink()
    again = build.build_plans(in_parts, [TARGET], components=["base_ar"], capacity_tokens=CAPACITY)
    assert [r.skipped for r in again] == [True, False]
    assert [r.skipped for r in built_part(in_parts, "base_ar/1")] == [True]
    assert Bundle.open(in_parts.path).manifest == in_parts.manifest, "plans of parts are no unlisted files"


def built_part(bundle, name):
    return build.build_plans(bundle, [TARGET], components=[name], capacity_tokens=CAPACITY)


@pytest.mark.parametrize(
    "message",
    [
        "MyelinHostBuffer::allocate: Error Code 2: OutOfMemory (Requested size was 622330239 bytes.)",
        "Error Code 1: Myelin (MyelinCheckException: myelin_tensor.h:47: CHECK(p) failed.)",
        "std::bad_alloc",
    ],
)
def test_too_little_memory_of_the_host_is_told_with_the_bytes_of_the_weights(bundle, message):
    graph = bundle.graph("base_ar")
    weights = (graph.parent / "model.onnx.data").stat().st_size
    error = compiler._failure(TARGETS[TARGET], graph, [message])
    assert isinstance(error, MissingError) and "too little memory" in str(error), error
    assert f"about 3 x the {weights} bytes of its weights" in error.where and "--part-bytes" in error.fix


def test_a_missing_or_old_builder_names_version_and_extra(bundle, monkeypatch):
    monkeypatch.setattr(trt, "__version__", "1.6.9")
    refused(MissingError, bundle, "tensorrt_rtx 1.7 or newer, got 1.6.9", 'pip install ".[rtx]"')
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingError) as error:
        build.check_buildable(TARGETS["h200"])
    assert "tensorrt 10.15 or newer" in str(error.value) and ".[tensorrt]" in str(error.value)


def test_another_system_is_refused_and_a_classic_target_needs_its_tensorrt(monkeypatch):
    monkeypatch.setattr("engines.tensorrt.module.host_platform", lambda: "linux-x86_64")
    with pytest.raises(UsageError, match="expected linux-aarch64, got linux-x86_64"):
        build.check_buildable(TARGETS["dgx-spark"])
    monkeypatch.setattr("engines.tensorrt.module.host_platform", lambda: "linux-aarch64")
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingError, match="orin-agx-jp62: expected tensorrt 10.3 or newer") as error:
        build.check_buildable(TARGETS["orin-agx-jp62"])
    assert "--system-site-packages" in error.value.fix and ".[jetpack]" in error.value.fix
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", SimpleNamespace(__version__="8.6.2"))
    with pytest.raises(MissingError, match="too old") as error:
        build.check_buildable(TARGETS["orin-agx-jp62"])
    assert error.value.fix == "upgrade to JetPack 6.2"


def test_the_network_of_a_tensorrt_that_is_not_known_is_not_read(monkeypatch):
    """Before 10.16, TensorRT gives wrong arrays of its constants to numpy 2."""
    other = SimpleNamespace(__name__="tensorrt", __version__="10.3.0")
    assert compiler._inspected(other, object(), "base_ar", None, owner=None) is None
    with pytest.raises(MissingError, match="expected one of tensorrt_rtx, got tensorrt 10.3.0"):
        compiler._inspected(other, object(), "base_ar", lambda component, parsed: None, owner=None)


def test_a_missing_plugin_is_named_before_anything_is_built(bundle, monkeypatch, tmp_path):
    classic = replace(TARGETS[TARGET], name="classic", dialect="classic")
    monkeypatch.setitem(TARGETS, "classic", classic)
    monkeypatch.setenv("STAR_PLUGIN", str(tmp_path / "absent.so"))
    spec = bundle.component("base_ar")
    bundle.manifest.components["base_ar"] = replace(spec, classic="base_ar/model.onnx", plugin_abi=1)
    bundle.manifest.model.cache["base_ar"] = replace(bundle.manifest.model.cache["base_ar"], head_dim=64)
    with pytest.raises(MissingError, match="plugin is not built"):
        build.build_plans(
            bundle, ["classic"], components=["token_embedding", "base_ar"], capacity_tokens=CAPACITY
        )
    assert not (bundle.path / "plans").exists()


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_all_components_are_built_for_three_targets_as_the_manifest_says(bundle_of, tmp_path, precision):
    shutil.copytree(bundle_of(precision), tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    for target in ("rtx-3090", "rtx-4090", "rtx-5090"):
        started = time.process_time()  # not of the clock: other tests run beside this one
        results = build.build_plans(bundle, [target])
        seconds = time.process_time() - started
        assert seconds < 30, f"{target}: {seconds:.1f} s"
        assert [r.component for r in results] == list(bundle.manifest.components)
        for r in results:
            spec, cache = bundle.component(r.component), bundle.manifest.model.cache.get(r.component)
            assert (r.spec.inputs, r.spec.outputs) == (spec.inputs, spec.outputs)
            assert r.spec.kv_cache_updates == (2 * cache.layers if cache else 0), r.component
            names = {"image_head": ["window", "decode"]}.get(r.component, ["all"])
            assert [p.name for p in r.spec.profiles] == (["prefill", "decode"] if cache else names)
            assert r.path.stat().st_size == r.spec.plan.size > 10_000
        assert all(r.skipped for r in build.build_plans(bundle, [target]))


# Row 53
@pytest.mark.parametrize("probe", ["free_disk", "free_memory"])
def test_too_little_disk_or_memory_is_refused_before_anything_is_built(bundle, monkeypatch, probe):
    monkeypatch.setattr(f"engines.fit.machine.{probe}", lambda *_: 100)
    refused(MissingError, bundle, "100 bytes", f"too little {probe.removeprefix('free_')} to build")
    assert not plan_files(bundle)


def test_plans_that_are_there_need_no_room(bundle, monkeypatch):
    built(bundle)
    monkeypatch.setattr("engines.fit.machine.free_disk", lambda folder: 0)
    monkeypatch.setattr("engines.fit.machine.free_memory", lambda: 0)
    assert built(bundle).skipped


def test_a_plan_is_at_least_as_large_as_the_weights_of_its_graph(bundle):
    """That is what a refusal for want of disk demands."""
    weights = sum(bundle.manifest.files[name].size for name in bundle.weights("base_ar"))
    assert built(bundle).spec.plan.size >= weights


def test_a_second_build_for_the_target_is_told_at_once_and_builds_nothing(bundle):
    """docs/bad_inputs.md 17: two builds with other settings would mix their plans."""
    folder = bundle.path / "plans" / TARGET
    folder.mkdir(parents=True)
    with (
        locked(folder / build.LOCK, what="build"),
        pytest.raises(InputError, match=rf"Another build.*\n.*by process {os.getpid()}"),
    ):
        build.build_plans(bundle, [TARGET], rows=2)
    assert not list(folder.iterdir())
    assert build.build_plans(bundle, [TARGET], components=["token_embedding"])
    assert sorted(path.name for path in folder.iterdir()) == ["build.json", "token_embedding.plan"]
