"""The miniature checkpoint, evaluated from TensorRT's networks, computes what the reference computes.

The rung says so, and can fail.
"""

import json
import shutil

import numpy as np
import pytest

from engines.bundle.reader import Bundle
from engines.errors import InputError, MissingError, ParityError, UsageError
from engines.runtime.star import Star
from engines.sessions import open_session
from engines.sessions.interpreter import parsed_component
from engines.tensorrt import build
from star_export.golden.cases import Case, cases_from_file, component_cases
from star_export.golden.run_case import run_case, where_ids_agree
from star_export.golden.tolerances import compute_type, tolerances_of
from star_export.validator import interpreted, run_golden
from star_export.validator import ladder as validate
from star_export.validator.subject import RUNS

pytest.importorskip("tensorrt_rtx")
TARGET, CAPACITY = "rtx-4090", 128
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4", "fp8", "nvfp4")


@pytest.fixture(autouse=True)
def small_caches(monkeypatch):
    """Without plans, networks are parsed for caches of this size instead of 2048."""
    monkeypatch.setattr("engines.tensorrt.profiles.CAPACITY_TOKENS", CAPACITY)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["interpreter-fp32", "interpreter"])
def test_every_component_is_interpreted_within_its_tolerances(bundle_of, precision, kind):
    """Float32 stays within the table's tolerances, at rounding level, or with nvfp4 within a part of what the
    rounding of activations changes; the network's own types within those of 16 bits."""
    bundle = Bundle.open(bundle_of(precision))
    compute = compute_type(precision, twin=kind == "interpreter-fp32")
    compared = 0
    for name, spec in bundle.manifest.components.items():
        session = open_session(bundle, name, backend=f"{kind}:{TARGET}")
        for case, recorded in component_cases(bundle.file(spec.golden), spec).items():
            results = run_case(
                session,
                recorded,
                tolerances=tolerances_of(name, compute, recorded.noise_in(compute)),
                own_draws=compute != "fp32",
                capacity_tokens=session.capacity_tokens,
            )
            assert all(r.passed for r in results), (
                f"{name}: {case}: {[r for r in results if not r.passed][0]}"
            )
            compared += len(results)
    assert compared > 100


def test_the_graphs_of_the_targets_dialect_are_checked(bundle_of):
    subject = validate.Subject(Bundle.open(bundle_of("bf16")), "tensorrt:orin-agx-jp62", "bf16")
    with pytest.raises(
        InputError, match="classic.onnx"
    ) as error:  # for the miniature's head dim, and nothing else
        validate.files_and_graphs(subject, lambda *step: None)
    assert "head-dim" in error.value.where and "opset" not in error.value.where


@pytest.mark.parametrize("precision", PRECISIONS)
def test_ids_of_a_generation_an_answer_and_an_edit_are_onnx_runtimes(bundle_of, precision):
    bundle = Bundle.open(bundle_of(precision))
    case = cases_from_file(bundle.file(RUNS))["generate"]
    ids = {}
    for backend in ("onnxruntime-exact", f"interpreter-fp32:{TARGET}"):
        with Star(bundle, backend=backend) as star:
            ids[backend] = [
                run_golden.RUN["generate"](star, case)["image_ids"],
                interpreted.asked_ids(star)[None],
                interpreted.edited_ids(star),
                interpreted.forced_ids(star, case),
            ]
    for wanted, got in zip(*ids.values()):
        np.testing.assert_array_equal(got, wanted)
        assert wanted.size > 1 or precision == "fp32"
    np.testing.assert_array_equal(ids["onnxruntime-exact"][0], case.outputs["image_ids"])


@pytest.fixture(scope="module")
def built(bundle_of, tmp_path_factory):
    """A bf16 bundle with plans for a GPU that is not here;
    golden tensors were checked just before each was compiled."""
    path = tmp_path_factory.mktemp("plans") / "bundle"
    shutil.copytree(bundle_of("bf16"), path)
    bundle = Bundle.open(path)
    results = build.build_plans(
        bundle, [TARGET], capacity_tokens=CAPACITY, rows=2, look=interpreted.look_at_golden(bundle)
    )
    assert all(len(r.spec.network) == 64 and not r.skipped for r in results)
    return path


