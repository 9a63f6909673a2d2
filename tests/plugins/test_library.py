"""The plugin's library is inspected before it is loaded,
and a plan is used only with the library it was built with."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engines import plugins
from engines.bundle.manifest import CacheSpec, FileSpec
from engines.bundle.reader import Bundle
from engines.bundle.records import json_from_record
from engines.errors import InputError, MissingError
from engines.sessions.tensorrt import DeviceBuffer
from engines.targets import TARGETS
from engines.tensorrt import build, device, network
from engines.tensorrt import plan as plans
from engines.tensorrt.device import Gpu
from engines.tensorrt.profiles import limits_from_options, profiles_from_limits
from tests.helpers.decoder_bundle import write_decoder_bundle

TARGET, VERSION, PLAN = TARGETS["orin-agx-jp62"], "10.3.0.30", b"plan" * 99


def library(folder, *, abi=plugins.ABI, tensorrt="10.3", more=b""):
    path = folder / "libstar_plugins.so"
    path.write_bytes(b"\x7fELF" + f"star-plugin abi={abi} tensorrt={tensorrt};".encode() + more)
    return path


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A classic bundle with a plan, on a seeming AGX Orin with a built plugin;
    `loaded` collects what it loads."""
    monkeypatch.setattr(plans, "gpus", lambda: (Gpu("Orin", (8, 7), 64 * 10**9),))
    monkeypatch.setattr(plans, "tensorrt_of", lambda target: SimpleNamespace(__version__=VERSION))
    monkeypatch.setattr(plans, "host_platform", lambda: "linux-aarch64")
    monkeypatch.setenv(plugins.VARIABLE, str(library(tmp_path)))
    loaded = []
    monkeypatch.setattr(plugins, "load", loaded.append)
    bundle = Bundle.open(write_decoder_bundle(tmp_path / "bundle"))
    spec = replace(bundle.component("base_ar"), classic="base_ar/model.onnx", plugin_abi=plugins.ABI)
    bundle.manifest.components["base_ar"], bundle.loaded = spec, loaded
    profiles = profiles_from_limits(spec, bundle.manifest.model, limits_from_options(bundle.manifest.model))
    made = plans.PlanSpec(
        onnx=plans.onnx_hashes(bundle, "base_ar", dialect="classic"),
        profiles=profiles,
        inputs=spec.inputs,
        outputs=spec.outputs,
        plan=FileSpec(len(PLAN), hashlib.sha256(PLAN).hexdigest()),
        kv_cache_updates=2,
        seconds=1.0,
        plugin=plugins.find_library().sha256,
    )
    folder = bundle.path / "plans" / TARGET.name
    folder.mkdir(parents=True)
    (folder / "base_ar.plan").write_bytes(PLAN)
    record = replace(plans.build_header(TARGET, VERSION), components={"base_ar": made})
    (folder / "build.json").write_text(json_from_record(record))
    return bundle


def test_a_plan_is_read_when_its_library_is_there_and_loaded_first(bundle):
    spec, data = plans.read_plan(bundle, TARGET, "base_ar")
    assert data == PLAN and [x.sha256 for x in bundle.loaded] == [spec.plugin]


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"more": b"changed"}, InputError, ("stale", "built with sha256", "rebuild")),
        ({"abi": 2}, MissingError, ("another ABI", "expected ABI 1, got 2", "cmake")),
        ({"tensorrt": "11.1"}, MissingError, ("another TensorRT", "expected TensorRT 10, got 11.1", "cmake")),
    ],
    ids=["bytes", "ABI", "TensorRT"],
)
def test_another_library_is_refused_before_it_and_the_plan_are_loaded(bundle, tmp_path, change, error, words):
    library(tmp_path, **change)
    with pytest.raises(error) as caught:
        plans.read_plan(bundle, TARGET, "base_ar")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert bundle.loaded == []


def test_a_missing_library_names_the_command_and_the_variable(bundle, monkeypatch, tmp_path):
    monkeypatch.setenv(plugins.VARIABLE, str(tmp_path / "absent.so"))
    with pytest.raises(MissingError) as caught:
        plans.read_plan(bundle, TARGET, "base_ar")
    assert (
        plugins.COMMAND in str(caught.value)
        and plugins.VARIABLE in str(caught.value)
        and "absent.so" in str(caught.value)
    )


