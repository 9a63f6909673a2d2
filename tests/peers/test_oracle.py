"""An independent exporter computes the same: the reference and the fp32 bundle agree with what optimum's
export of STAR-Nano's base computed, and small faults do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tomllib
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from engines.errors import ParityError
from reference.model import Star
from star_export.golden.compare import check
from tests.peers import oracle, ours

PINNED = Path(__file__).parent / "constraints.txt"


@pytest.fixture(scope="module")
def prompt() -> np.ndarray:
    return oracle.oracle_prompt()


@pytest.fixture(scope="module")
def capacity(prompt: np.ndarray) -> int:
    return len(prompt) + oracle.NEW_TOKENS


def test_the_oracle_is_of_the_prompt_and_says_something(prompt: np.ndarray) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(oracle.NANO / "tokenizer.json"))
    assert prompt.tolist() == tokenizer.encode(oracle.PROMPT, add_special_tokens=False).ids
    for rope in oracle.ROPES:
        ids, logits = oracle.oracle_arrays(rope).values()
        assert "four yellow stars" in tokenizer.decode(ids)
        assert logits.shape == (len(prompt) + oracle.NEW_TOKENS, tokenizer.get_vocab_size())
        assert ids.tolist() == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("rope", oracle.ROPES)
def test_the_reference_agrees(rope: str, prompt: np.ndarray, capacity: int) -> None:
    step = ours.reference_step(ours.star_of(rope), capacity_tokens=capacity)
    check(oracle.against_oracle(oracle.decoded(step, prompt), rope), where=f"reference, {rope}")


@torch.no_grad()
def test_the_tolerance_is_a_small_multiple_of_what_float32_rounds(prompt: np.ndarray, capacity: int) -> None:
    step = ours.reference_step(ours.star_of("fp32").double(), capacity_tokens=capacity)
    ids, logits = oracle.against_oracle(oracle.decoded(step, prompt), "fp32")
    assert ids.passed and oracle.TOLERANCES["logits"] / 5 < logits.value < oracle.TOLERANCES["logits"] / 2


@pytest.mark.parametrize("rope", oracle.ROPES)
def test_the_exported_bundle_agrees_and_the_other_rounding_does_not(
    rope: str, prompt: np.ndarray, capacity: int, tmp_path: Path
) -> None:
    step = ours.bundle_step(ours.bundle_of(rope, tmp_path / "bundle"), capacity_tokens=capacity)
    found = oracle.decoded(step, prompt)
    check(oracle.against_oracle(found, rope), where=f"bundle, {rope}")
    (other,) = set(oracle.ROPES) - {rope}
    with pytest.raises(ParityError, match="logits: expected at most 2e-05"):
        check(oracle.against_oracle(found, other), where=f"bundle, {rope}")


def theta_off_by_a_thousandth(star: Star) -> None:
    frequencies = star.base_ar.rotary.inv_freq
    frequencies *= 0.999 ** (torch.arange(len(frequencies)) / len(frequencies))


def ten_times_the_epsilon(star: Star) -> None:
    for layer in star.base_ar.layers:
        layer.input_layernorm.eps *= 10


def two_rows_of_the_head_exchanged(star: Star) -> None:
    weight = star.text_head.weight.detach().clone()
    weight[[7, 8]] = weight[[8, 7]]
    star.text_head.weight = torch.nn.Parameter(weight, requires_grad=False)


def a_bias_left_out(star: Star) -> None:
    star.base_ar.layers[3].self_attn.v_proj.bias.zero_()


def key_heads_exchanged(star: Star) -> None:
    layer = star.base_ar.layers[1].self_attn
    for value in (layer.k_proj.weight, layer.k_proj.bias):
        value.copy_(value.roll(layer.head_dim, 0))


FAULTS = [
    theta_off_by_a_thousandth,
    ten_times_the_epsilon,
    two_rows_of_the_head_exchanged,
    a_bias_left_out,
    key_heads_exchanged,
]


@torch.no_grad()
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_refused(fault, prompt: np.ndarray, capacity: int) -> None:
    star = ours.star_of("fp32")
    fault(star)
    found = oracle.decoded(ours.reference_step(star, capacity_tokens=capacity), prompt)
    with pytest.raises(ParityError, match="The outputs differ"):
        check(oracle.against_oracle(found, "fp32"), where=fault.__name__)


def test_the_versions_are_those_that_make_installs_and_that_the_extra_admits() -> None:
    pinned = dict(line.split("==") for line in PINNED.read_text().split())
    assert oracle.oracle_versions().items() <= pinned.items()
    project = tomllib.loads((oracle.ROOT / "pyproject.toml").read_text())["project"]
    named = {canonicalize_name(name): version for name, version in pinned.items()}
    for text in (*project["dependencies"], *project["optional-dependencies"]["peers"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(named[canonicalize_name(requirement.name)]), text
