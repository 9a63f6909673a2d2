"""On a GPU: the kernels against numpy in float64 and torch's attention, their memory accesses, repeated
calls.

`python -m pytest -m gpu tests/plugins -n 14 --maxschedchunk 1`; `-rP` shows how close to their limits the
errors were.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.helpers.emulated import (
    ELEMENTS,
    RANDOM_SHAPES,
    ROOT,
    UNIT,
    Case,
    expected,
    inputs_of,
    random_case,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
PARTS = 16  # of the random shapes, for as many processes
SANITIZER_SECONDS = 300
MODELS = [
    Case(2, 16, 2, 1, 1280, 128, (1279, 640), processors=0),
    Case(2, 28, 4, 1, 640, 128, (639, 0), processors=0),
    Case(2, 16, 2, 64, 1280, 128, (0, 500), processors=0),
    Case(2, 28, 4, 1250, 1280, 128, (0, 30), processors=0),
    Case(8, 8, 8, 1, 4096, 128, tuple(range(4088, 4096)), processors=0),
    Case(1, 16, 2, 1280, 4096, 128, (2816,), element=0, processors=0),
    Case(8, 16, 2, 3, 4096, 64, tuple(range(0, 4000, 500)), int8=True, processors=0),
]
SANITIZED = [
    Case(2, 8, 2, 1, 200, 128, (150, 3)),
    Case(1, 8, 1, 33, 100, 64, (60,), int8=True),  # decode, few rows in int8,
    Case(2, 14, 2, 20, 320, 128, (9, 100)),
    Case(1, 14, 2, 70, 128, 128, (58,), element=0, processors=1),
]  # few, many

CONFIGURED = [*SANITIZED, MODELS[2], Case(2, 14, 2, 150, 400, 128, (200, 31))]


def on_gpu(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ELEMENTS[1]:
        return torch.from_numpy(array.view(np.int16)).cuda().view(torch.bfloat16)
    return torch.from_numpy(array).cuda()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


def torch_attention(case: Case, inputs: list[np.ndarray]) -> np.ndarray:
    """`index_copy` of the new rows and torch's SDPA over the used slots, row by row, as float64 numbers.

    Of torch's backends this is the one that computes in float32: the most exact, and it compiles nothing for
    a new shape.
    """
    query, key, value, *caches = (on_gpu(x) for x in inputs)
    rows = []
    for row, first in enumerate(case.first):
        slots = torch.arange(first, first + case.new, device="cuda")
        keys, values = (
            c[row].index_copy(1, slots, x[row])[:, : first + case.new] for c, x in zip(caches, (key, value))
        )
        mask = torch.arange(first + case.new, device="cuda") <= slots[:, None]
        with sdpa_kernel(SDPBackend.MATH):
            rows.append(sdpa(query[row : row + 1], keys[None], values[None], attn_mask=mask, enable_gqa=True))
    return torch.cat(rows).double().cpu().numpy()


def share_of_limit(
    case: Case, rng: np.random.Generator, *, torch_too: bool = True, plan: tuple[int, int] = (0, 0)
) -> tuple[float, tuple]:
    """The largest error of one call over what is allowed, and the kind of kernel.

    The error is infinite where a cache differs or the flag is up. Two units in the last place beyond torch's
    largest error are allowed; for int8, which torch lacks, and without torch (`torch_too`), what is allowed
    to the emulated blocks.
    """
    from tests.helpers.torch_kernels import Attention

    inputs = inputs_of(case, rng)
    (wanted, *caches), limit = expected(case, inputs)
    tensors = [on_gpu(x) for x in inputs]
    call = Attention(*tensors, torch.tensor(case.first, device="cuda"), processors=case.processors, plan=plan)
    error = np.abs(call().cpu().double().numpy() - wanted)
    if torch_too and not case.int8:
        last_place = (
            2 * UNIT[ELEMENTS[case.element]] * 2.0 ** np.floor(np.log2(np.maximum(np.abs(wanted), 2.0**-14)))
        )
        limit = np.abs(torch_attention(case, inputs) - wanted).max() + 2 * last_place
    same = [bits(t) for t in tensors[3:]] == [c.tobytes() for c in caches] and call.flag.item() == 0
    kind = call.plan[0], case.dim, ("fp16", "bf16")[case.element], "int8" if case.int8 else "plain"
    return float(np.nan_to_num(error / limit, nan=np.inf).max()) if same else np.inf, kind


def check_all(cases: Iterable[tuple[Case, np.random.Generator]], **options) -> None:
    """Every case; then, where some fail, one message with their count, their kinds and the worst of them."""
    shares, kinds, stopped = {}, {}, ""
    for case, rng in cases:
        try:
            shares[case], kinds[case] = share_of_limit(case, rng, **options)
        except RuntimeError as error:  # after an error of the device nothing more runs in this process
            stopped = f"; stopped at {case}: {error}"
            break
    failed = sorted((case for case in shares if not shares[case] <= 1), key=shares.get, reverse=True)
    print(f"{len(shares)} cases, at most {max(shares.values(), default=np.inf):.3g} of the limit")
    listed = "".join(f"\n{shares[case]:.4g} times the limit: {kinds[case]} {case}" for case in failed[:4])
    assert not failed and not stopped, (
        f"{len(failed)} of {len(shares)} fail {dict(Counter(map(kinds.get, failed)))}{stopped}{listed}"
    )


def sanitized(tool: str, code: str) -> subprocess.CompletedProcess:
    """Run Python code under compute-sanitizer, on this project's kernels only; a finding is exit code 9."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--kernel-regex",
        "kns=star",
        sys.executable,
        "-c",
        code,
    ]
    # without torch's cache of memory every tensor is an allocation of its own, whose ends are watched
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SANITIZER_SECONDS
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
def test_compute_sanitizer_finds_nothing(tool: str) -> None:
    result = sanitized(
        tool,
        "import numpy as np\nfrom tests.plugins.test_gpu import SANITIZED, check_all\n"
        "check_all([(case, np.random.default_rng(1)) for case in SANITIZED], torch_too=False)\n",
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert f"{len(SANITIZED)} cases" in result.stdout


def test_compute_sanitizer_sees_a_cache_that_is_too_short() -> None:
    result = sanitized(
        "memcheck",
        "import torch\nfrom tests.helpers.torch_kernels import Attention\n"
        "shapes = [(1, 4, 1, 64), *[(1, 2, 1, 64)] * 2, (1, 2, 128, 64), (1, 2, 64, 64)]\n"
        "tensors = [torch.zeros(shape, dtype=torch.half, device='cuda') for shape in shapes]\n"
        "Attention(*tensors, torch.full((1,), 120, device='cuda'))().cpu()\n",
    )
    assert result.returncode == 9 and "Invalid __global__" in result.stdout, (
        result.stdout[-4000:] + result.stderr[-2000:]
    )


@pytest.mark.parametrize("case", MODELS, ids=str)
def test_the_models_shapes_are_as_defined(case: Case) -> None:
    check_all([(case, np.random.default_rng(1))])


@pytest.mark.parametrize("splits", [1, 3])
def test_every_configuration_is_as_defined(splits: int) -> None:
    from tests.helpers.torch_kernels import library

    for configuration in range(library().star_configurations()):
        check_all([(case, np.random.default_rng(1)) for case in CONFIGURED], plan=(configuration, splits))


@pytest.mark.parametrize("part", range(PARTS))
def test_the_random_shapes_are_as_defined(part: int) -> None:
    generators = [np.random.default_rng(number) for number in range(part, RANDOM_SHAPES, PARTS)]
    check_all([(random_case(rng), rng) for rng in generators])


def test_a_row_that_does_not_fit_writes_nothing_raises_the_flag_and_gives_nan() -> None:
    from tests.helpers.torch_kernels import Attention

    case = Case(2, 8, 2, 4, 64, 128, (3, 10))
    tensors = [on_gpu(x) for x in inputs_of(case, np.random.default_rng(2))]
    before = bits(tensors[3][1])
    call = Attention(*tensors, torch.tensor([3, 61], device="cuda"))
    output = call()
    assert call.flag.item() == 1 and bits(tensors[3][1]) == before
    assert output[1].isnan().all() and not output[0].isnan().any()


@pytest.mark.parametrize("case", MODELS[:4], ids=str)
def test_a_thousand_calls_give_the_same_bits(case: Case) -> None:
    from tests.helpers.torch_kernels import Attention

    tensors = [on_gpu(x) for x in inputs_of(case, np.random.default_rng(3))]
    call = Attention(*tensors, torch.tensor(case.first, device="cuda"))
    first = call().clone()
    for _ in range(1000):
        call()
    assert bits(call.output) == bits(first)
