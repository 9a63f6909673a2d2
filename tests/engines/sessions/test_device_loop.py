"""The loop on the device draws the ids of the host's loop, and the host neither writes nor waits."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest

from engines.bundle.manifest import ComponentSpec, TensorSpec
from engines.runtime import decode
from engines.runtime.decode import ImageLoop
from engines.sessions import device_loop
from engines.sessions.array_buffer import ArrayBuffer
from engines.sessions.tensorrt import TensorRTSession
from engines.tensorrt import graphs, nvrtc
from engines.tensorrt.profiles import Limits, profiles_from_limits
from tests.helpers.emulated import ROOT
from tests.helpers.fake_cuda import Engine, FakeCuda, built
from tests.helpers.fake_decoder import FakeDecoder, H, spec
from tests.helpers.fake_tensorrt import TRT
from tests.helpers.loop_kernels import compared, equal
from tests.helpers.tiny_bundle import MODEL

IDS, PROMPT, CAPACITY = 44, 5, 48
SEED = 2**127 + 2**64 + 11
TABLE = np.random.default_rng(1).standard_normal((IDS, H)).astype(np.float32)
WEIGHTS = np.random.default_rng(2).standard_normal((H, IDS)).astype(np.float32)
HEAD = ComponentSpec(
    "image_head",
    None,
    "golden",
    inputs=(
        TensorSpec("hidden_states", "float32", ("2N", "S", H)),
        TensorSpec("guidance", "float32", (1,)),
        TensorSpec("top_k", "int64", (1,)),
        TensorSpec("top_p", "float32", (1,)),
        TensorSpec("noise", "float32", ("N", "S", IDS)),
    ),
    outputs=(
        TensorSpec("image_ids", "int64", ("N", "S")),
        TensorSpec("inputs_embeds", "float32", ("2N", "S", H)),
        TensorSpec("logits", "float32", ("N", "S", IDS)),
    ),
)
SYNCS = ("cudaStreamSynchronize", "cudaFree", "cudaMalloc")


def compute_head(t):
    hidden = t["hidden_states"]
    t["logits"][...] = np.einsum("nsh,hv->nsv", t["guidance"][0] * hidden[::2] - hidden[1::2], WEIGHTS)
    t["image_ids"][...] = (t["logits"] + t["noise"]).argmax(-1)
    t["inputs_embeds"][...] = np.repeat(TABLE[t["image_ids"]], 2, axis=0)


class Embedding:
    """The table of image embeddings, on the host."""

    prefill_tokens = None
    buffer = staticmethod(ArrayBuffer)

    def bind(self, tensors):
        return lambda: tensors["inputs_embeds"].write(TABLE[tensors["image_ids"].read()])


def loop_on(cuda, *, images=1, tokens=12, window=1, capturable=(True, True, True)):
    """(An ImageLoop on TensorRT sessions of fake engines, those engines.)"""
    limits = Limits(capacity_tokens=CAPACITY, prefill_tokens=16, rows=6)
    stacked = FakeDecoder()
    stacked.weights = np.random.default_rng(3).standard_normal((3, H, H)).astype(np.float32) / 3
    sessions, engines = [], []
    for s, compute, known in zip(
        (spec(), spec(), HEAD), (FakeDecoder().step, stacked.step, compute_head), capturable
    ):
        profiles = profiles_from_limits(s, MODEL, limits)
        engines.append(Engine(cuda, s, profiles, compute, capturable=known))
        sessions.append(TensorRTSession(TRT, engines[-1], s, profiles))
    sizes = {"num_images": images, "tokens": tokens, "capacity_tokens": CAPACITY, "window": window}
    return ImageLoop(*sessions, Embedding(), **sizes), engines


def drawn(loop, *, images, seed=SEED):
    rng = np.random.default_rng(images)
    embeds = rng.standard_normal((2 * images, PROMPT, H)).astype(np.float32)
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(PROMPT), (3, 2 * images, PROMPT)))
    return loop.draw(embeds, positions, guidance=2.0, top_k=IDS, top_p=1.0, seed=seed)


def on_host(monkeypatch, cuda, **sizes):
    """A loop as in `loop_on` that the host advances."""
    with monkeypatch.context() as patch:
        patch.setattr(decode, "refusal", lambda *a, **k: "planted")
        return loop_on(cuda, **sizes)[0]


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda().install(monkeypatch)


def check_kernels(rng, **sizes):
    """A whole image's steps with random draws, each as Windows and Noise have it, bit for bit."""
    for what, got, wanted in compared(rng, **sizes):
        assert equal(got, wanted), what


@pytest.mark.parametrize("window", [1, 2, 4, 16])
def test_the_kernels_are_windows_and_noise(cuda, window):
    for case in range(9):
        rng = np.random.default_rng(window * 100 + case)
        seed = None if case == 8 else int.from_bytes(rng.bytes(16), "big")
        sizes = {"images": 1 + case % 3, "tokens": window + int(rng.integers(1, 30))}
        check_kernels(rng, window=window, codebook=int(rng.integers(1, 4200)), seed=seed, **sizes)


