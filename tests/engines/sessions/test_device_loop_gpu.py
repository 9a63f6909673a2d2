"""The loop on a real GPU: its kernels, compiled by NVRTC, and graphs of them, without a plan."""

import numpy as np
import pytest

from engines.errors import MissingError
from engines.runtime.gumbel import gumbel_noise, quantiles
from engines.runtime.windows import Windows
from engines.sessions.device_loop import STEPS, WHOLE, Decoders, DeviceBuffer, DeviceLoop, Head, refusal
from engines.tensorrt import device, graphs

TOKENS, CODEBOOK, HIDDEN, SEED = 40, 65536, 300, 2**127 + 5


@pytest.fixture
def gpu():
    """The GPU. Tests that ask for it are skipped only where there is none."""
    try:
        return device.gpus()[0]
    except (MissingError, IndexError):
        pytest.skip("no CUDA device")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 4, 16])
def test_the_loop_of_a_head_that_draws_one_id_is_that_of_the_host(gpu, window):
    """The head's draws stay what they are, so the ids are known; what is checked is the rest."""
    images, rows = 2, 4
    embeds = DeviceBuffer((rows, window, HIDDEN), "float32")

    def head(draws):
        own = embeds if window == 1 else DeviceBuffer((rows, draws, HIDDEN), "float32")
        noise, ids = (
            DeviceBuffer((images, draws, CODEBOOK), "float32"),
            DeviceBuffer((images, draws), "int64"),
        )
        ids.write(np.full((images, draws), 7))
        own.write(np.full(own.shape, 7, np.float32))
        return Head(lambda: None, noise, ids, own)

    main = head(window)
    decoders = Decoders((), embeds, DeviceBuffer((rows,), "int64"), DeviceBuffer((3, rows, window), "int64"))
    assert refusal(embeds, tokens=TOKENS) is None
    loop = DeviceLoop(
        (), decoders, first=main if window == 1 else head(1), head=main, tokens=TOKENS, quantiles=quantiles()
    )
    ids = loop.decode(first_slot=3, position=9, seed=SEED, progress=lambda *counts: None)
    windows = Windows(np.full(images, 7), tokens=TOKENS, window=window)
    while not windows.done:
        windows.advance(np.full((images, window), 7))
    np.testing.assert_array_equal(ids, windows.ids)
    assert loop.forwards == windows.forwards
    assert loop.how == (STEPS if window == 1 or graphs.while_refusal() else WHOLE), loop.why
    np.testing.assert_array_equal(decoders.write_indices.read(), 3 + windows.starts.repeat(2))
    assert (embeds.read() == 7).all()
    for image, start in enumerate(windows.starts):
        steps = range(start + 1, start + 1 + window)
        wanted = gumbel_noise(SEED, image=image, steps=steps, size=CODEBOOK)
        np.testing.assert_array_equal(main.noise.read()[image], wanted)
    assert loop.counts["writes"] == 1 and loop.counts["syncs"] <= 3
