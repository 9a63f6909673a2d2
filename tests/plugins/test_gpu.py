"""On a GPU: the kernels against numpy in float64 and torch's own attention, their memory accesses, and repeated calls."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated import ELEMENTS, UNIT, Case, expected, inputs_of
from test_kv_attention import RANDOM_SHAPES, random_case
from torch.nn.functional import scaled_dot_product_attention as sdpa

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
MODELS = [Case(2, 16, 2, 1, 1280, 128, (1279, 640)), Case(2, 28, 4, 1, 640, 128, (639, 0)),
          Case(2, 16, 2, 64, 1280, 128, (0, 500)), Case(2, 28, 4, 1250, 1280, 128, (0, 30)),
          Case(8, 8, 8, 1, 4096, 128, tuple(range(4088, 4096))),
          Case(1, 16, 2, 1280, 4096, 128, (2816,), element=0), Case(8, 16, 2, 3, 4096, 64, tuple(range(0, 4000, 500)), int8=True)]


def on_gpu(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ELEMENTS[1]:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def torch_attention(case: Case, inputs: list[np.ndarray]) -> np.ndarray:
    """`index_copy` of the new rows and torch's SDPA over the used slots, row by row, in float64 numbers."""
    query, key, value, *caches = (on_gpu(x) for x in inputs)
    rows = []
    for row, first in enumerate(case.first):
        slots = torch.arange(first, first + case.new, device="cuda")
        keys, values = (c[row].index_copy(1, slots, x[row])[:, :first + case.new] for c, x in zip(caches, (key, value)))
        mask = torch.arange(first + case.new, device="cuda") <= slots[:, None]
        rows.append(sdpa(query[row:row + 1], keys[None], values[None], attn_mask=mask, enable_gqa=True))
    return torch.cat(rows).double().cpu().numpy()


def compare(case: Case, rng: np.random.Generator) -> None:
    from torch_kernels import Attention

    inputs = inputs_of(case, rng)
    (wanted, *caches), bound = expected(case, inputs)
    tensors = [on_gpu(x) for x in inputs]
    call = Attention(*tensors, torch.tensor(case.first, device="cuda"))
    got = call().double().cpu().numpy()
    error = np.abs(got - wanted)
    if case.int8:
        assert (error <= bound).all(), f"{case}: {(error / bound).max():.3g} times the bound"
    else:
        last_place = 2 * UNIT[ELEMENTS[case.element]] * 2.0 ** np.floor(np.log2(np.maximum(np.abs(wanted), 2.0**-14)))
        worst = np.abs(torch_attention(case, inputs) - wanted).max()
        assert (error <= worst + 2 * last_place).all(), f"{case}: error {error.max():.3g}, torch's {worst:.3g}"
    assert [bits(t) for t in tensors[3:]] == [c.tobytes() for c in caches], f"{case}: another cache"
    assert call.flag.item() == 0


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_models_shapes_are_as_defined(case: Case) -> None:
    compare(case, np.random.default_rng(1))


def test_the_random_shapes_are_as_defined() -> None:
    for number in range(RANDOM_SHAPES):
        rng = np.random.default_rng(number)
        compare(random_case(rng), rng)


def test_a_row_that_does_not_fit_writes_nothing_raises_the_flag_and_gives_nan() -> None:
    from torch_kernels import Attention

    case = Case(2, 8, 2, 4, 64, 128, (3, 10))
    tensors = [on_gpu(x) for x in inputs_of(case, np.random.default_rng(2))]
    before = bits(tensors[3][1])
    call = Attention(*tensors, torch.tensor([3, 61], device="cuda"))
    output = call()
    assert call.flag.item() == 1 and bits(tensors[3][1]) == before
    assert output[1].isnan().all() and not output[0].isnan().any()


def test_a_thousand_calls_give_the_same_bits() -> None:
    from torch_kernels import Attention

    for case in MODELS[:4]:
        tensors = [on_gpu(x) for x in inputs_of(case, np.random.default_rng(3))]
        call = Attention(*tensors, torch.tensor(case.first, device="cuda"))
        first = call().clone()
        for _ in range(1000):
            call()
        assert bits(call.output) == bits(first)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    code = ("import numpy as np, test_gpu\nfrom emulated import Case\n"
            "for n, case in enumerate([Case(2, 8, 2, 1, 200, 128, (150, 3)), Case(1, 8, 1, 33, 100, 64, (60,), int8=True),"
            " Case(2, 14, 2, 150, 320, 128, (9, 100))]):\n    test_gpu.compare(case, np.random.default_rng(n))\n")
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-regex", "kns=star", sys.executable, "-c", code]
    result = subprocess.run(command, cwd=Path(__file__).parent, env=_environment(), capture_output=True,
                            text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


def _environment() -> dict[str, str]:
    here = Path(__file__).parent
    return os.environ | {"PYTHONPATH": f"{here.parents[1]}{os.pathsep}{here}"}
