"""A budget loads components in turn, gives the same results, and refuses what cannot fit before loading."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engines.errors import MissingError, UsageError
from engines.fit.memory import task_memory, weight_bytes
from engines.runtime import loaded
from engines.runtime.star import Star

IMAGE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def least(star: Star, *tasks: str) -> int:
    """The smallest budget for the tasks below: their prompts have fewer than 100 tokens."""
    use = star.loaded.use(rows=2, tokens=120, prompt_tokens=100)
    return max(task_memory(star.loaded.sizes, task, use).in_turn_bytes for task in tasks)


def results(star: Star) -> list[np.ndarray]:
    edited = star.edit(IMAGE, "a red dog", seed=3)
    answer = star.ask(IMAGE, "what is a dog?", max_new_tokens=4)
    reasoned = star.generate("a red cat", reason=True, max_new_tokens=4, seed=5)
    again = star.edit(IMAGE, "a red dog", seed=3)
    return [edited.image_ids, edited.images, answer.ids, reasoned.image_ids, again.images]


def test_results_are_the_same_in_turn_and_the_budget_is_kept(mini_bundle: Path, monkeypatch) -> None:
    opened: list[str] = []
    held: list[int] = []
    with Star(mini_bundle) as star:
        wanted, everything = results(star), star.loaded._weights(star.loaded.open)
        budget = least(star, "edit", "ask", "reason")
    assert budget < everything
    open_sessions = loaded.open_sessions

    def watched(bundle, names, **options):
        opened.extend(names)
        held.append(star.loaded._weights({*star.loaded.open, *names}))
        return open_sessions(bundle, names, **options)

    monkeypatch.setattr(loaded, "open_sessions", watched)
    with Star(mini_bundle, memory=budget) as star:
        for a, b in zip(results(star), wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    assert max(held) <= budget
    assert opened.count("vision_encoder") == 3 and opened.count("base_ar") > 1  # given back, and come again


def test_without_a_budget_what_a_task_begins_with_is_opened_at_once(mini_bundle: Path, monkeypatch) -> None:
    opened: list[list[str]] = []
    open_sessions = loaded.open_sessions

    def watched(bundle, names, **options):
        opened.append(sorted(names))
        return open_sessions(bundle, names, **options)

    monkeypatch.setattr(loaded, "open_sessions", watched)
    with Star(mini_bundle) as star:
        star.generate("a red cat")
        star.ask(IMAGE, "what?", max_new_tokens=2)
    assert list(filter(None, opened)) == [
        ["base_ar", "image_embedding", "image_head", "stacked_ar", "token_embedding"],
        ["vq_decoder"],
        ["text_head"],
        ["vision_encoder"],
    ]


def test_a_generous_budget_keeps_everything(mini_bundle: Path) -> None:
    with Star(mini_bundle, memory=10**12) as star:
        results(star)
        first = dict(star.loaded.open)
        results(star)
        assert star.loaded.open == first and len(first) == 9


def test_what_was_used_longest_ago_is_given_back(mini_bundle: Path) -> None:
    with Star(mini_bundle) as star:
        sizes = star.loaded.sizes
    names = ("vision_encoder", "vq_decoder", "vq_encoder")
    with Star(mini_bundle, memory=sum(weight_bytes(sizes, name, on_cpu=True) for name in names)) as star:
        sessions = {name: star.session(name) for name in names}
        assert star.session("vision_encoder") is sessions["vision_encoder"]  # used again
        star.session("stacked_ar")
        assert "vq_decoder" not in star.loaded.open and "vision_encoder" in star.loaded.open
        with pytest.raises(Exception, match="closed"):
            sessions["vq_decoder"].bind({})


# Row 54
def test_a_budget_below_the_largest_stage_is_refused_before_loading(mini_bundle: Path) -> None:
    with Star(mini_bundle) as star:
        budget = star.loaded.sizes.weights["base_ar"]
    for call in (
        lambda star: star.generate("a cat"),
        lambda star: star.generate("a cat", reason=True),
        lambda star: star.edit(IMAGE, "a cat"),
        lambda star: star.ask(IMAGE, "a cat"),
    ):
        with Star(mini_bundle, memory=budget) as star, pytest.raises(MissingError, match="budget") as caught:
            call(star)
        assert f"got {budget} bytes" in caught.value.where and " for " in caught.value.where
        assert not star.loaded.open


def test_no_budget_is_no_number(mini_bundle: Path) -> None:
    with pytest.raises(UsageError, match="memory"):
        Star(mini_bundle, memory=0)


def test_too_little_free_memory_is_refused_before_loading_with_what_would_fit(
    mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Star(mini_bundle) as star:
        budget = least(star, "edit")
    monkeypatch.setattr(loaded, "free_memory", lambda backend: budget)
    with Star(mini_bundle) as star, pytest.raises(MissingError, match="too little memory") as caught:
        star.edit(IMAGE, "a cat")
    assert f"{budget} bytes" in caught.value.where and "--memory" in caught.value.fix
    assert not star.loaded.open
    with Star(mini_bundle, memory=budget) as star:
        assert star.edit(IMAGE, "a cat").images.shape == (1, 64, 64, 3)
    monkeypatch.setattr(loaded, "free_memory", lambda backend: 1000)
    with Star(mini_bundle, memory=budget) as star, pytest.raises(MissingError, match="too little memory"):
        star.edit(IMAGE, "a cat")


LIMITED = """
import resource, sys
import onnxruntime
from engines import MissingError, Star
from engines.fit import machine
star = Star(sys.argv[1])
used = machine._fields(machine.PROC / "self/status")["VmSize:"] * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 20_000_000, resource.RLIM_INFINITY))
try:
    star.generate("a cat")
except MissingError as error:
    assert not star.loaded.open
    print(error)
"""


def test_a_process_with_too_little_address_space_is_told_so(mini_bundle: Path) -> None:
    code = [sys.executable, "-c", LIMITED, str(mini_bundle)]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    what, where, fix = done.stdout.splitlines()
    assert "too little memory" in what and "bytes" in where and "--memory" in fix
