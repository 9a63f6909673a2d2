"""TensorRT sessions without a device: memory and an engine made of numpy stand for the real ones."""

import ctypes
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError, UsageError
from engines.sessions import open_session, tensorrt
from engines.tensorrt import device
from engines.tensorrt.profiles import Limits, profiles_from_limits
from tests.helpers.decoder_bundle import HIDDEN, buffers_of, write_decoder_bundle
from tests.helpers.fake_tensorrt import SPEC, STREAM, TRT, Engine
from tests.helpers.tiny_bundle import MODEL

PROFILES = profiles_from_limits(SPEC, MODEL, Limits(capacity_tokens=16, prefill_tokens=8, rows=4))


@pytest.fixture
def memory(monkeypatch):
    """Device memory on the host: address -> array that holds it."""
    blocks = {}

    def allocate(size_bytes):
        block = np.zeros(size_bytes, np.uint8)
        blocks[block.ctypes.data] = block
        return block.ctypes.data

    monkeypatch.setattr(device, "allocate", allocate)
    monkeypatch.setattr(device, "release", lambda address: blocks.pop(address))
    monkeypatch.setattr(device, "stream", lambda: STREAM)
    monkeypatch.setattr(device, "synchronize", lambda: None)
    monkeypatch.setattr(
        device, "copy_to_device", lambda address, a: ctypes.memmove(address, a.ctypes.data, a.nbytes)
    )
    monkeypatch.setattr(
        device, "copy_to_host", lambda a, address: ctypes.memmove(a.ctypes.data, address, a.nbytes)
    )
    return blocks


@pytest.fixture
def session(memory):
    return tensorrt.TensorRTSession(TRT, Engine(memory), SPEC, PROFILES)


def test_a_step_computes_in_place_and_in_the_narrowest_profile(session):
    assert (session.capacity_tokens, session.prefill_tokens) == (16, 8)
    prefill, decode = buffers_of(session, tokens=4), buffers_of(session)
    caches = {name: buffer for name, buffer in prefill.items() if name.startswith("past")}
    decode |= caches
    embeds = np.arange(2 * HIDDEN, dtype=np.float32).reshape(2, 1, HIDDEN)
    decode["inputs_embeds"].write(embeds)
    decode["write_indices"].write(np.array([4, 5]))
    first, second = session.bind(prefill), session.bind(decode)
    first(), second(), second()
    assert [context.calls for context in session._engine.contexts] == [[0], [1, 1]]
    np.testing.assert_array_equal(decode["hidden_states"].read(), 2 * embeds)
    written = caches["past_key_values.0.key"].read()  # [B, KV, C, D] float32
    assert written.dtype == np.float32 and written[0, :, :5].all() and not written[0, :, 5:].any()
    assert written[1, :, :4].all() and not written[1, :, 4].any() and (written[1, :, 5] == 1).all()


def test_two_bindings_of_one_profile_take_turns(session):
    one, two = buffers_of(session), buffers_of(session, rows=3)
    one["inputs_embeds"].write(np.full((2, 1, HIDDEN), 1, np.float32))
    two["inputs_embeds"].write(np.full((3, 1, HIDDEN), 2, np.float32))
    first, second = session.bind(one), session.bind(two)
    first(), second(), first()
    assert len(session._engine.contexts) == 1
    assert (one["hidden_states"].read() == 2).all() and (two["hidden_states"].read() == 4).all()


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda s, t: t.pop("write_indices"), "write_indices: missing"),
        (lambda s, t: t.update(more=t["write_indices"]), "more: extra"),
        (lambda s, t: t.update({"present.0.key": t["past_key_values.0.key"]}), "present.0.key: extra"),
        (lambda s, t: t.update(write_indices=s.buffer((3,), "int64")), "write_indices: expected B=2"),
        (lambda s, t: t.update(inputs_embeds=s.buffer((2, 1, HIDDEN), "float16")), "got float16[2,1,64]"),
        (lambda s, t: t.update(write_indices=np.zeros(2, np.int64)), "expected DeviceBuffer, got ndarray"),
        (
            lambda s, t: t.update(buffers_of(s, capacity=15)),
            "past_key_values.0.key: expected (1, 2, 16, 16) to (4, 2, 16, 16)",
        ),
        (
            lambda s, t: t.update(buffers_of(s, tokens=9)),
            "inputs_embeds: expected (1, 1, 64) to (4, 8, 64) (prefill)",
        ),
        (lambda s, t: t.update(buffers_of(s, rows=5)), "got (5, 1, 64)"),
    ],
)
def test_what_does_not_fit_is_refused_when_it_is_bound(session, change, words):
    tensors = buffers_of(session)
    change(session, tensors)
    with pytest.raises(InputError) as error:
        session.bind(tensors)
    assert words in error.value.where, error.value.where


