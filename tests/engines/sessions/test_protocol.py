"""Nothing reads an attribute of a session or buffer that its protocol does not declare."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import numpy as np
import pytest

from engines import sessions
from engines.bundle.reader import Bundle
from engines.errors import InputError
from engines.runtime.star import Star
from engines.sessions import Buffer, Session, open_session, open_sessions
from star_export.golden.cases import component_cases
from star_export.golden.run_case import run_case
from tests.helpers.fake_decoder import FakeDecoder


def declared(protocol: type) -> set[str]:
    """The members of a protocol, attributes and methods."""
    return set(protocol.__annotations__) | {name for name in vars(protocol) if not name.startswith("_")}


class DeclaredOnly:
    """Sessions and buffers reduced to the members that their protocols declare."""

    def __init__(self) -> None:
        self.wrapped: dict[int, tuple[object, Buffer]] = {}  # keeps every view alive, so that ids stay unique

    def session(self, session: Session) -> SimpleNamespace:
        def bind(tensors: Mapping[str, object]):
            return session.bind({name: self.wrapped[id(view)][1] for name, view in tensors.items()})

        def buffer(shape: tuple[int, ...], dtype: str):
            return self.buffer(session.buffer(shape, dtype))

        members = {name: getattr(session, name) for name in declared(Session)}
        return SimpleNamespace(**members | {"bind": bind, "buffer": buffer})

    def buffer(self, buffer: Buffer) -> SimpleNamespace:
        view = SimpleNamespace(**{name: getattr(buffer, name) for name in declared(Buffer)})
        self.wrapped[id(view)] = view, buffer
        return view


def test_the_protocols_declare_what_the_design_says():
    assert declared(Buffer) == {"shape", "dtype", "write", "read"}
    assert declared(Session) == {"spec", "capacity_tokens", "prefill_tokens", "buffer", "bind", "close"}


def test_the_runtime_reads_only_what_the_protocols_declare(mini_bundle, monkeypatch):
    image = np.arange(60 * 60 * 3, dtype=np.uint8).reshape(60, 60, 3)

    def results() -> list[np.ndarray]:
        with Star(mini_bundle) as star:
            drawn, edited = star.generate("a red cat"), star.edit(image, "blue")
            return [drawn.image_ids, edited.image_ids, star.ask(image, "what?", max_new_tokens=2).ids]

    wanted, only = results(), DeclaredOnly()
    monkeypatch.setattr(
        "engines.runtime.loaded.open_sessions",
        lambda *a, **k: {name: only.session(found) for name, found in open_sessions(*a, **k).items()},
    )
    for expected, got in zip(wanted, results()):
        np.testing.assert_array_equal(got, expected)
    assert only.wrapped


@pytest.mark.parametrize("component", ["base_ar", "image_head"])
def test_a_recorded_case_reads_only_what_the_protocols_declare(mini_bundle, component):
    bundle = Bundle.open(mini_bundle)
    spec = bundle.component(component)
    case = next(iter(component_cases(bundle.file(spec.golden), spec).values()))
    session = DeclaredOnly().session(open_session(bundle, component))
    results = run_case(session, case, tolerances=dict.fromkeys(case.outputs, 1e-3) | {"present": 1e-3})
    assert results and all(result.passed for result in results)


def test_the_fake_sessions_of_the_tests_have_the_declared_members():
    fake = FakeDecoder()
    assert declared(Session) <= set(dir(fake))
    assert declared(Buffer) <= set(dir(fake.buffer((1,), "float32")))


def test_sessions_opened_at_once_are_those_opened_one_by_one(mini_bundle):
    names = ["base_ar", "token_embedding", "image_head"]
    opened = open_sessions(Bundle.open(mini_bundle), names, backend="onnxruntime")
    one_by_one = {name: open_session(Bundle.open(mini_bundle), name) for name in names}
    assert {name: s.spec for name, s in opened.items()} == {name: s.spec for name, s in one_by_one.items()}
    assert list(opened) == names


def test_the_first_of_several_that_cannot_be_opened_is_told_and_the_others_are_closed(
    mini_bundle, monkeypatch
):
    closed, inner = [], sessions.open_session

    def opened(bundle, name, **options):
        if name in ("image_head", "text_head"):
            raise InputError("This file has changed", where=name, fix="copy the bundle again")
        session = inner(bundle, name, **options)
        monkeypatch.setattr(session, "close", lambda: closed.append(name))
        return session

    monkeypatch.setattr(sessions, "open_session", opened)
    names = ["base_ar", "image_head", "text_head", "token_embedding"]
    with pytest.raises(InputError, match="image_head"):
        open_sessions(Bundle.open(mini_bundle), names, backend="onnxruntime")
    assert closed == ["base_ar", "token_embedding"]


def test_the_record_of_a_plan_says_how_large_a_batch_may_be(monkeypatch):
    from engines.sessions import plan_capacity, plan_rows
    from engines.tensorrt.profiles import Limits, profiles_from_limits
    from tests.helpers.fake_decoder import spec
    from tests.helpers.tiny_bundle import MODEL

    profiles = profiles_from_limits(spec(), MODEL, Limits(capacity_tokens=48, prefill_tokens=16, rows=6))
    monkeypatch.setattr(
        "engines.tensorrt.plan.plan_spec", lambda *_: (None, SimpleNamespace(profiles=profiles))
    )
    bundle = SimpleNamespace(component=lambda graph: spec())
    assert plan_rows(bundle, "base_ar", backend="tensorrt:rtx-4090") == 6
    assert plan_capacity(bundle, "base_ar", backend="tensorrt:rtx-4090") == 48
    assert plan_rows(bundle, "base_ar", backend="onnxruntime") is None
