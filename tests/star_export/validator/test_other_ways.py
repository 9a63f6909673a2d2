"""The rung of other ways: a clean bundle passes, and a fault of each way is caught by its row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import MissingError
from engines.fit.memory import task_memory
from engines.progress import silent
from engines.runtime import gumbel
from engines.runtime.loaded import Loaded
from engines.runtime.star import Star
from engines.runtime.windows import Windows
from star_export.golden.tolerances import compute_of
from star_export.validator import other_ways as other
from star_export.validator import rungs, subject
from star_export.validator.subject import Subject

BACKEND = "onnxruntime-exact"


def failing(root: Path) -> set[str]:
    """The ways whose ids differ from the plain way's."""
    bundle = Bundle.open(root)
    tried = Subject(bundle, BACKEND, compute_of(BACKEND, bundle.manifest.precision))
    rows, note = other.other_ways(tried, silent)
    assert not note and len(rows) == 4  # the ids of an image and of an answer, loaded in turn
    return {row.check for row in rows if not row.worst.passed}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int4"])
def test_a_clean_bundle_gives_the_same_ids_in_every_way(
    bundle_of: Callable[[str], Path], precision: str
) -> None:
    assert failing(bundle_of(precision)) == set()


def test_a_large_model_is_loaded_in_turn(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(mini_bundle)
    tried = Subject(bundle, BACKEND, "fp32")
    with tried.star() as star:
        assert star.loaded.memory_bytes is None and star.window == 1
    monkeypatch.setattr(subject, "IN_TURN_BYTES", 1 << 20)
    with tried.star(window=4) as star:
        budget = star.loaded.memory_bytes
        star.edit(np.full((56, 56, 3), 9, np.uint8), "a red cat")
        assert budget and star.window == 4
        assert not {"vq_encoder", "vq_decoder"} <= set(star.loaded.open)  # held one after the other
    assert failing(mini_bundle) == set()


@pytest.mark.parametrize("whole_runs", [other.other_ways, rungs.whole_runs])
def test_whole_runs_are_left_out_where_they_would_take_nearly_all_memory(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, whole_runs: Callable
) -> None:
    tried = Subject(Bundle.open(mini_bundle), BACKEND, "fp32")
    with tried.star() as star:
        use = star.loaded.use(rows=2, tokens=rungs.ROLLOUT_TOKENS, prompt_tokens=rungs.ROLLOUT_TOKENS)
        held = task_memory(star.loaded.sizes, "generate", use).resident_bytes
    monkeypatch.setattr(rungs, "free_memory", lambda backend: held * 6 // 5)
    rows, note = whole_runs(tried, silent)
    assert rows == [] and "left out: There is too little memory to run the decoders together" in note


def test_memory_that_ran_out_costs_the_fast_path_its_whole_runs_alone(
    bundle_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sessions(self: Loaded, *components: str, use: object = None) -> None:
        raise MissingError("There is too little memory", where="onnxruntime: 1 byte", fix="close programs")

    monkeypatch.setattr(Loaded, "sessions", sessions)
    rows, note = rungs.fast_path(Subject(Bundle.open(bundle_of("int4")), BACKEND, "fp32"), silent)
    assert rows and note == "left out: whole runs: There is too little memory: onnxruntime: 1 byte"


def accepts_every_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    advance = Windows.advance

    def accepting(self: Windows, drawn: np.ndarray | None) -> None:
        advance(self, drawn)
        self.known[:] = self.tokens

    monkeypatch.setattr(Windows, "advance", accepting)


def noise_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third step on, in windows only."""
    at = gumbel.Noise.at

    def late(self: gumbel.Noise, steps: np.ndarray) -> np.ndarray:
        return at(self, steps + (self.rows.shape[1] > 1) * (steps > 2))

    monkeypatch.setattr(gumbel.Noise, "at", late)


def noise_of_the_other_image(monkeypatch: pytest.MonkeyPatch) -> None:
    at = gumbel.Noise.at
    monkeypatch.setattr(gumbel.Noise, "at", lambda self, t: np.ascontiguousarray(at(self, t)[::-1]))


def other_ids_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a component that was loaded again wrongly would give."""
    drawn = Star.generate_ids

    def other_ids(self: Star, *arguments, **options) -> np.ndarray:
        ids = drawn(self, *arguments, **options)
        return ids if self.loaded.memory_bytes is None else np.roll(ids, 1)

    monkeypatch.setattr(Star, "generate_ids", other_ids)


@pytest.mark.parametrize(
    ("fault", "caught"),
    [
        (accepts_every_guess, {"window of 8 tokens"}),
        (noise_of_the_next_step, {"window of 8 tokens"}),
        (noise_of_the_other_image, {"first of two images"}),
        (other_ids_in_turn, {"loaded in turn"}),
    ],
)
def test_a_fault_of_one_way_fails_in_its_row(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable, caught: set[str]
) -> None:
    fault(monkeypatch)
    assert failing(mini_bundle) == caught


def test_loaded_in_turn_gives_components_back(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, give_back = [], Loaded._give_back

    def counting(self: Loaded, names: list[str]) -> None:
        given.extend(names if self.memory_bytes is not None and not self.closed else [])
        give_back(self, names)

    monkeypatch.setattr(Loaded, "_give_back", counting)
    assert failing(mini_bundle) == set()
    assert len(given) >= 2, "or the way loads nothing in turn"
