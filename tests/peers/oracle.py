"""What optimum's export of STAR-Nano's base computes, as recorded, and the comparison with it.

`tests/golden/optimum.safetensors` holds a prompt [L], and for each rounding of the rotary frequencies
(docs/star.md 0.2) the ids [16] that follow it greedily and the logits [L + 16, V] of all these tokens. Its
metadata has the versions of the packages that computed them. numpy and safetensors suffice to read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from star_export.golden.compare import Comparison, compare

ROOT = Path(__file__).parents[2]
ORACLE = ROOT / "tests" / "golden" / "optimum.safetensors"
NANO = ROOT / "reference" / "nano" / "weights" / "Qwen2.5-VL-nano"
ROPES = ("fp32", "bf16")  # the settings of `export --rope`; the second is the default
NEW_TOKENS = 16
# The ids must be equal. The unit of the logits is their standard deviation; two computations in float32 were
# at most 5.2e-6 apart, and one in float64 was at most 9.8e-6 away, so that is what float32 rounds.
TOLERANCES = {"ids": 0.0, "logits": 2e-5}
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "as many yellow stars as a dog has legs, on a blue background<|im_end|>\n<|im_start|>assistant\n"
)
Step = Callable[[np.ndarray, int], np.ndarray]  # (ids [S], number of tokens before them) -> logits [S, V]


def decoded(step: Step, prompt: np.ndarray) -> dict[str, np.ndarray]:
    """Run prompt [L] in one prefill, then `NEW_TOKENS` single steps, each with the most likely id.

    Returns `ids` int64 [16] and `logits` float32 [L + 16, V], the last row of which follows the last id.
    """
    ids, logits = [], [step(prompt, 0)]
    for first in range(len(prompt), len(prompt) + NEW_TOKENS):
        ids.append(int(logits[-1][-1].argmax()))
        logits.append(step(np.array(ids[-1:]), first))
    return {"ids": np.array(ids), "logits": np.concatenate(logits)}


def write_oracle(prompt: np.ndarray, results: Mapping[str, dict[str, np.ndarray]], versions: dict) -> None:
    """Record the `results` of each rounding."""
    named = {f"{name}.{rope}": array for rope, found in results.items() for name, array in found.items()}
    save_file({"prompt": prompt} | named, ORACLE, metadata=versions)


def oracle_arrays(rope: str) -> dict[str, np.ndarray]:
    """The recorded `ids` and `logits` of one rounding."""
    with safe_open(ORACLE, "np") as file:
        return {name: file.get_tensor(f"{name}.{rope}") for name in TOLERANCES}


def oracle_prompt() -> np.ndarray:
    """The recorded prompt, int64 [L]."""
    with safe_open(ORACLE, "np") as file:
        return file.get_tensor("prompt")


def oracle_versions() -> dict[str, str]:
    """Package -> version that the oracle was recorded with."""
    with safe_open(ORACLE, "np") as file:
        return file.metadata()


def against_oracle(found: dict[str, np.ndarray], rope: str) -> list[Comparison]:
    """Compare the ids and logits of one rounding with the recorded ones."""
    return compare(found, oracle_arrays(rope), tolerances=TOLERANCES)


def line_of(name: str, results: list[Comparison]) -> str:
    """One line for people: whether the ids are equal, and how far the logits are off."""
    ids, logits = results
    said = "equal" if ids.passed else ids.fault or f"{ids.value:.0%} differ"
    verdict = "passed" if all(result.passed for result in results) else "FAILED"
    return f"{name:48} ids {said}, logits {logits.fault or f'{logits.value:.1e}'} of std: {verdict}"
