"""The doctor knows what is here, and says of every target what it lacks."""

from types import SimpleNamespace

import pytest

from engines import doctor, plugins
from engines.errors import MissingError
from engines.targets import TARGETS
from engines.tensorrt.device import Gpu
from engines.tensorrt.module import version_tuple

NONE = dict.fromkeys(doctor.PACKAGES)
RUNS, RUNS_NOT = (
    doctor.TargetFacts(n, n, no_build=None, no_run=why) for n, why in (("a", None), ("b", "no GPU"))
)


def machine(monkeypatch, *, platform="linux-x86_64", gpus=(), modules=("tensorrt_rtx",), version="11.4"):
    """A machine of the given parts."""

    def devices():
        if not gpus:
            raise MissingError("There is no NVIDIA GPU", where="here", fix="buy one")
        return gpus

    def tensorrt_of(target):
        if target.builder not in modules:
            raise MissingError(f"{target.builder} is not installed", where=target.name, fix="pip install")
        if target.builder == "tensorrt" and version_tuple(version) < version_tuple(target.tensorrt):
            raise MissingError(f"{target.builder} is too old", where=target.name, fix="pip install")
        return SimpleNamespace(__version__=version)

    monkeypatch.setattr("engines.tensorrt.module.host_platform", lambda: platform)
    monkeypatch.setattr("engines.tensorrt.device.gpus", devices)
    monkeypatch.setattr(doctor, "gpus", devices)
    monkeypatch.setattr(doctor, "driver_version", lambda: "13.0" if gpus else None)
    monkeypatch.setattr(doctor, "loop_facts", lambda: "on the device")
    monkeypatch.setattr(doctor, "host_platform", lambda: platform)
    for module in ("engines.tensorrt.build", "engines.tensorrt.module", "engines.doctor"):
        monkeypatch.setattr(f"{module}.tensorrt_of", tensorrt_of)
    return doctor.facts()


def test_every_target_has_its_facts_on_the_machine_at_hand():
    facts = doctor.facts()
    assert [t.name for t in facts.targets] == list(TARGETS)
    assert facts.packages["numpy"] and set(facts.packages) == set(doctor.PACKAGES)
    assert bool(facts.gpus) != bool(facts.no_gpu) and bool(facts.gpus) == bool(facts.loop)
    assert all("\n" not in (why or "") for t in facts.targets for why in (t.no_build, t.no_run))


def buildable(facts):
    return {t.name for t in facts.targets if t.no_build is None}


def runnable(facts):
    return {t.name for t in facts.targets if t.no_run is None}


def test_a_machine_without_gpu_builds_for_rtx_and_runs_nothing(monkeypatch):
    facts = machine(monkeypatch)
    assert buildable(facts) == {
        t.name for t in TARGETS.values() if t.builder == "tensorrt_rtx" and "linux-x86_64" in t.platforms
    }
    assert (
        runnable(facts) == set() and facts.no_gpu == "There is no NVIDIA GPU (here)" and facts.driver is None
    )


def test_an_rtx_pc_runs_the_targets_of_its_architecture(monkeypatch):
    facts = machine(monkeypatch, gpus=(Gpu("NVIDIA GeForce RTX 3090", (8, 6), 24 * 10**9),))
    assert (
        runnable(facts) == {"rtx-3060", "rtx-3090"}
        and "rtx-5090" in buildable(facts)
        and facts.driver == "13.0"
    )
    facts = machine(monkeypatch, gpus=(Gpu("NVIDIA GeForce RTX 3090", (8, 6), 24 * 10**9),), modules=())
    assert runnable(facts) == buildable(facts) == set()


def test_a_server_builds_and_runs_only_its_own(monkeypatch):
    facts = machine(monkeypatch, gpus=(Gpu("NVIDIA H200", (9, 0), 141 * 10**9),), modules=("tensorrt",))
    assert buildable(facts) == runnable(facts) == {"h100", "h200"}


def test_a_jetson_with_native_layers_builds_and_runs_only_its_own(monkeypatch):
    facts = machine(
        monkeypatch, platform="linux-aarch64", gpus=(Gpu("Orin", (8, 7), 64 * 10**9),), modules=("tensorrt",)
    )
    assert buildable(facts) == {"orin-agx-jp72"}
    assert "classic" in next(t.no_build for t in facts.targets if t.name == "orin-agx-jp62")


@pytest.mark.parametrize(
    "built_for, reason", [("10.3", None), ("8.6", "was built for another TensorRT"), (None, "is not built")]
)
def test_a_jetson_without_native_layers_builds_and_runs_the_classic_dialect_where_the_plugin_is(
    monkeypatch, tmp_path, built_for, reason
):
    library = tmp_path / "libstar_plugins.so"
    monkeypatch.setenv(plugins.VARIABLE, str(library))
    if built_for:
        library.write_bytes(f"star-plugin abi={plugins.ABI} tensorrt={built_for};".encode())
    orin = (Gpu("Orin", (8, 7), 64 * 10**9),)
    facts = machine(monkeypatch, platform="linux-aarch64", gpus=orin, modules=("tensorrt",), version="10.3.0")
    classic = {"orin-nano-jp62", "orin-nx-jp62", "orin-agx-jp62"}
    assert buildable(facts) == runnable(facts) == (classic if reason is None else set())
    if reason:
        assert all(reason in t.no_build and reason in t.no_run for t in facts.targets if t.name in classic)


def test_a_jetson_is_not_told_to_install_what_builds_for_rtx(monkeypatch):
    monkeypatch.setattr(doctor, "host_platform", lambda: "linux-aarch64")
    assert doctor.advice(NONE | {"onnxruntime": "1"}, (RUNS,), has_gpu=True) == ()


@pytest.mark.parametrize(
    "packages, targets, has_gpu, words",
    [
        (
            {},
            (RUNS_NOT,),
            False,
            ['no installed executor runs a bundle: pip install ".[cpu]"', ".[rtx]"],
        ),
        (
            {"onnxruntime": "1", "onnxruntime-gpu": "1", "tensorrt-rtx-cu13": "1"},
            (RUNS,),
            True,
            ["overwrite each other"],
        ),
        ({"onnxruntime": "1", "tensorrt-rtx-cu13": "1"}, (RUNS_NOT,), False, []),
        (
            {"onnxruntime": "1", "tensorrt-rtx-cu13": "1"},
            (RUNS_NOT,),
            True,
            ["this GPU cannot run plans yet"],
        ),
        ({"tensorrt-rtx-cu13": "1"}, (RUNS,), True, []),
    ],
)
def test_advice_says_what_to_install_and_nothing_more(packages, targets, has_gpu, words):
    lines = doctor.advice(NONE | packages, targets, has_gpu=has_gpu)
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines))
