"""STAR-Nano's benchmark: generation, editing, questions, reasoning and reconstruction on unseen items.

The items are a function of a seed. A `Painter` is measured, or anything with its methods and its `batch`, the
number of items that it takes at once, which does not change any result. The scorer judges images; answers
must be equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from ..world import edits, prompts, questions, riddles
from ..world.draw import images_from_scenes
from ..world.prompts import Request
from ..world.scorer import read
from ..world.world import SIDE_PIXELS, Scene, random_scene

SEED = 2026
ANSWER_TOKENS = 48  # at most
SMALL = {"generate": 6, "edit": 5, "ask": 10, "reason": 4, "rebuild": 16}  # items per category
FULL = {"generate": 150, "edit": 150, "ask": 200, "reason": 75, "rebuild": 500}
GOALS = {"generate": 0.91, "edit": 0.90, "ask": 0.95, "reason": 0.85}  # overall
GOAL_CATEGORY, GOAL_PSNR = 0.80, 30.0  # of each category of `generate`; in dB
Progress = Callable[[str, int, int], None]  # task, items done, items in total
CATEGORIES = {
    "generate": prompts.CATEGORIES,
    "edit": edits.KINDS,
    "ask": questions.KINDS,
    "reason": riddles.KINDS,
}
# Tasks in order, with the name under which they are scored: riddles are also drawn without reasoning.
RUNS = (
    ("generate", "generate"),
    ("edit", "edit"),
    ("ask", "ask"),
    ("reason", "reason"),
    ("reason", "reason off"),
)


@dataclass(frozen=True)
class Item:
    """One item of the benchmark.

    `judge` maps an image or answer to the demands that it meets or not. `scene` is the image that the item
    starts from.
    """

    category: str
    text: str
    judge: Callable[[Any], dict[str, bool]]
    scene: Scene | None = None


@dataclass(frozen=True)
class Result:
    """What was made of an item of `task`: an image, an answer, or both after reasoning.

    `given` is the image that the item starts from, if any. `demands` says which demands the result meets.
    """

    task: str
    item: Item
    given: np.ndarray | None
    image: np.ndarray | None
    answer: str | None
    demands: dict[str, bool]

    @property
    def right(self) -> bool:
        return all(self.demands.values())


@dataclass
class Score:
    """How many items were right, the mean PSNR of reconstruction in dB, and the results themselves.

    `right` maps task -> category -> (right, asked).
    """

    right: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict)
    psnr: float = math.nan
    results: list[Result] = field(default_factory=list)

    def add(self, result: Result) -> None:
        got, asked = self.right.setdefault(result.task, {}).get(result.item.category, (0, 0))
        self.right[result.task][result.item.category] = got + result.right, asked + 1
        self.results.append(result)

    def overall(self, task: str) -> tuple[int, int]:
        return tuple(map(sum, zip(*self.right[task].values())))


def items(task: str, count: int, *, seed: int = SEED) -> list[Item]:
    """`count` items for each category of a task (generate, edit, ask, reason) with texts that training never
    saw."""
    random = Random(f"benchmark {seed} {task}")
    made = []
    for category in CATEGORIES[task]:
        made += [make_item(random, task, category) for _ in range(count)]
    return made


def make_item(random: Random, task: str, category: str) -> Item:
    """One item of a category, with held-out wording and its judge."""
    if task == "generate":
        return request_item(category, *prompts.random_prompt(random, category, test=True))
    if task == "reason":
        return request_item(category, *riddles.random_riddle(random, category, test=True))
    if task == "edit":
        edit = edits.random_edit(random, category, test=True)
        return Item(category, edit.text, lambda image: edits.check(edit, read(image)), edit.before)
    while True:
        scene = random_scene(random)
        if found := questions.random_question(random, scene, category, test=True):
            return Item(category, found[0], lambda answer: {"answer": answer.strip() == found[1]}, scene)


def request_item(category: str, text: str, request: Request) -> Item:
    return Item(category, text, lambda image: prompts.check(request, read(image)))


def measure(
    painter, counts: dict[str, int], *, seed: int = SEED, progress: Progress = lambda what, done, total: None
) -> Score:
    """Run the benchmark with `counts` items per category of each task, SMALL or FULL.

    Everyone gets the same items and the same random numbers.
    """
    score = Score()
    chosen = {task: items(task, count, seed=seed) for task, count in counts.items() if task != "rebuild"}
    todo = [(task, name) for task, name in RUNS if task in chosen]
    total, done = sum(len(chosen[task]) for task, _ in todo) + counts.get("rebuild", 0), 0
    for task, name in todo:
        for at in range(0, len(chosen[task]), painter.batch):
            part = chosen[task][at : at + painter.batch]
            given = [None] * len(part)
            if part[0].scene:
                given = list(images_from_scenes([item.scene for item in part], seed=seed + at))
            made = made_of(painter, name, [item.text for item in part], given, seed=seed + at)
            for item, before, (image, answer) in zip(part, given, made, strict=True):
                demands = item.judge(answer if image is None else image)
                score.add(Result(name, item, before, image, answer, demands))
            done += len(part)
            progress(name, done, total)
    if counts.get("rebuild"):
        score.psnr = reconstruction(painter, counts["rebuild"], seed=seed)
        progress("rebuild", total, total)
    return score


def made_of(
    painter, name: str, texts: Sequence[str], given: Sequence[np.ndarray | None], *, seed: int
) -> list[tuple[np.ndarray | None, str | None]]:
    """What the painter makes of texts and the images given with them: an image and an answer each; either may
    be None."""
    if name == "ask":
        return [(None, answer) for answer in painter.ask(given, texts)]
    if name == "reason":
        answers, images = painter.reason(texts, seed=seed)
        return list(zip(images, answers, strict=True))
    images = painter.edit(given, texts, seed=seed) if name == "edit" else painter.draw(texts, seed=seed)
    return [(image, None) for image in images]


def reconstruction(painter, count: int, *, seed: int) -> float:
    """Mean PSNR in dB of images that the VQ model has encoded and decoded."""
    random = Random(f"benchmark {seed} rebuild")
    images = list(images_from_scenes([random_scene(random) for _ in range(count)], seed=seed))
    errors = [
        np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(images, painter.rebuild(images), strict=True)
    ]
    assert images[0].shape == (SIDE_PIXELS, SIDE_PIXELS, 3)
    return float(np.mean([10 * math.log10(255**2 / max(error, 1e-9)) for error in errors]))


def interval(right: int, asked: int) -> tuple[float, float]:
    """95 % confidence interval of a share, by Wilson's formula."""
    z, share = 1.959964, right / asked
    middle = (share + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked)) / (1 + z * z / asked)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(ours: Sequence[bool], others: Sequence[bool]) -> tuple[float, float, float]:
    """How much larger our share of right results is, and the 95 % confidence interval of that.

    Both sides had the same items, in the same order, at least one. The interval is Newcombe's (1998,
    "Improved confidence intervals for the difference between binomial proportions based on paired data",
    method 10): Wilson's intervals of both shares, and the correlation of the sides. It is not empty when all
    results agree.
    """
    asked, ours_right, others_right = len(ours), sum(ours), sum(others)
    both = sum(a and b for a, b in zip(ours, others, strict=True))
    margins = ours_right * (asked - ours_right) * others_right * (asked - others_right)
    excess = both * asked - ours_right * others_right  # both right * both wrong - one right * other right
    excess = max(excess - asked / 2, 0) if excess > 0 else excess  # a correction for continuity
    correlation = excess / math.sqrt(margins) if margins else 0.0

    def reach(below: float, above: float) -> float:
        return math.sqrt(max(below * below - 2 * correlation * below * above + above * above, 0))

    share, other_share = ours_right / asked, others_right / asked
    (low, high), (other_low, other_high) = interval(ours_right, asked), interval(others_right, asked)
    difference = share - other_share
    return (
        difference,
        difference - reach(share - low, other_high - other_share),
        difference + reach(other_share - other_low, high - share),
    )