def here_is_no_gpu(target):
    raise MissingError("There is no GPU", where="here", fix="none")


def test_without_the_device_the_networks_are_interpreted_and_the_certificate_says_what_that_proves(
    built, monkeypatch
):
    monkeypatch.setattr(validate, "check_runnable", here_is_no_gpu)
    steps = []
    certificate = validate.validate(built, target=TARGET, progress=lambda *step: steps.append(step[0]))
    assert certificate.passed and (certificate.backend, certificate.device) == (
        f"interpreter:{TARGET}",
        "cpu",
    )
    assert [rung.name for rung in certificate.rungs] == [
        "files and graphs",
        "prepared inputs",
        "interpreted",
    ]
    rung = certificate.rungs[2]
    assert rung.note.startswith("proves the meaning of the network, not the kernels")
    assert any("the kernels, and everything else on the device" in gap for gap in certificate.not_proven)
    checks = {(row.component, row.check.partition(":")[2].strip().partition(":")[0]) for row in rung.rows}
    assert {
        ("runtime", run) for run in ("generate", "sample", "answer", "teacher-forced", "ask", "edit")
    } <= checks
    assert {(name, "steps against prefill, B=2") for name in ("base_ar", "stacked_ar")} <= checks
    assert {
        ("image_head", "case greedy, ties reversed"),
        ("vq_encoder", "case 3, ties reversed"),
        ("vq_decoder", "case 3"),
    } <= checks
    assert {row.check.partition(":")[0] for row in rung.rows} == {
        "fp32",
        "bf16",
    } and "base_ar step by step" in steps
    stored = json.loads((built / f"certificates/interpreter-{TARGET}-cpu.json").read_text())
    assert stored["passed"] and len(stored["plans"]) == 7


@pytest.mark.parametrize("fault", ["mask dropped", "later tokens seen"])
def test_a_network_that_means_something_else_fails_the_rung(built, monkeypatch, fault):
    from engines.interpreter import evaluate

    right = evaluate.READERS["ATTENTION_INPUT"]

    def wrong(layer):
        compute = right(layer)
        if fault == "mask dropped":
            return lambda q, k, v, mask=None, *rest: compute(q, k, v, None, *rest)
        return lambda q, k, v, mask=None, *rest: compute(
            q, k, v, None if mask is None else mask | np.roll(mask, 1, -1), *rest
        )

    monkeypatch.setitem(evaluate.READERS, "ATTENTION_INPUT", wrong)
    monkeypatch.setattr(validate, "check_runnable", here_is_no_gpu)
    for check in ("whole_runs", "teacher_forced", "images", "_steps"):  # the golden tensors see it
        monkeypatch.setattr(interpreted, check, lambda subject, progress: ([], ""))
    with pytest.raises(ParityError, match="differ from the reference"):
        validate.validate(built, target=TARGET)
    assert not json.loads((built / f"certificates/interpreter-{TARGET}-cpu.json").read_text())["passed"]
    bundle = Bundle.open(built)
    plan = built / f"plans/{TARGET}/stacked_ar.plan"
    before = plan.read_bytes()
    with pytest.raises(ParityError, match="stacked_ar, interpreted"):
        build.build_plans(
            bundle,
            [TARGET],
            components=["stacked_ar"],
            capacity_tokens=CAPACITY // 2,
            look=interpreted.look_at_golden(bundle),
        )
    assert plan.read_bytes() == before, "a plan of a wrong network was written"


def test_a_plan_is_needed_and_a_target_that_cannot_be_read_is_left_out(bundle_of, monkeypatch):
    """Left out beside the device, refused alone: a certificate must not pass on files alone."""
    monkeypatch.setattr("engines.tensorrt.profiles.CAPACITY_TOKENS", 20)
    monkeypatch.setattr(validate, "check_runnable", here_is_no_gpu)
    bundle = Bundle.open(bundle_of("bf16"))
    with pytest.raises(InputError, match=f"no plans for {TARGET}"):
        interpreted.interpreted(validate.Subject(bundle, f"interpreter:{TARGET}", "bf16"), lambda *step: None)
    rows, note = interpreted.interpreted(
        validate.Subject(bundle, "tensorrt:h200", "bf16"), lambda *step: None
    )
    assert rows == [] and "left out: the interpreter does not support networks of tensorrt" in note
    with pytest.raises(UsageError, match="expected a target of tensorrt_rtx, got one of tensorrt"):
        interpreted.interpreted(validate.Subject(bundle, "interpreter:h200", "bf16"), lambda *step: None)
    with pytest.raises(MissingError, match="There is no GPU"):
        validate._backend_of("h200")
    with pytest.raises(InputError, match="No golden case fits this network"):
        interpreted.look_at_golden(bundle)("base_ar", parsed_component(bundle, "base_ar", target=TARGET)[0])


