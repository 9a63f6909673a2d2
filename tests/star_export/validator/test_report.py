"""The report is one well-formed page without external resources that says what was and was not shown."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engines.runtime.gumbel import gumbel_noise
from engines.runtime.sampler import sample
from star_export.golden.compare import Comparison
from star_export.validator.certificate import Certificate, Row, Rung
from star_export.validator.evidence import (
    Evidence,
    RunIds,
    ShownAnswer,
    ShownImage,
    draws_from_logits,
)
from star_export.validator.plots import Scale, bars, histogram, lines
from star_export.validator.report import html_from_certificate

VOID = {"meta", "img", "br"}
NASTY = 'a "red" <b>cat</b> & more'


class Balance(HTMLParser):
    """Checks that every element is closed, in order; collects attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(page)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


def check_page(page: str) -> None:
    """One well-formed file that loads nothing, whose plots are valid XML with a title and a description."""
    found = Balance(page)
    for tag, name, value in found.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert tag == "img" and value.startswith("data:image/png;base64,"), (tag, name, value[:40])
    assert "url(" not in page and "@import" not in page and "<script" not in page and "<link" not in page
    images = [tag for tag, *_ in found.attributes if tag == "img"]
    assert sum((tag, name) == ("img", "alt") and bool(v) for tag, name, v in found.attributes) * 4 == len(
        images
    )
    for svg in re.findall(r"<svg.*?</svg>", page, re.S):
        check_svg(svg)
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page


def check_svg(svg: str) -> None:
    root = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    assert root.get("role") == "img" and root.find(f"{space}title").text and root.find(f"{space}desc").text
    width, height = map(float, root.get("viewBox").split()[2:])
    for element in root.iter():
        for key in ("x", "cx", "x1", "x2"):
            assert -1 <= float(element.get(key, 0)) <= width + 1
        for key in ("y", "cy"):
            assert -1 <= float(element.get(key, 0)) <= height + 1
        assert "nan" not in " ".join(map(str, element.attrib.values())).lower()


@pytest.fixture
def certificate() -> Certificate:
    rows = (
        Row("base_ar", "case prefill", Comparison("hidden_states", 1e-6, 2e-4, max_abs=1e-5, cosine=1.0), 3),
        Row("base_ar/1", "case prefill", Comparison("present.3.key", 5e-5, 2e-4), 8),
        Row("image_head", "case greedy", Comparison("image_ids", 0.0, 0.0), 1),
    )
    return Certificate(
        schema=3,
        passed=True,
        bundle="STAR-Nano",
        manifest_sha256="ab" * 32,
        precision="bf16",
        backend="onnxruntime-exact",
        compute="fp32",
        device="cpu",
        driver="",
        versions={"python": "3.11"},
        plans={},
        made_at="2026-01-01T00:00:00+00:00",
        rungs=(Rung("golden tensors", rows, 1.0, NASTY),),
        not_proven=("the quality of images", NASTY),
    )


def evidence() -> Evidence:
    rng = np.random.default_rng(0)
    logits, noise = (
        rng.standard_normal((16, 50), np.float32),
        gumbel_noise(1, image=0, steps=range(16), size=50),
    )
    near = logits + np.float32(1e-3) * rng.standard_normal(logits.shape, np.float32)
    image = rng.integers(0, 256, (8, 8, 3), np.uint8)
    found = Evidence(draws=draws_from_logits(near, logits, top_k=10, top_p=0.9, noise=noise))
    found.add(
        "base_ar", "steps", [Comparison("hidden_states", 1e-5, 1e-4, place=f"step {i}: x") for i in range(9)]
    )
    found.add("base_ar/1", "x", [Comparison(f"present.{i}.key", 1e-6 * i, 1e-4) for i in range(4)])
    found.ids.append(RunIds("answer", np.array([1, 2, 3]), np.array([1, 2, 4]), ("red", NASTY)))
    found.fixed_set.append(RunIds(NASTY, np.arange(5), np.arange(5)))
    found.images.append(ShownImage(NASTY, "seed 1", image, image ^ 1, seed=1))
    found.images.append(ShownImage("an edit", "judged right", image, given=image))
    found.answers.append(ShownAnswer("what?", NASTY, image, right=True))
    return found


def test_the_page_is_one_well_formed_file_that_loads_nothing(certificate: Certificate) -> None:
    page = html_from_certificate(certificate, evidence(), bundle="my bundle")
    check_page(page)
    assert "<b>cat" not in page and page.count("<svg") == 7 and "Absent" not in page
    assert "12 tensors of 3 components and tables" in page and "which used 25% of it" in page
    assert (
        "star-export validate 'my bundle' --backend onnxruntime-exact --report parity.html"
        in html.unescape(page)
    )
    assert page.index("Not proven") < page.index("What was drawn") < page.index("All comparisons")