def table(score: Score, reference: Score | None = None) -> str:
    """The score as text with 95 % intervals, and next to the reference's if given."""
    beside = reference is not None
    head = f"{'task':<12}{'category':<12}{'right':>9}{'share':>8}  {'95 % interval':<16}"
    lines = [head + ("  reference" if beside else "") + "  goal"]
    for task, categories in score.right.items():
        rows = {**categories, "overall": score.overall(task)} if len(categories) > 1 else categories
        for category, (right, asked) in rows.items():
            low, high = interval(right, asked)
            line = f"{task:<12}{category:<12}{f'{right}/{asked}':>9}{right / asked:>8.3f}"
            line += f"  {f'{low:.3f} to {high:.3f}':<16}"
            if beside:
                known = reference.right.get(task, {})
                pair = reference.overall(task) if category == "overall" and known else known.get(category)
                line += f"  {pair[0] / pair[1]:9.3f}" if pair else f"  {'-':>9}"
            goal = GOALS.get(task) if category == "overall" else GOAL_CATEGORY if task == "generate" else None
            lines.append(line + (f"  {goal:.2f}" if goal else "  -"))
    if not math.isnan(score.psnr):
        other = f"  {reference.psnr:9.2f}" if beside else ""
        lines.append(
            f"{'rebuild':<12}{'PSNR in dB':<12}{'':>9}{score.psnr:>8.2f}  {'':<16}{other}  {GOAL_PSNR:.2f}"
        )
    return "\n".join(lines)


def json_from_score(score: Score) -> dict:
    """A score without its results, for a file."""
    right = {task: {c: list(pair) for c, pair in found.items()} for task, found in score.right.items()}
    return {"right": right, "psnr": score.psnr}


def score_from_json(value: dict) -> Score:
    right = {task: {c: tuple(pair) for c, pair in found.items()} for task, found in value["right"].items()}
    return Score(right=right, psnr=value["psnr"])