def test_with_the_device_both_run(monkeypatch):
    monkeypatch.setattr(validate, "check_runnable", lambda target: None)
    assert validate._backend_of(TARGET) == f"tensorrt:{TARGET}"
    assert list(validate.rungs_of(f"tensorrt:{TARGET}", scored=False, paints=True)) == [
        "files and graphs",
        "prepared inputs",
        "interpreted",
        "golden tensors",
        "decoder steps",
        "whole runs",
        "paintings",
        "other ways",
    ]
    assert list(validate.rungs_of("onnxruntime", scored=True, paints=False)) == [
        "files and graphs",
        "prepared inputs",
        "golden tensors",
        "decoder steps",
        "whole runs",
        "other ways",
        "score",
    ]
    monkeypatch.setattr(validate, "check_runnable", here_is_no_gpu)
    monkeypatch.setitem(__import__("sys").modules, "tensorrt_rtx", None)
    with pytest.raises(MissingError, match="tensorrt_rtx is not installed"):
        validate._backend_of(TARGET)


def test_a_forced_run_goes_on_along_the_recorded_ids(mini_bundle):
    """Where recorded ids are not the arg-max,
    each step still answers for itself: only steps that see them differ."""
    bundle = Bundle.open(mini_bundle)
    case = cases_from_file(bundle.file(RUNS))["generate"]
    other = case.outputs["image_ids"].copy()
    other[0, 2] = (other[0, 2] + 5) % bundle.manifest.model.codebook_size
    with Star(bundle, backend=f"interpreter:{TARGET}") as star:
        got = interpreted.forced_ids(star, Case(case.inputs, {"image_ids": other}))
    assert got[0, :3].tolist() == case.outputs["image_ids"][0, :3].tolist() and got.shape == other.shape


def test_embeddings_are_compared_where_ids_agree():
    ids, rows = np.array([[1, 2], [3, 4]]), np.arange(12.0).reshape(2, 2, 3)
    flipped, other = np.array([[1, 9], [3, 4]]), rows.copy()
    other[0, 1] += 7
    got, wanted = where_ids_agree(
        {"image_ids": flipped, "inputs_embeds": other}, {"image_ids": ids, "inputs_embeds": rows}
    )
    np.testing.assert_array_equal(got["inputs_embeds"], wanted["inputs_embeds"])
    assert got["inputs_embeds"].shape == (3, 3) and got["image_ids"] is flipped
    other[1, 1, 0] += 1  # where ids agree nothing is forgiven
    got, wanted = where_ids_agree(
        {"image_ids": flipped, "inputs_embeds": other}, {"image_ids": ids, "inputs_embeds": rows}
    )
    assert (got["inputs_embeds"] != wanted["inputs_embeds"]).sum() == 1
    guided = where_ids_agree(
        {"image_ids": np.array([1, 2]), "inputs_embeds": rows.reshape(4, 1, 3)},
        {"image_ids": np.array([1, 5]), "inputs_embeds": rows.reshape(4, 1, 3)},
    )
    np.testing.assert_array_equal(guided[0]["inputs_embeds"], rows.reshape(4, 3)[:2])
    guided = where_ids_agree(  # two positions of one image: its first row has both, then its second one
        {"image_ids": np.array([[1, 2]]), "inputs_embeds": rows},
        {"image_ids": np.array([[1, 5]]), "inputs_embeds": rows},
    )
    np.testing.assert_array_equal(guided[0]["inputs_embeds"], rows[:, 0])
    for side in where_ids_agree(
        {"image_ids": ids + 1, "inputs_embeds": rows}, {"image_ids": ids, "inputs_embeds": rows}
    ):
        assert side.keys() == {"image_ids"}  # which differ everywhere
