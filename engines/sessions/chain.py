"""A component that is stored in parts, as one session: each part's output is the next one's input."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..bundle.manifest import ComponentSpec
from ..bundle.tensors import bound_tensors, check_binding, present_name
from . import Buffer, Session

STREAM, OUTPUT = "inputs_embeds", "hidden_states"  # a part takes the residual stream and hands it on


class ChainSession:
    """The sessions of a component's parts, in order. `engines.sessions.Session` is its protocol.

    The residual stream between two parts is one buffer, written by the first and read by the second.
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
        check_binding(self.spec, tensors)
        stream, steps = tensors[STREAM], []
        for session in self.sessions:
            last = session is self.sessions[-1]
            handed_on = tensors[OUTPUT] if last else self.buffer(stream.shape, stream.dtype)
            own = {STREAM: stream, OUTPUT: handed_on}
            steps.append(
                session.bind(
                    {t.name: own.get(t.name) or tensors[t.name] for t in bound_tensors(session.spec)}
                )
            )
            stream = handed_on

        def step() -> None:
            for part in steps:
                part()

        return step

    def close(self) -> None:
        """Release the memory of all parts. Bound steps can no longer run."""
        for session in self.sessions:
            session.close()


def chained_spec(name: str, parts: Sequence[ComponentSpec]) -> ComponentSpec:
    """The spec of the whole component `name`: the first part's inputs, the last one's outputs, all caches."""
    pasts = [t for part in parts for t in part.inputs if present_name(t.name)]
    presents = {present_name(t.name) for t in pasts}
    return ComponentSpec(
        graph=name,
        twin=None,
        golden=parts[-1].golden,
        inputs=(*[t for t in parts[0].inputs if not present_name(t.name)], *pasts),
        outputs=(
            *[t for t in parts[-1].outputs if t.name not in presents],
            *[t for part in parts for t in part.outputs if t.name in presents],
        ),
    )


def _least(limits) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)
