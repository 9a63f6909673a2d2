"""A component that is stored in parts, as one session: each part's results are the next one's inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..bundle.manifest import ComponentSpec, TensorSpec
from ..bundle.tensors import (
    HANDED_ON,
    bound_tensors,
    check_binding,
    handed_on,
    present_name,
    shape_from_symbols,
)
from . import Buffer, Session


class ChainSession:
    """The sessions of a component's parts, in order. `engines.sessions.Session` is its protocol.

    What a part hands on is one buffer, written by it and read by the parts after it.
    """

    def __init__(self, name: str, sessions: Sequence[Session]):
        self.sessions = list(sessions)
        self.spec = chained_spec(name, [session.spec for session in sessions])
        self.capacity_tokens = _least(session.capacity_tokens for session in sessions)
        self.prefill_tokens = _least(session.prefill_tokens for session in sessions)

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Allocate a zeroed buffer where the parts compute."""
        return self.sessions[0].buffer(shape, dtype)

    def bind(self, tensors: Mapping[str, Buffer]) -> Callable[[], None]:
        """Check `tensors` and return a step, which runs all parts on them in place. Raises InputError."""
        bound = bound_parts(self.spec, [session.spec for session in self.sessions], tensors, self.buffer)
        steps = [session.bind(own) for session, own in zip(self.sessions, bound)]

        def step() -> None:
            for part in steps:
                part()

        return step

    def close(self) -> None:
        """Release the memory of all parts. Bound steps can no longer run."""
        for session in self.sessions:
            session.close()


class TurnsSession:
    """A component whose parts are loaded one after the other, each for its share of a step and no longer.

    `open_part(i)` loads the i-th of the parts `specs`. `engines.sessions.Session` is its protocol.
    """

    capacity_tokens: int | None = None
    prefill_tokens: int | None = None

    def __init__(self, name: str, specs: Sequence[ComponentSpec], open_part: Callable[[int], Session]):
        self.spec, self.parts, self.open_part = chained_spec(name, specs), list(specs), open_part
        self.held: tuple[int, Session] | None = None

    def buffer(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """Allocate a zeroed buffer where the parts compute."""
        return (self.held[1] if self.held else self._part(0)).buffer(shape, dtype)

    def bind(self, tensors: Mapping[str, Buffer]) -> Callable[[], None]:
        """Check `tensors` and return a step, which loads and runs part after part. Raises InputError."""
        bound = bound_parts(self.spec, self.parts, tensors, self.buffer)

        def step() -> None:
            for i, own in enumerate(bound):
                self._part(i).bind(own)()

        return step

    def close(self) -> None:
        """Release the memory of the part that is loaded. A step loads it again."""
        if self.held:
            _, session = self.held
            self.held = None
            session.close()

    def _part(self, i: int) -> Session:
        if self.held is None or self.held[0] != i:
            self.close()
            self.held = i, self.open_part(i)
        return self.held[1]


def bound_parts(
    whole: ComponentSpec,
    parts: Sequence[ComponentSpec],
    tensors: Mapping[str, Buffer],
    buffer: Callable[[tuple[int, ...], str], Buffer],
) -> list[dict[str, Buffer]]:
    """The buffers of each part, of a component that is bound to `tensors`: those that a part hands on are
    allocated with `buffer`. Raises InputError unless `tensors` match `whole`."""
    symbols, known, bound = check_binding(whole, tensors), dict(tensors), []
    for part in parts:
        last = part is parts[-1]
        made = {
            t.name: buffer(shape_from_symbols(t.shape, symbols), t.dtype)
            for t in part.outputs
            if t.name in HANDED_ON and not last
        }
        bound.append({t.name: made.get(t.name) or known[t.name] for t in bound_tensors(part)})
        known |= handed_on({}, made)
    return bound


def chained_spec(name: str, parts: Sequence[ComponentSpec]) -> ComponentSpec:
    """The spec of the whole component `name`: the inputs that no part hands on, the last one's outputs, and
    all caches."""
    pasts = [t for part in parts for t in part.inputs if present_name(t.name)]
    presents = {present_name(t.name) for t in pasts}
    inputs: dict[str, TensorSpec] = {}
    handed: dict[str, TensorSpec] = {}
    for part in parts:
        given = [t for t in part.inputs if not present_name(t.name) and t.name not in handed]
        inputs |= {t.name: inputs.get(t.name, t) for t in given}
        handed |= handed_on({}, {t.name: t for t in part.outputs})
    return ComponentSpec(
        graph=name,
        twin=None,
        golden=parts[-1].golden,
        inputs=(*inputs.values(), *pasts),
        outputs=(
            *[t for t in parts[-1].outputs if t.name not in presents],
            *[t for part in parts for t in part.outputs if t.name in presents],
        ),
    )


def _least(limits) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