def test_a_file_without_the_marker_is_no_plugin(tmp_path):
    (tmp_path / "x.so").write_bytes(b"\x7fELF" * 100)
    with pytest.raises(InputError, match="its marker"):
        plugins.library_from_file(tmp_path / "x.so")


def test_a_file_that_is_no_library_is_refused_when_loaded(tmp_path):
    with pytest.raises(MissingError, match="cannot be loaded"):
        plugins.load(plugins.library_from_file(library(tmp_path)))


@pytest.mark.parametrize(
    "cache, precision, rows, capacity, words",
    [
        ({"head_dim": 96}, "bf16", 2, 64, "head_dim: expected 64 or 128, got 96"),
        ({}, "fp32", 2, 64, "precision: expected one of fp16, bf16"),
        ({}, "bf16", 9, 64, "rows: expected 1 to 8, got 9"),
        ({}, "bf16", 2, 4097, "capacity: expected 1 to 4096 tokens, got 4097"),
    ],
)
def test_a_decoder_beyond_the_plugins_limits_is_refused_with_the_limit(
    bundle, cache, precision, rows, capacity, words
):
    model = replace(bundle.manifest.model, cache={"base_ar": replace(CacheSpec(1, 2, 64), **cache)})
    with pytest.raises(InputError) as caught:
        manifest = replace(bundle.manifest, model=model, precision=precision)
        plugins.check_limits(manifest, "base_ar", rows=rows, capacity_tokens=capacity)
    assert words in str(caught.value)


def test_a_build_for_a_classic_target_takes_the_classic_graph_and_the_librarys_hash(bundle):
    bundle.manifest.model.cache["base_ar"] = CacheSpec(1, 2, 64)
    profiles = plans.read_build(bundle, TARGET.name).components["base_ar"].profiles
    assert build.plugin_of(bundle, TARGET, "base_ar", profiles, VERSION) == plugins.find_library().sha256
    assert len(bundle.loaded) == 1
    assert build.plugin_of(bundle, TARGETS["rtx-4090"], "base_ar", profiles, "1.7.1") is None
    assert bundle.graph("base_ar", dialect="classic").name == "model.onnx"
    with pytest.raises(InputError, match="no classic graphs"):
        bundle.graph("token_embedding", dialect="classic")


class Tensor:
    def __init__(self, name, *, is_network_input=False, is_network_output=False):
        self.name, self.is_network_input, self.is_network_output = name, is_network_input, is_network_output


def plugin_layer(pasts=("key", "value")):
    """A KVCacheAttention layer of a parsed network, from pasts to presents."""
    caches = [Tensor(f"past_key_values.0.{part}", is_network_input=True) for part in pasts]
    inputs = [*map(Tensor, "qkv"), *caches, *map(Tensor, "wm")]
    outputs = [
        Tensor("output"),
        *(Tensor(f"present.0.{part}", is_network_output=True) for part in ("key", "value")),
    ]
    return SimpleNamespace(
        type="plugin",
        name="layer",
        num_inputs=7,
        num_outputs=3,
        get_input=inputs.__getitem__,
        get_output=outputs.__getitem__,
    )


def test_a_plugin_layer_counts_as_two_updates_in_place():
    trt = SimpleNamespace(LayerType=SimpleNamespace(PLUGIN_V3="plugin"))  # a TensorRT without KV_CACHE_UPDATE
    assert [network._update_fault(*pair) for pair in network._updates(trt, plugin_layer())] == [None, None]
    faults = [network._update_fault(*pair) for pair in network._updates(trt, plugin_layer(("value", "key")))]
    assert all("expected from past_key_values" in fault for fault in faults)
    assert network._updates(trt, SimpleNamespace(type="other")) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_flag_raised_on_the_device_is_an_error_when_a_result_is_read(monkeypatch, dtype):
    for name in ("allocate", "release", "copy_to_host"):
        monkeypatch.setattr(device, name, lambda *arguments: 0)
    flags = [0, 1]
    monkeypatch.setattr(plugins, "_LOADED", [SimpleNamespace(star_plugin_take_overflow=lambda: flags.pop(0))])
    buffer = DeviceBuffer((1,), dtype)
    buffer.read()
    with pytest.raises(InputError, match="did not fit"):
        buffer.read()
