"""Bundles side by side: a bundle is no distance from itself, a smaller one is some,
and what cannot be compared is refused before anything is scored."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engines.bundle.files import sha256_of
from engines.bundle.manifest import FileSpec
from engines.bundle.reader import Bundle
from engines.bundle.records import json_from_record
from engines.errors import InputError, MissingError, UsageError
from reference.nano.benchmark import identity
from reference.nano.benchmark import score as benchmark
from star_export.cli.parser import main
from star_export.validator import score as scoring
from star_export.validator import side_by_side
from star_export.validator.side_by_side import Column, compare_scores

COUNTS = {"generate": 1, "ask": 1, "rebuild": 2}


@pytest.fixture(scope="module")
def bundles(nano: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """An untrained STAR-Nano, and the same with decoders whose weights keep three bits of each fraction."""
    rounded = shutil.copytree(nano[1], tmp_path_factory.mktemp("rounded") / nano[1].name)
    manifest = Bundle.open(rounded).manifest
    for name in ("base_ar/model.onnx.data", "stacked_ar/model.onnx.data"):
        bits = np.fromfile(rounded / name, "<u4") & np.uint32(0xFFF00000)
        bits.tofile(rounded / name)
        manifest.files[name] = FileSpec(bits.nbytes, sha256_of(rounded / name, where=name))
    (rounded / "manifest.json").write_text(json_from_record(manifest))
    return [nano[1], rounded]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scoring.SETS, "small", COUNTS)
    monkeypatch.setattr(identity, "PER_CATEGORY", 1)


@pytest.fixture
def never_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*arguments, **options):
        raise AssertionError("a bundle was scored before all were checked")

    monkeypatch.setattr(benchmark, "measure", measure)


def changed(bundle: Path, **facts) -> Bundle:
    """The bundle with other facts of its model."""
    manifest = Bundle.open(bundle).manifest
    return Bundle(bundle, dataclasses.replace(manifest, model=dataclasses.replace(manifest.model, **facts)))


class Seen:
    """What happened while bundles were compared: the ids that each drew and was fed, and the progress."""

    def __init__(self) -> None:
        self.drawn: list[np.ndarray] = []
        self.fed: list[np.ndarray] = []
        self.steps: list[tuple[str, int, int]] = []


@pytest.fixture(scope="module")
def compared(bundles: list[Path]) -> tuple[list[Column], Seen]:
    """A bundle, the same once more, and the rounded one, side by side."""
    seen, draw, forced = Seen(), identity.drawn_ids, side_by_side.forced_logits

    def drawn_ids(painter, *, full):
        seen.drawn.append(draw(painter, full=full))
        return seen.drawn[-1]

    def forced_logits(star, prompt, image_ids, *, guidance):
        assert len(prompt.input_ids) == 2 and guidance == star.model.sampling.generate.guidance
        seen.fed.append(image_ids[0])
        return forced(star, prompt, image_ids, guidance=guidance)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(scoring.SETS, "full", COUNTS)
        patch.setattr(identity, "FULL_PER_CATEGORY", 1)
        patch.setattr(identity, "drawn_ids", drawn_ids)
        patch.setattr(side_by_side, "forced_logits", forced_logits)
        columns = compare_scores(
            [bundles[0], *bundles], full=True, progress=lambda *step: seen.steps.append(step)
        )
    return columns, seen


@pytest.fixture
def columns(compared: tuple[list[Column], Seen]) -> list[Column]:
    return compared[0]


def test_the_first_one_is_what_the_others_are_compared_with(
    columns: list[Column], bundles: list[Path]
) -> None:
    first, *others = columns
    assert first.against is None and all(column.against for column in others)
    assert [column.bundle for column in columns] == [str(bundles[0]), *map(str, bundles)]
    assert first.bytes == sum(file.size for file in Bundle.open(bundles[0]).manifest.files.values())
    assert all(column.precision == "fp32" and column.score.psnr > 0 for column in columns)


def test_a_bundle_is_no_distance_from_itself(columns: list[Column]) -> None:
    same = columns[1].against
    assert same is not None and same.identical == 6 and same.median_first_difference is None
    assert same.kl.largest < 1e-9 and same.total_variation.largest < 1e-6
    assert set(same.points) == {"generate", "ask"} and set(same.points["ask"]) > {"overall", "color"}
    for difference, low, high in (p for points in same.points.values() for p in points.values()):
        assert difference == 0 and low < 0 < high <= 100


def test_rounded_weights_are_some_distance_away(columns: list[Column]) -> None:
    far = columns[2].against
    assert far is not None and far.identical < 6 and 0 <= far.median_first_difference < 64
    assert 1e-5 < far.kl.mean < far.kl.percentile_95 <= far.kl.largest < 10
    assert 1e-4 < far.total_variation.mean < far.total_variation.largest <= 1


def test_all_are_fed_what_the_first_one_drew(compared: tuple[list[Column], Seen]) -> None:
    """And not what each one drew itself."""
    _, seen = compared
    checks, used = seen.fed[:3], np.array(seen.fed[3:])
    assert not np.any(checks) and (used == np.concatenate([seen.drawn[0]] * 3)).all()
    assert (seen.drawn[0] == seen.drawn[1]).all() and (seen.drawn[0] != seen.drawn[2]).any()


def test_progress_counts_all_bundles(compared: tuple[list[Column], Seen]) -> None:
    steps = compared[1].steps
    assert steps[:3] == [("check, in bundles", i, 3) for i in (1, 2, 3)]
    counted = [(done, total) for what, done, total in steps if ", in " not in what]
    assert counted == sorted(counted) and counted[-1] == (3 * 13, 3 * 13)
    assert [what for what, *_ in steps if what.startswith("bundle 3 of 3: generate")]


def test_differences_pair_the_results_of_an_item() -> None:
    """Two sides with 2 of 4, on the same items and on others: only the first pair has a narrow interval."""

    def score(*right: bool) -> benchmark.Score:
        made = benchmark.Score()
        for i, is_right in enumerate(right * 10):
            item = benchmark.Item("ab"[i % 2], "", lambda image: {})
            made.add(benchmark.Result("edit", item, None, None, None, {"is right": is_right}))
        return made

    one = score(True, True, False, False)
    same, other = (
        side_by_side._points(score(*right), one)["edit"]
        for right in ((True, True, False, False), (False, False, True, True))
    )
    assert same["overall"][0] == other["overall"][0] == same["a"][0] == 0
    assert same["overall"][2] < 0.3 * other["overall"][2] and set(same) == {"overall", "a", "b"}
    better = side_by_side._points(score(True, True, True, False), one)["edit"]
    assert better["overall"][0] == 25 and (better["a"][0], better["b"][0]) == (50, 0)


def test_fewer_than_two_bundles_are_refused(bundles: list[Path], never_scored: None) -> None:
    for given in ([], bundles[:1]):
        with pytest.raises(UsageError, match=f"expected at least two bundles, got {len(given)}"):
            compare_scores(given)


def test_another_model_is_refused_before_anything_is_scored(bundles: list[Path], never_scored: None) -> None:
    with pytest.raises(InputError, match="expected STAR-Nano, got STAR-3B"):
        compare_scores([bundles[0], changed(bundles[1], name="STAR-3B")])
    with pytest.raises(InputError, match="model: image_tokens: expected 64, as in .*, got 16"):
        compare_scores([bundles[0], changed(bundles[1], image_tokens=16)])
    sampling = Bundle.open(bundles[0]).manifest.model.sampling
    other = dataclasses.replace(sampling, edit=dataclasses.replace(sampling.edit, top_k=7))
    with pytest.raises(InputError, match="model: sampling: edit: top_k: expected 3, as in .*, got 7"):
        compare_scores([bundles[0], changed(bundles[1], sampling=other)])
    side_by_side.check_comparable([Bundle.open(bundles[0]), changed(bundles[1], rope_bf16=False)])


def test_another_tokenizer_is_refused_before_anything_is_scored(
    bundles: list[Path], never_scored: None
) -> None:
    manifest = Bundle.open(bundles[1]).manifest
    for name in ("tokenizer.json", "chat_template.jinja"):
        files = manifest.files | {name: dataclasses.replace(manifest.files[name], sha256="ab" * 32)}
        other = Bundle(bundles[1], dataclasses.replace(manifest, files=files))
        with pytest.raises(InputError, match=f"{name}: expected SHA-256 .*, got abababababab"):
            compare_scores([bundles[0], other])


def test_what_the_last_bundle_lacks_is_told_before_the_first_is_scored(
    bundles: list[Path], tmp_path: Path, never_scored: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = shutil.copytree(bundles[1], tmp_path / "damaged")
    weights = damaged / "vq_decoder" / "model.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(InputError, match="vq_decoder/model.onnx.data"):
        compare_scores([bundles[0], damaged])
    with pytest.raises(UsageError, match="No such backend"):
        compare_scores(bundles, backend="tpu")
    with pytest.raises((InputError, MissingError)):  # no plans, or no TensorRT
        compare_scores(bundles, backend="tensorrt:rtx-4090")
    with pytest.raises(UsageError, match="window"):
        compare_scores(bundles, window=65)
    monkeypatch.setattr(
        side_by_side, "forced_logits", lambda *arguments, **options: np.full((1, 64, 9), np.nan)
    )
    with pytest.raises(InputError, match="expected finite numbers, got 576 NaN or Inf of 576"):
        compare_scores(bundles)


def test_the_command_prints_a_table_or_json(
    columns: list[Column], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    asked = []

    def compare(bundles, *, backend, window, full, threads, progress):
        asked.append((bundles, backend, window, full, threads))
        return columns

    monkeypatch.setattr(side_by_side, "compare_scores", compare)
    line = ["score", "a", "--compare", "b", "c", "--full", "--window", "4", "--threads", "1", "--no-progress"]
    assert main(line) == 0 and asked == [(["a", "b", "c"], "onnxruntime", 4, True, 1)]
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [column.bundle for column in columns]  # two folders have the same name
    cells = {row.partition("  ")[0] if row[0] != " " else row.split("  ")[1]: row for row in rows}
    assert cells["precision"].split()[1:] == ["fp32"] * 3
    assert cells["identical images"].split("  ")[-1].strip() == f"{columns[2].against.identical} of 6"
    assert f"{columns[2].against.kl.mean:.3g}" in cells["KL in nats: mean"]
    assert cells["ask: right"].count(" of 5") == 3 and "difference in points" in cells
    assert main([*line, "--json"]) == 0
    first, _, small = json.loads(capsys.readouterr().out)["bundles"]
    assert first["against_first"] is None and first["bytes"] == columns[0].bytes
    assert set(small) == {"bundle", "precision", "bytes", "score", "intervals", "against_first"}
    assert small["against_first"]["identical"] == columns[2].against.identical
    assert small["against_first"]["kl"] == dataclasses.asdict(columns[2].against.kl)
    assert len(small["intervals"]["generate"]["overall"]) == 2
    assert len(small["against_first"]["points"]["ask"]["overall"]) == 3


def test_the_command_refuses_what_it_cannot_do(
    bundles: list[Path], tmp_path: Path, never_scored: None, capsys: pytest.CaptureFixture
) -> None:
    assert main(["score", str(bundles[0]), "--compare"]) == 2
    assert "--compare: expected at least one argument" in capsys.readouterr().err
    assert main(["score", *map(str, bundles), "--compare", str(bundles[0])]) == 2
    line = ["score", str(bundles[0]), "--compare", str(bundles[1]), "--pictures", str(tmp_path)]
    assert main(line) == 2 and "Pictures are written for one bundle" in capsys.readouterr().err
    assert main(["score", str(bundles[0]), "--compare", str(tmp_path / "none")]) == 3
    assert "This is not a bundle" in capsys.readouterr().err
