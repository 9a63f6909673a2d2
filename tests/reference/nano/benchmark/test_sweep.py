"""The sweep ships the setting that measured best,
on other items than the score's, and records honest failures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from reference.nano.benchmark import gallery, plot, sweep
from reference.nano.benchmark import score as benchmark
from reference.nano.benchmark.painter import SAMPLED, Sampling, stored_sampling
from reference.nano.recipe import REWARD_TOP_P

BEST = {
    "generate": Sampling(guidance=2.0, top_k=100, top_p=0.95),
    "edit": Sampling(guidance=1.1, top_k=1, top_p=REWARD_TOP_P),
}


class Painter:
    """Stands for a model that is best at BEST."""

    sampling = dict.fromkeys(SAMPLED, Sampling())

    def draw_ids(self, prompts: list[str], *, seed: int) -> list[np.ndarray]:
        return [np.full(4, seed + i) for i in range(len(prompts))]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Which tasks were measured, with which seed."""
    calls: list[tuple[str, int]] = []

    def measure(painter: Painter, counts: dict[str, int], *, seed: int = benchmark.SEED) -> benchmark.Score:
        calls.append((" ".join(counts), seed))
        score = benchmark.Score(psnr=31.0)
        for number in range(40):
            for task in counts:
                s, best = (of["edit" if task == "edit" else "generate"] for of in (painter.sampling, BEST))
                misses = (
                    10 * abs(s.guidance - best.guidance)
                    + 100 * abs(s.top_p - best.top_p)
                    + (s.top_k != best.top_k)
                )
                item = benchmark.Item("any", f"a text of {number}", lambda image: {})
                image = None if task == "ask" else np.zeros((64, 64, 3), np.uint8)
                score.add(
                    benchmark.Result(
                        task,
                        item,
                        np.ones((64, 64, 3), np.uint8) if task in ("ask", "edit") else None,
                        image,
                        "said" if task in ("ask", "reason") else None,
                        {"count": number >= misses},
                    )
                )
        return score

    monkeypatch.setattr(benchmark, "measure", measure)
    return calls


def test_the_best_setting_of_each_task_is_chosen_and_shipped(
    tmp_path: Path, asked: list[tuple[str, int]]
) -> None:
    assert stored_sampling(tmp_path) == dict.fromkeys(SAMPLED, Sampling(1.1, 1000, 0.8))
    assert sweep.choose(Painter(), tmp_path, count=3) == BEST == stored_sampling(tmp_path)
    measured = json.loads((tmp_path / "sweep.json").read_text())
    # with a top-k of 1 there is no top-p to choose, and drawing always varies
    points = 2 * len(sweep.GUIDANCES) + sum(map(len, sweep.TOP_KS.values())) + len(sweep.TOP_PS)
    assert points == len(asked) == len(measured)
    assert {
        task for task in SAMPLED for point in measured if point["task"] == task and point["top_k"] == 1
    } == {"edit"}
    assert {seed for _, seed in asked} == {sweep.SWEEP_SEED} and sweep.SWEEP_SEED != benchmark.SEED
    assert (tmp_path / "sweep.png").stat().st_size > 1000


def test_a_stored_sampling_may_say_little_but_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "sampling.json"
    path.write_text('{"edit": {"top_k": 1}}')
    assert stored_sampling(tmp_path) == {"generate": Sampling(), "edit": Sampling(top_k=1)}
    path.write_text('{"guidance": 1.5, "top_k": 5, "top_p": 0.95}')  # as it was once, the same for all tasks
    with pytest.raises(
        ValueError,
        match=r"sampling.json: expected only generate and edit, got guidance, top_k, top_p; remove",
    ):
        stored_sampling(tmp_path)


def test_the_score_is_recorded_small_and_full(tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    made = sweep.record(Painter(), tmp_path)
    stored = json.loads((tmp_path / "score.json").read_text())
    assert (
        benchmark.score_from_json(stored["full"]).right == made["full"].right
        and stored["small"]["psnr"] == 31.0
    )
    assert {seed for _, seed in asked} == {benchmark.SEED}
    assert stored["image_ids"] == [[benchmark.SEED + i] * 4 for i in range(24)]
    grids = {"generated.png", "edited.png", "answered.png", "reasoned.png"}
    assert grids | {"failures.png"} <= {path.name for path in tmp_path.iterdir()}
    best = Painter()
    best.sampling = BEST
    sweep.record(best, tmp_path)
    assert not (tmp_path / "failures.png").exists()


def test_curves_of_a_size_share_a_chart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large one among many small ones would flatten them; and there are seven inks."""
    charts = []
    monkeypatch.setattr(
        plot, "chart", lambda title, series, **_: charts.append((title, list(series))) or np.zeros((1, 1))
    )
    monkeypatch.setattr(plot, "write_charts", lambda path, made: None)
    (tmp_path / "edit.jsonl").write_text(
        json.dumps({"step": 1, "loss": 3.0, "large": 9.0} | {f"small {i}": 0.1 * i for i in range(7)}) + "\n"
    )
    plot.write_curves(tmp_path, ["edit", "reward"])
    assert charts == [
        ("edit: loss", ["loss"]),
        ("edit", [f"small {i}" for i in range(7)]),
        ("edit", ["large"]),
    ]


def test_a_chart_shows_its_lines_and_a_grid_its_images(tmp_path: Path) -> None:
    from PIL import Image

    image = np.asarray(
        plot.chart("t", {"flat": [(x, 1.0) for x in range(30)], "rising": [(0, 1.0), (30, 2.0)]})
    )
    assert all((image == ink).all(-1).sum() > 100 for ink in plot.INKS[:2])
    plot.write_grid(
        tmp_path / "g.png", [np.full((64, 64, 3), 200 + i, np.uint8) for i in range(8)], ["x"] * 8, across=6
    )
    page = np.asarray(Image.open(tmp_path / "g.png"))
    assert {200 + i for i in range(8)} <= set(np.unique(page).tolist())


def test_a_logarithmic_chart_has_ten_in_the_middle_of_one_and_a_hundred() -> None:
    peak = [(1, 0.0), (10, 1.0), (100, 0.0)]
    tips = []
    for logarithmic in (True, False):
        image = np.asarray(plot.chart("t", {"": peak}, logarithmic=logarithmic))
        rows, columns = np.nonzero((image == plot.INKS[0]).all(-1))
        tips.append((columns[rows == rows.min()].mean() - columns.min()) / np.ptp(columns))
    assert abs(tips[0] - 0.5) < 0.02 and tips[1] < 0.15


def test_a_caption_tells_the_verdict_the_text_and_the_answer() -> None:
    item = benchmark.Item("any", "as many stars as a hand has fingers", lambda image: {})
    blank = np.zeros((64, 64, 3), np.uint8)
    result = benchmark.Result(
        "reason", item, None, blank, "five stars", {"count": False, "things": True, "relation": False}
    )
    assert (
        gallery.caption(result) == "WRONG: count, relation|as many stars as a hand has fingers|-> five stars"
    )
    edited = benchmark.Result("edit", item, blank, blank + 1, None, {"done": True})
    assert gallery.caption(edited) == f"right|{item.text}" and gallery.panel(edited).shape == (64, 132, 3)
    assert plot.wrapped("a b c|d", 3) == ["a b", "c", "d"]
    assert gallery.spread([edited] * 3, 36) == [edited] * 3 and len(gallery.spread([edited] * 100, 36)) == 36
