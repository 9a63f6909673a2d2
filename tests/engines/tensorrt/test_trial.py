"""A plan that crashes TensorRT ends another process, and is named. A fake module stands for TensorRT."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engines.bundle.manifest import FileSpec
from engines.bundle.reader import Bundle
from engines.bundle.records import json_from_record
from engines.errors import InputError
from engines.sessions import open_session
from engines.sessions import tensorrt as sessions
from engines.targets import TARGETS
from engines.tensorrt import plan as plans
from engines.tensorrt import trial
from engines.tensorrt.device import Gpu
from engines.tensorrt.profiles import limits_from_options, profiles_from_limits
from tests.helpers.decoder_bundle import write_decoder_bundle

TARGET, VERSION = TARGETS["rtx-3090"], "1.7.1.116"
MODULE = """
import os, signal, time

class Logger:
    INTERNAL_ERROR = 0
    def __init__(self, least): pass

class Runtime:
    def __init__(self, logger): pass
    def deserialize_cuda_engine(self, data):
        with open({log!r}, "a") as log:
            log.write(f"{{os.getpid()}} {{len(data)}}\\n")
        name = data.split()[0].decode()
        if name.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, name))
        if name == "raise":
            raise RuntimeError("no")
        if name == "hang":
            time.sleep(60)
"""


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a line for each plan that was loaded: the process, and the plan's size."""
    (tmp_path / "modules").mkdir()
    log = tmp_path / "loads"
    (tmp_path / "modules" / "tensorrt_rtx.py").write_text(MODULE.format(log=str(log)))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.setattr(plans, "gpus", lambda: (Gpu("RTX 3090", (8, 6), 24 * 10**9),))
    monkeypatch.setattr(plans, "tensorrt_of", lambda target: SimpleNamespace(__version__=VERSION))
    monkeypatch.setattr(plans, "host_platform", lambda: "linux-x86_64")
    monkeypatch.setattr(trial, "_loaded_before", set())
    return log


def with_plans(folder: Path, **contents: bytes) -> Bundle:
    """A bundle with plans of these bytes."""
    bundle = Bundle.open(write_decoder_bundle(folder))
    limits, made = limits_from_options(bundle.manifest.model), {}
    (folder / "plans/rtx-3090").mkdir(parents=True)
    for name, data in contents.items():
        spec = bundle.component(name)
        made[name] = plans.PlanSpec(
            onnx=plans.onnx_hashes(bundle, name),
            profiles=profiles_from_limits(spec, bundle.manifest.model, limits),
            inputs=spec.inputs,
            outputs=spec.outputs,
            plan=FileSpec(len(data), hashlib.sha256(data).hexdigest()),
            kv_cache_updates=0,
            seconds=1.5,
        )
        (folder / f"plans/rtx-3090/{name}.plan").write_bytes(data)
    build = replace(plans.build_header(TARGET, VERSION), components=made)
    (folder / "plans/rtx-3090/build.json").write_text(json_from_record(build))
    return bundle


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_plan_that_crashes_is_named_with_the_signal(loads: Path, tmp_path: Path, name: str) -> None:
    bundle = with_plans(tmp_path / "b", base_ar=name.encode())
    with pytest.raises(InputError, match="TensorRT crashes on this plan") as caught:
        open_session(bundle, "base_ar", backend="tensorrt:rtx-3090")
    assert f"signal {getattr(signal, name).value} ({name})" in caught.value.where
    assert "base_ar for rtx-3090" in caught.value.where and "--target rtx-3090" in caught.value.fix


def test_one_process_tries_all_small_plans_and_each_once(
    loads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_plans(tmp_path / "b", base_ar=b"fine", token_embedding=b"fine too")
    opened: list[bytes] = []

    class Runtime:
        def __init__(self, log: object) -> None: ...

        def deserialize_cuda_engine(self, data: bytes) -> None:
            opened.append(data)

    module = SimpleNamespace(Runtime=Runtime)
    monkeypatch.setattr(sessions, "tensorrt_of", lambda target: module)
    monkeypatch.setattr(sessions, "log_of", lambda module: Log())
    for name in ("base_ar", "token_embedding", "base_ar"):
        with pytest.raises(InputError, match="cannot load"):  # as the fake engine is None
            open_session(bundle, name, backend="tensorrt:rtx-3090")
    assert opened == [b"fine", b"fine too", b"fine"]
    lines = loads.read_text().splitlines()
    assert [line.split()[1] for line in lines] == ["4", "8"]
    (process,) = {line.split()[0] for line in lines}
    assert process != str(os.getpid())


class Log:
    """A log without messages."""

    def collect(self) -> Log:
        return self

    def __enter__(self) -> list[str]:
        return []

    def __exit__(self, *error: object) -> None: ...


def test_another_plan_that_crashes_is_told_when_it_is_needed(loads: Path, tmp_path: Path) -> None:
    bundle = with_plans(tmp_path / "b", base_ar=b"fine", token_embedding=b"SIGSEGV")
    trial.try_plan(bundle, TARGET, "base_ar", b"fine")
    with pytest.raises(InputError, match="crashes"):
        trial.try_plan(bundle, TARGET, "token_embedding", b"SIGSEGV")


@pytest.mark.parametrize("name", [b"SIGKILL", b"raise", b"hang"])
def test_what_is_no_crash_is_left_to_the_load_itself(
    loads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: bytes
) -> None:
    monkeypatch.setattr(trial, "SECONDS", 1.0)
    trial.try_plan(with_plans(tmp_path / "b", base_ar=name), TARGET, "base_ar", name)
    assert len(loads.read_text().splitlines()) == 1


def test_a_large_plan_and_a_missing_module_are_not_tried(
    loads: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = with_plans(tmp_path / "b", base_ar=b"SIGSEGV", token_embedding=b"fine")
    monkeypatch.setattr(trial, "TRIAL_BYTES", 6)
    trial.try_plan(bundle, TARGET, "base_ar", b"SIGSEGV")
    assert not loads.exists()
    monkeypatch.setattr(trial, "TRIAL_BYTES", 100)
    monkeypatch.setattr(sys, "executable", "/no/python")
    trial.try_plan(bundle, TARGET, "base_ar", b"SIGSEGV")
    assert not loads.exists()


def test_an_exception_of_windows_is_a_crash() -> None:
    assert trial._crash(0xC0000005) == "exception 0xc0000005" and trial._crash(1) == trial._crash(0) == ""
