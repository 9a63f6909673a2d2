"""TensorRT sessions on a real GPU: buffers keep their bits, and decoding agrees with prefill."""

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import MissingError
from engines.sessions import open_session, tensorrt
from engines.targets import TARGETS
from engines.tensorrt import build, device
from tests.helpers.decoder_bundle import HIDDEN, buffers_of, write_decoder_bundle


def device_count():
    try:
        return len(device.gpus())
    except MissingError:
        return 0


@pytest.fixture
def gpu():
    """The GPU. Tests that ask for it are skipped only where there is none."""
    if not device_count():
        pytest.skip("no CUDA device")
    return device.gpus()[0]


@pytest.mark.gpu
def test_buffers_keep_their_bits_on_a_real_device(gpu):
    rng = np.random.default_rng(0)
    for dtype in ("float32", "float16", "int64", "int32", "bool"):
        buffer, array = tensorrt.DeviceBuffer((3, 5), dtype), rng.integers(0, 2, (3, 5)).astype(dtype)
        assert not buffer.read().any()
        buffer.write(array)
        np.testing.assert_array_equal(buffer.read(), array)
    assert not tensorrt.DeviceBuffer((3, 5), "bfloat16").read().any()


@pytest.mark.gpu
def test_ten_thousand_buffers_leave_the_memory_as_it_was(gpu):
    free = device.call("cudaMemGetInfo")[0]
    for _ in range(10_000):
        tensorrt.DeviceBuffer((1 << 20,), "float32")
    device.synchronize()
    assert abs(device.call("cudaMemGetInfo")[0] - free) < 64 << 20


@pytest.mark.gpu
def test_a_decoder_on_a_real_device_decodes_as_it_prefills(gpu, tmp_path):
    name = next(
        (
            t.name
            for t in TARGETS.values()
            if t.compute_capability == gpu.compute_capability and t.dialect == "modern"
        ),
        None,
    )
    assert name, f"no target for {gpu.sm} ({gpu.name}): add it to the device table"
    bundle = Bundle.open(write_decoder_bundle(tmp_path / "bundle"))
    build.build_plans(bundle, [name], components=["base_ar"], capacity_tokens=16)
    session = open_session(bundle, "base_ar", backend=f"tensorrt:{name}")
    embeds = np.random.default_rng(0).standard_normal((2, 6, HIDDEN)).astype(np.float32)
    whole, stepped = buffers_of(session, tokens=6), buffers_of(session)
    whole["inputs_embeds"].write(embeds)
    session.bind(whole)()
    expected, step = whole["hidden_states"].read(), session.bind(stepped)
    for i in range(6):
        stepped["inputs_embeds"].write(np.ascontiguousarray(embeds[:, i : i + 1]))
        stepped["write_indices"].write(np.full(2, i, np.int64))
        step()
        assert (
            np.abs(stepped["hidden_states"].read() - expected[:, i : i + 1]).max()
            <= 0.05 * np.abs(expected).max()
        )
    np.testing.assert_allclose(
        stepped["past_key_values.0.key"].read()[:, :, :6],
        whole["past_key_values.0.key"].read()[:, :, :6],
        rtol=0.02,
        atol=0.02,
    )
    assert not stepped["past_key_values.0.key"].read()[:, :, 6:].any(), (
        "a slot beyond the written ones was touched"
    )
    session.close()
