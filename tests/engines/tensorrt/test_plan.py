"""A plan is used only where it was built for, from the ONNX that is there, with the bytes that were built.

TensorRT is never asked.
"""

import contextlib
import hashlib
import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest

from engines.bundle.manifest import FileSpec
from engines.bundle.reader import Bundle
from engines.bundle.records import json_from_record
from engines.errors import InputError, MissingError, UsageError
from engines.targets import TARGETS
from engines.tensorrt import plan as plans
from engines.tensorrt.device import Gpu
from engines.tensorrt.profiles import limits_from_options, profiles_from_limits
from tests.helpers.decoder_bundle import write_decoder_bundle
from tests.helpers.sealed import edit_sealed

TARGET, DATA = TARGETS["rtx-3090"], random.Random(0).randbytes(4096)
VERSION = "1.7.1.116"


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle with a plan of random bytes for `base_ar`, where there seems to be an RTX 3090."""
    monkeypatch.setattr(plans, "gpus", lambda: (Gpu("RTX 3090", (8, 6), 24 * 10**9),))
    monkeypatch.setattr(plans, "tensorrt_of", lambda target: SimpleNamespace(__version__=VERSION))
    monkeypatch.setattr(plans, "host_platform", lambda: "linux-x86_64")
    bundle = Bundle.open(write_decoder_bundle(tmp_path / "bundle"))
    spec = bundle.component("base_ar")
    profiles = profiles_from_limits(spec, bundle.manifest.model, limits_from_options(bundle.manifest.model))
    made = plans.PlanSpec(
        onnx=plans.onnx_hashes(bundle, "base_ar"),
        profiles=profiles,
        inputs=spec.inputs,
        outputs=spec.outputs,
        plan=FileSpec(len(DATA), hashlib.sha256(DATA).hexdigest()),
        kv_cache_updates=2,
        seconds=1.5,
    )
    build = replace(plans.build_header(TARGET, VERSION), components={"base_ar": made})
    plan_file(bundle).parent.mkdir(parents=True)
    plan_file(bundle).write_bytes(DATA)
    record(bundle).write_text(json_from_record(build))
    return bundle


def plan_file(bundle):
    return bundle.path / "plans/rtx-3090/base_ar.plan"


def record(bundle):
    return bundle.path / "plans/rtx-3090/build.json"


def change(bundle, **changes):
    edit_sealed(record(bundle), lambda contents: contents.update(changes))


def refused(bundle, *words, error=InputError, component="base_ar"):
    with pytest.raises(error) as caught:
        plans.read_plan(bundle, TARGET, component)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_plan_that_is_right_is_read_with_its_record(bundle):
    spec, data = plans.read_plan(bundle, TARGET, "base_ar")
    assert (
        data == DATA
        and spec.kv_cache_updates == 2
        and [p.name for p in spec.profiles] == ["prefill", "decode"]
    )
    assert Bundle.open(bundle.path)  # plans lie outside the manifest's list


@pytest.mark.parametrize(
    "changes, built",
    [
        ({"compute_capability": [8, 7]}, "sm_87 / tensorrt_rtx 1.7.1.116 / linux-x86_64"),
        ({"builder": "tensorrt", "tensorrt": "10.3.0"}, "sm_86 / tensorrt 10.3.0"),
        ({"tensorrt": "1.7.1.115"}, "tensorrt_rtx 1.7.1.115"),
        ({"platform": "windows-x86_64"}, "windows-x86_64"),
    ],
)
def test_a_plan_from_another_machine_is_refused_with_both_and_the_command(bundle, changes, built):
    change(bundle, **changes)
    refused(
        bundle,
        "built for sm_",
        built,
        f"here sm_86 / tensorrt_rtx {VERSION} / linux-x86_64",
        f"rebuild: star-export build {bundle.path} --target rtx-3090",
    )


def test_a_plan_is_refused_on_a_gpu_of_another_architecture(bundle, monkeypatch):
    monkeypatch.setattr(plans, "gpus", lambda: (Gpu("RTX 4090", (8, 9), 24 * 10**9),))
    refused(bundle, "built for sm_86", "here sm_89")


@pytest.mark.parametrize(
    "data, words",
    [
        (DATA[:-1], "expected 4096 bytes, got 4095"),
        (DATA + b"x", "got 4097"),
        (b"", "got 0"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF".ljust(4096, b"\0"), "expected sha256"),
        (None, "missing"),
    ],
    ids=["truncated", "longer", "empty", "jpeg", "absent"],
)
def test_a_file_that_is_not_the_plan_is_refused_before_tensorrt_sees_it(bundle, data, words):
    plan_file(bundle).unlink() if data is None else plan_file(bundle).write_bytes(data)
    refused(bundle, words, "rebuild: star-export build")


def test_each_of_200_flipped_bits_is_refused(bundle):
    for bit in random.Random(1).sample(range(8 * len(DATA)), 200):
        data = bytearray(DATA)
        data[bit // 8] ^= 1 << bit % 8
        plan_file(bundle).write_bytes(data)
        refused(bundle, "not the one that was built", hashlib.sha256(data).hexdigest()[:16])


def test_a_link_in_place_of_a_plan_is_read_as_the_plan_and_hashed(bundle):
    other = bundle.path.parent / "other"
    other.write_bytes(DATA)
    plan_file(bundle).unlink()
    plan_file(bundle).symlink_to(other)
    assert plans.read_plan(bundle, TARGET, "base_ar")[1] == DATA
    other.write_bytes(DATA[::-1])
    refused(bundle, "not the one that was built")


def test_a_stale_plan_names_the_file_that_changed(bundle):
    def stale(contents):
        contents["components"]["base_ar"]["onnx"]["base_ar/model.onnx"] = "0" * 64

    edit_sealed(record(bundle), stale)
    refused(bundle, "stale", "base_ar/model.onnx: built from sha256 0000000000000000", "rebuild")


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "strict JSON"),
        ("[]", "an object"),
        ("\ud83d", "surrogates"),
        ('{"schema": 2}', "schema: expected 3"),
        ('{"schema": 3}', "expected this key"),
    ],
)
def test_a_wrong_record_is_refused(bundle, text, words):
    if words == "surrogates":
        record(bundle).write_bytes(b"\xff")
        refused(bundle, "not a text file")
    else:
        record(bundle).write_text(text)
        refused(bundle, words)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"target": "rtx-4090"}, "another target"),
        ({"extra": 1}, "no such key"),
        ({"components": {}}, "base_ar has no plan"),
        ({"tensorrt": 1}, "tensorrt: expected str"),
    ],
)
def test_a_record_that_says_other_things_is_refused(bundle, changes, words):
    change(bundle, **changes)
    refused(bundle, words)


def test_no_flipped_bit_changes_what_a_record_says(bundle):
    data, right = record(bundle).read_bytes(), plans.read_build(bundle, "rtx-3090")
    kept = 0
    for bit in range(0, 8 * len(data), 11):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        record(bundle).write_bytes(flipped)
        with contextlib.suppress(InputError):
            assert plans.read_build(bundle, "rtx-3090") == right, bit
            kept += 1
    assert kept < 10


def test_no_plans_an_unknown_component_and_no_gpu_are_told_apart(bundle, monkeypatch):
    refused(bundle, "expected one of base_ar, token_embedding", error=UsageError, component="nope")
    refused(bundle, "token_embedding has no plan for rtx-3090", component="token_embedding")

    def no_gpu():
        raise MissingError("There is no NVIDIA GPU", where="x", fix="y")

    monkeypatch.setattr(plans, "gpus", no_gpu)
    refused(bundle, "There is no NVIDIA GPU", error=MissingError)
    record(bundle).unlink()
    refused(bundle, "There are no plans for rtx-3090", "star-export build")


def test_inspect_sees_io_profiles_and_state(bundle):
    described = plans.describe_plans(record(bundle).parent)
    base = described["components"]["base_ar"]
    assert (
        described["gpu"] == "sm_86"
        and described["tensorrt"] == f"tensorrt_rtx {VERSION}"
        and base["state"] == "ok"
    )
    assert (
        base["inputs"]["past_key_values.0.key"] == "bfloat16[B,2,C,16]"
        and base["outputs"]["hidden_states"] == "float32[B,S,64]"
    )
    assert base["profiles"]["decode"]["write_indices"] == {"min": (1,), "opt": (2,), "max": (4,)}
    json.dumps(described)
    for data, state in ((b"", "another size"), (bytes(4096), "another sha256")):
        plan_file(bundle).write_bytes(data)
        assert plans.describe_plans(record(bundle).parent)["components"]["base_ar"]["state"] == state
    plan_file(bundle).unlink()
    assert plans.describe_plans(record(bundle).parent)["components"]["base_ar"]["state"] == "missing"
    value = json.loads(record(bundle).read_text())
    change(bundle, components={"../../x": value["components"]["base_ar"]})
    with pytest.raises(InputError, match="not allowed"):
        plans.describe_plans(record(bundle).parent)