FAULTS = {
    "a guess after a wrong one counts": ("right == i && (", "("),
    "a known token is drawn again": ("if (at >= known) ids", "if (at >= start) ids"),
    "the last window is placed too early": ("now < last ? now : last", "now < last - 1 ? now : last - 1"),
    "a known row is drawn again": ("if (from >= kept)", "if (from >= (kept > 0))"),
    "the last draw is not repeated": ("from - 1 < loop.draws ? from - 1 :", ""),
    "one round too few": ("round < 10", "round < 9"),
    "the key's halves are swapped": ("loop.state[kSeedLow]), u64(loop.state[kSeedHigh])",
                                     "loop.state[kSeedHigh]), u64(loop.state[kSeedLow])"),
    "one step too late": ("starts_of(loop)[image] + 1 +", "starts_of(loop)[image] + 2 +"),
    "an image too early done": ("[image] < loop.tokens;", "[image] + 1 < loop.tokens;"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_of_a_kernel_is_seen(monkeypatch, tmp_path, name):
    right, wrong = FAULTS[name]
    source = (ROOT / "engines" / "tensorrt" / "loop.cu").read_text()
    assert source.count(right) == 1
    (tmp_path / "loop.cu").write_text(source.replace(right, wrong))
    FakeCuda(kernels=built(tmp_path)).install(monkeypatch)
    with pytest.raises(AssertionError):
        for case in range(5):
            rng = np.random.default_rng(case)
            check_kernels(rng, images=2, window=4, tokens=21, codebook=50, seed=SEED)


def between(calls):
    """The calls after the first launch of a graph up to the last one."""
    at = [i for i, name in enumerate(calls) if name == "cuGraphLaunch"]
    return Counter(calls[at[0] : at[-1] + 1])


@pytest.mark.parametrize("seed", [SEED, None])
@pytest.mark.parametrize("images", [1, 3])
def test_one_token_per_step_takes_a_launch_each_and_nothing_else(cuda, monkeypatch, images, seed):
    tokens = 12
    wanted = drawn(on_host(monkeypatch, cuda, images=images, tokens=tokens), images=images, seed=seed)
    loop, engines = loop_on(cuda, images=images, tokens=tokens)
    for _ in range(2):  # a loop draws many images
        cuda.calls.clear()
        np.testing.assert_array_equal(drawn(loop, images=images, seed=seed), wanted)
        assert (loop.on_device.how, loop.on_device.why) == (device_loop.STEPS, None)
        assert loop.forwards == tokens - 1
        assert between(cuda.calls) == {"cuGraphLaunch": tokens - 2}  # the first step was enqueued plainly
        assert cuda.open_graphs == 0
    counts = loop.on_device.counts
    assert counts["writes"] == 1 and counts["syncs"] <= 3


@pytest.mark.parametrize(
    "images, tokens, window", [(1, 30, 4), (3, 23, 4), (2, 30, 16), (2, 5, 4), (1, 9, 2)]
)
def test_several_tokens_per_step_take_one_launch(cuda, monkeypatch, images, tokens, window):
    host = on_host(monkeypatch, cuda, images=images, tokens=tokens, window=window)
    wanted = drawn(host, images=images)
    one = on_host(monkeypatch, cuda, images=images, tokens=tokens)
    np.testing.assert_array_equal(wanted, drawn(one, images=images))
    loop, _ = loop_on(cuda, images=images, tokens=tokens, window=window)
    cuda.calls.clear()
    np.testing.assert_array_equal(drawn(loop, images=images), wanted)
    assert (loop.on_device.how, loop.on_device.why) == (device_loop.WHOLE, None)
    assert loop.forwards == host.forwards <= tokens - 1 - (tokens >= 23)  # some guesses are right
    assert Counter(cuda.calls)["cuGraphLaunch"] == 1 and cuda.open_graphs == 0
    assert loop.on_device.counts["writes"] == 1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"driver": 12030}, "the driver is for CUDA 12.3, and WHILE nodes need 12.4"),
        ({"refused": ("cuGraphAddNode",)}, "cuGraphAddNode failed with CUDA error 801"),
        ({"refused": ("cuStreamBeginCaptureToGraph",)}, "cuStreamBeginCaptureToGraph failed"),
    ],
)
def test_without_while_nodes_steps_are_launched_in_batches(monkeypatch, options, words):
    cuda = FakeCuda(**options).install(monkeypatch)
    host = on_host(monkeypatch, cuda, images=2, tokens=30, window=4)
    wanted = drawn(host, images=2)
    loop, _ = loop_on(cuda, images=2, tokens=30, window=4)
    cuda.calls.clear()
    np.testing.assert_array_equal(drawn(loop, images=2), wanted)
    assert loop.on_device.how == device_loop.STEPS and words in loop.on_device.why
    assert loop.forwards == host.forwards
    calls = between(cuda.calls)
    assert calls["cuGraphLaunch"] >= host.forwards - 1
    assert set(calls) == {"cuGraphLaunch", "cudaMemcpyAsync", "cudaStreamSynchronize"}
    assert calls["cudaStreamSynchronize"] < host.forwards / 2


