"""`star-export completion`: the script with which a shell completes verbs, options and their values.

shtab writes it from the parser. Here it learns what the parser leaves to a verb, such as the targets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from engines.errors import MissingError, install

from .outputs import Outcome

FOLDERS = ("BUNDLE", "B", "FOLDER", "SOURCE", "SOURCE_OR_BUNDLE")
FILES = ("F.png", "F.npy", "FILE.html", "IMAGE", "PATH", "X")


def completion(shell: str) -> Outcome:
    """The completion script of `shell`.

    Raises MissingError where shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise MissingError(
            "The package that writes completion scripts is not installed",
            where="completion: expected shtab, got none",
            fix=install("completion"),
        ) from None
    from .parser import build_parser

    parser = build_parser()
    for action in _actions(parser):
        if action.metavar in FOLDERS:
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
        elif action.metavar in FILES:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
        elif action.dest in ("target", "backend"):
            action.choices = _names(action.dest)
    script = shtab.complete(parser, shell)
    return Outcome({"shell": shell, "script": script}, script)


def _names(kind: str) -> list[str]:
    """The targets, or the backends."""
    from engines.sessions import UNTARGETED
    from engines.targets import TARGETS

    return [*TARGETS] if kind == "target" else [*UNTARGETED, *(f"tensorrt:{name}" for name in TARGETS)]


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """All arguments of `parser` and of its verbs."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _actions(verb)