def test_what_a_bundle_did_not_record_is_said(certificate: Certificate) -> None:
    page = html_from_certificate(certificate, Evidence(), bundle="b")
    check_page(page)
    assert "Absent: a drawn image of a prompt, an edited image, an answer about an image." in page
    assert "Absent: error by layer, error by decode step, divergence of the draws" in page
    assert page.count("<svg") == 1


def test_a_rung_that_compared_nothing_is_not_said_to_have_compared(certificate: Certificate) -> None:
    short = Rung("whole runs", (), 0.2, "left out: There is too little memory")
    counted = Rung("files and graphs", (), 0.1, "51 files match their SHA-256")
    page = html_from_certificate(
        replace(certificate, rungs=(counted, *certificate.rungs, short)), evidence(), bundle="b"
    )
    assert "in the rungs golden tensors, were compared" in page
    assert "<summary>left out: whole runs (0.2 s, 0 rows)" in page
    assert '<span class="pass">passed</span>: files and graphs (0.1 s, 0 rows)' in page


def test_a_failure_is_the_first_thing_said(certificate: Certificate) -> None:
    wrong = Row("vq_decoder", "case 1", Comparison("image", math.nan, 1e-3, "expected finite numbers"), 1)
    rung = replace(certificate.rungs[0], rows=(*certificate.rungs[0].rows, wrong))
    page = html_from_certificate(replace(certificate, passed=False, rungs=(rung,)), Evidence(), bundle="b")
    check_page(page)
    lead = page[page.index('class="lead failed"') :]
    assert (
        "FAILED" in page[: page.index("<h2>")] and "vq_decoder: case 1: image: expected finite" in lead[:300]
    )
    assert 'class="bad"' in page, "its bar has the colour of a failure"


def test_the_difference_of_two_images_is_amplified_and_said(certificate: Certificate) -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    one = black.copy()
    one[1, 2] = 5
    for other, words in (
        (one, "1 of 16 pixels differ, by at most 5 of 255"),
        (black, "All pixels are equal"),
    ):
        found = Evidence(images=[ShownImage("a", "b", other, black)])
        page = html_from_certificate(certificate, found, bundle="b")
        assert words in page
        *_, last = re.findall(r'base64,([^"]+)" width="4" height="4" alt="difference', page)
        shown = np.array(Image.open(io.BytesIO(base64.b64decode(last))))
        assert (shown == (other.astype(int) * 51 if other.any() else black)).all()


def test_margins_say_how_far_a_draw_was_from_falling_otherwise() -> None:
    rng = np.random.default_rng(3)
    logits = rng.standard_normal((6, 40), np.float32)
    noise = gumbel_noise(5, image=0, steps=range(6), size=40)
    found = draws_from_logits(logits, logits, top_k=8, top_p=1.0, noise=noise)
    assert (found.kl == 0).all() and (found.overlap == 1).all()
    ids = sample(logits, top_k=8, top_p=1.0, noise=noise)
    for step, (drawn, margin) in enumerate(zip(ids, found.margins, strict=True)):
        for change, same in ((0.99, True), (1.01, False)):
            moved = logits.copy()
            moved[step, drawn] -= change * margin
            again = sample(
                moved, top_k=0, top_p=1.0, noise=np.where(logits >= np.sort(logits)[:, [-8]], noise, -99)
            )
            assert (again[step] == drawn) is np.bool_(same)


def test_plots_hold_for_degenerate_numbers() -> None:
    words = {"x_label": "x", "y_label": "y"}
    for svg in (
        lines({"a": [(0, 0.0)]}, "t", "d", **words),
        lines({"a": [(0, math.inf), (1, math.nan)]}, "t", "d", **words, log=True, limit=(1.0, "tolerance")),
        lines({"a": [(0, 1e-30), (1, 5e9)]}, "t", "d", **words, log=True),
        histogram([], "t", "d", **words),
        histogram([0.0, 0.0], "t", "d", **words),
        bars([("a", math.inf, "fault"), ("b", 0.0, "0")], "t", "d", scale=Scale(1e-6, 1, log=True), limit=1),
    ):
        check_svg(svg)
    assert Scale(0, 10).ticks() == pytest.approx([0, 2, 4, 6, 8, 10])
    assert len(Scale(1e-9, 1, log=True).ticks()) <= 7


def test_the_page_of_a_real_validation_has_its_plots(mini_bundle: Path, tmp_path: Path) -> None:
    import shutil

    from star_export.validator.ladder import validate

    root = shutil.copytree(
        mini_bundle, tmp_path / "b", ignore=shutil.ignore_patterns("plans", "certificates")
    )
    certificate = validate(root, report=tmp_path / "parity.html")
    page = (tmp_path / "parity.html").read_text()
    check_page(page)
    assert page.count("<svg") == 7 and "VQ decoder on random ids" in page
    assert page.count("The reference drew it at the export") == 2 and "The answers are equal." in page
    (forced,) = [r for rung in certificate.rungs for r in rung.rows if r.check == "sample, teacher-forced"]
    assert 0 < forced.worst.value < 3e-5, "what FORCED_TOLERANCE says"