@pytest.mark.parametrize("window", [1, 4])
@pytest.mark.parametrize(
    "spoil, words",
    [
        (
            lambda cuda, engines: setattr(engines[1], "capturable", False),
            "TensorRT cannot run fake/model.onnx",
        ),
        (lambda cuda, engines: cuda.refused.add("cuGraphInstantiate"), "cuGraphInstantiate failed"),
        (lambda cuda, engines: spoilt(engines[0], cuda._cudaMalloc, 9), "could not enqueue this step"),
        (lambda cuda, engines: spoilt(engines[2], cuda._cudaStreamSynchronize, 7), "could not enqueue"),
    ],
)
def test_a_step_that_cannot_be_captured_is_enqueued_and_says_why(cuda, monkeypatch, window, spoil, words):
    wanted = drawn(on_host(monkeypatch, cuda, images=2, tokens=9, window=window), images=2)
    loop, engines = loop_on(cuda, images=2, tokens=9, window=window, capturable=(None, None, None))
    spoil(cuda, engines)
    for engine in engines:
        for context in engine.contexts:
            if engine.capturable is False:
                context.is_stream_capturable = lambda stream: False
    np.testing.assert_array_equal(drawn(loop, images=2), wanted)
    assert loop.on_device.how == device_loop.PLAIN and words in loop.on_device.why
    assert loop.on_device.counts["writes"] == 1 and cuda.nodes is None and cuda.open_graphs == 0


def spoilt(engine, call, argument):
    """Let the engine's contexts do in every step what a capture does not allow."""
    for context in engine.contexts:
        real = context.execute_async_v3
        context.execute_async_v3 = lambda stream, c=call, r=real: (
            not (context.cuda.nodes is not None and isinstance(c(argument), tuple)) and r(stream)
        )


def test_the_fake_refuses_what_a_capture_does_not_allow(cuda):
    loop, engines = loop_on(cuda)
    buffer = loop.embeds
    for work in (
        lambda: device_loop.DeviceBuffer((4,), "float32"),
        lambda: buffer.write(np.zeros(buffer.shape, np.float32)),
        buffer.read,
        device_loop.device.synchronize,
        loop.base_step,  # never enqueued before
    ):
        with pytest.raises(RuntimeError):
            graphs.graph_of(work)
        assert cuda.nodes is None
    loop.base_step()
    graphs.graph_of(loop.base_step).close()
    assert engines[0].contexts[-1].calls[-2:] == ["enqueue"] * 2


def test_without_nvrtc_the_host_advances_and_says_why(cuda, monkeypatch):
    def missing(*arguments):
        raise device_loop.MissingError("NVRTC is not installed", where="libnvrtc", fix="install it")

    monkeypatch.setattr(nvrtc, "cubin_from_source", missing)
    loop, _ = loop_on(cuda)
    assert loop.on_device is None and re.match("NVRTC is not installed", loop.on_host_because)
    assert drawn(loop, images=1).shape == (1, 12)


@pytest.mark.parametrize("window", [1, 4])
def test_what_the_device_cannot_do_the_host_does_on_the_same_sessions(cuda, window):
    """Prompts of several lengths, a seed of each, and somebody who watches: the ids are those drawn alone."""
    rng, lengths, seeds = np.random.default_rng(0), (5, 3), (SEED, 7)
    prompts = [rng.standard_normal((2, length, H)).astype(np.float32) for length in lengths]
    settings = {"guidance": 2.0, "top_k": IDS, "top_p": 1.0}

    def places(rows: int, length: int) -> np.ndarray:
        return np.ascontiguousarray(np.broadcast_to(np.arange(length), (3, rows, length)))

    alone = []
    for prompt, length, seed in zip(prompts, lengths, seeds):
        loop, _ = loop_on(cuda, window=window)
        alone.append(loop.draw(prompt, places(2, length), **settings, seed=seed)[0])
        assert loop.on_device and loop.on_device.forwards
    loop, _ = loop_on(cuda, images=2, window=window)
    padded = np.concatenate([np.pad(p, ((0, 0), (0, 5 - p.shape[1]), (0, 0)), mode="edge") for p in prompts])
    seen: list[int] = []
    ids = loop.draw(
        padded,
        places(4, 5),
        **settings,
        seed=seeds,
        lengths=np.array(lengths),
        watch=lambda known, ids: seen.append(int(known.min())),
    )
    np.testing.assert_array_equal(ids, alone)
    assert seen == sorted(seen) and seen[-1] == 12 and loop.on_device and not loop.on_device.forwards