def test_a_buffer_takes_only_what_it_is(session):
    buffer = session.buffer((2, 3), "int64")
    for wrong in (
        np.zeros((2, 3), np.int32),
        np.zeros((3, 2), np.int64),
        np.zeros((3, 2), np.int64).T,
        [[0]],
        np.zeros((2, 3), ">i8"),
    ):
        with pytest.raises(InputError):
            buffer.write(wrong)
    assert not buffer.read().any()


def test_memory_goes_back_with_what_held_it(session, memory):
    held = len(memory)
    buffer = session.buffer((4,), "float32")
    step = session.bind(buffers_of(session))
    step()
    assert len(memory) == held + 1 + 6
    buffer.close(), buffer.close()
    del buffer, step
    session.close(), session.close()
    assert len(memory) == 0


def test_a_closed_session_says_so(session):
    tensors = buffers_of(session)
    step = session.bind(tensors)
    session.close()
    for action in (step, lambda: session.bind(tensors)):
        with pytest.raises(InputError, match="closed"):
            action()


def test_two_threads_on_one_session_are_refused(session):
    step, inside, go_on = session.bind(buffers_of(session)), threading.Event(), threading.Event()
    context = session._engine.contexts[0]
    real = context.execute_async_v3

    def slow(stream):
        inside.set()
        go_on.wait(10)
        return real(stream)

    context.execute_async_v3 = slow
    other = threading.Thread(target=step)
    other.start()
    inside.wait(10)
    with pytest.raises(InputError, match="in use by another thread"):
        step()
    go_on.set()
    other.join()
    step()


def test_an_engine_that_is_not_the_manifests_is_refused(memory):
    with pytest.raises(InputError, match="differs from its record") as error:
        tensorrt.TensorRTSession(TRT, Engine(memory, ["inputs_embeds", "surprise"]), SPEC, PROFILES)
    assert "surprise" in error.value.where
    with pytest.raises(InputError, match="got differences in: none; 2 profiles"):
        tensorrt.TensorRTSession(TRT, Engine(memory), SPEC, PROFILES[:1])


def test_a_step_that_cannot_be_enqueued_is_an_error(session):
    step = session.bind(buffers_of(session))
    session._engine.contexts[0].execute_async_v3 = lambda stream: False
    with pytest.raises(RuntimeError, match="could not enqueue"):
        step()


def test_open_session_refuses_before_it_needs_a_device(tmp_path):
    bundle = Bundle.open(write_decoder_bundle(tmp_path / "bundle"))
    with pytest.raises(UsageError, match="rtx-3090"):
        open_session(bundle, "base_ar", backend="tensorrt:rtx3090")
    with pytest.raises(InputError, match="There are no plans for rtx-3090"):
        open_session(bundle, "base_ar", backend="tensorrt:rtx-3090")


def test_the_module_imports_where_nothing_of_nvidia_is_installed():
    code = (
        "import sys\nfor name in ('tensorrt', 'tensorrt_rtx', 'cuda'): sys.modules[name] = None\n"
        "import engines.sessions.tensorrt, engines.tensorrt.build, engines.doctor\nengines.doctor.facts()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[3], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
