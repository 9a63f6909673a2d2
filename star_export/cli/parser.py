"""`star-export`: parse the arguments, call the verb of that name with them, return an exit code. No logic.

Exit codes: 0 done, 1 a bug of ours (traceback), 2 usage, 3 bad input or artifact, 4 parity failed, 5 missing
dependency or device, 130 interrupted (also when the reader of stdout has gone away). Results go to stdout,
progress and errors to stderr. A user's error is three lines; with `--json` it is an object on stdout, too.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import mmap
import sys
import traceback
from collections.abc import Iterable
from typing import Any

from engines.errors import InputError, UsageError

from .. import __version__
from . import commands, runs, streams, verbs
from .arguments import add_command, add_common
from .failures import parts_of, three_lines, user_error
from .streams import json_text, printable

INTERRUPTED = 130
RESERVE_BYTES = 16 << 20


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code. Our own bugs are raised."""
    streams.prepare()
    reserve = mmap.mmap(-1, RESERVE_BYTES)  # addresses, which cost no memory until they are written
    words = sys.argv[1:] if argv is None else argv
    common: dict[str, Any] = {
        "verb": "star-export",
        "json": "--json" in words,
        "verbose": False,
        "quiet": False,
    }
    try:
        parser = build_parser()
        arguments = vars(parser.parse_args(words))
        common = {name: arguments.pop(name) for name in common}
        if common["verb"] in (None, "help"):
            about = arguments.get("about")
            parser.parse_args([*([about] if about else []), "-h"])  # prints the help, and exits
        if common["quiet"] and "progress" in arguments:
            arguments["progress"] = False
        outcome = getattr(verbs, common["verb"])(**arguments)
        if not common["quiet"]:
            streams.say(json_text(outcome.data) if common["json"] else printable(outcome.text))
        if outcome.error:
            raise outcome.error
        return 0
    except SystemExit as asked:  # of a help or the version
        return int(asked.code or 0)
    except KeyboardInterrupt:
        streams.complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        streams.hang_up()
        return INTERRUPTED
    except Exception as error:
        reserve.close()  # so that an error of memory can be told
        told = user_error(error, common["verb"])
        if told is None:
            raise
        if common["verbose"]:
            streams.complain(printable("".join(traceback.format_exception(error)).rstrip()))
        if common["json"]:
            with contextlib.suppress(InputError, BrokenPipeError):
                streams.say(json_text({"error": parts_of(told) | {"exit_code": told.exit_code}}))
        streams.complain(three_lines(told))
        return told.exit_code


class Parser(argparse.ArgumentParser):
    """An argparse parser that accepts no abbreviations, and raises UsageError with what may be meant."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise self.refusal(message)

    def refusal(self, message: str, fix: str = "") -> UsageError:
        return UsageError(
            "The command line is not valid", where=f"{self.prog}: {message}", fix=fix or f"{self.prog} -h"
        )

    def parse_known_args(self, args=None, namespace=None):
        """Refuse words that nothing takes here, where the verb is known."""
        found, left = super().parse_known_args(args, namespace)
        if not left:
            return found, left
        word = left[0]
        options = [name for action in self._actions for name in action.option_strings]
        fix = nearest(word.partition("=")[0], options, self.prog)
        if not word.startswith("-"):
            fix = f"{self.prog} -h; a text of several words stands in quotes"
        raise self.refusal(f"expected no more words, got {' '.join(left)!r:.200}", fix)

    def _check_value(self, action: argparse.Action, value):
        """A word that is none of the choices: name the nearest."""
        if action.choices is not None and value not in action.choices:
            names = [str(choice) for choice in action.choices]
            name = argparse._get_action_name(action)
            raise self.refusal(
                f"{name}: expected one of {', '.join(names)}, got {value!r:.100}",
                nearest(str(value), names, self.prog),
            )


def nearest(word: str, names: Iterable[str], program: str) -> str:
    """What to do about a word that is none of `names`: the one that looks most like it, or the help."""
    known = list(names)
    begun = [name for name in known if word and name.startswith(word.lower())]
    (name, *_) = [*(begun if len(begun) == 1 else []), *difflib.get_close_matches(word.lower(), known, 1), ""]
    return f"did you mean {name}? {program} -h lists all" if name else f"{program} -h"


def build_parser() -> Parser:
    """Add one sub-command per verb; its destinations are the keywords of the verb's function in `verbs`."""
    parser = Parser(
        prog="star-export",
        description="STAR from a checkpoint to TensorRT engines, answers and images, with proof.",
    )
    parser.add_argument("--version", action="version", version=f"star-export {__version__}")
    add_common(parser)
    verb = parser.add_subparsers(dest="verb", metavar="VERB")
    for add in (
        commands.add_export,
        commands.add_build,
        commands.add_validate,
        commands.add_certificate,
        runs.add_generate,
        runs.add_edit,
        runs.add_ask,
        runs.add_bench,
        runs.add_serve,
        commands.add_score,
        commands.add_plan,
        commands.add_inspect,
        commands.add_targets,
        commands.add_doctor,
        commands.add_completion,
    ):
        add(verb)
    add_command(verb, "help", "show how a verb is used", "generate").add_argument(
        "about", nargs="?", choices=[*verb.choices], metavar="VERB"
    )
    return parser
