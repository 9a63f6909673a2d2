"""`star-export`: parse the arguments, call the verb of that name with them, return an exit code. No logic.

Exit codes: 0 done, 1 a bug of ours (traceback), 2 usage, 3 bad input or artifact, 4 parity failed, 5 missing
dependency or device, 130 interrupted (also when the reader of stdout has gone away). Results go to stdout,
progress and errors to stderr. A user's error is three lines.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from engines.errors import InputError, StarError, UsageError
from reference.errors import CheckpointError

from .. import __version__
from . import commands, runs, verbs
from .failures import out_of_memory, three_lines

INTERRUPTED = 130


def main(argv: list[str] | None = None) -> int:
    """Run one command line (without the program's name) and return its exit code. Our own bugs are raised."""
    try:
        arguments = vars(build_parser().parse_args(argv))
        verb, as_json = arguments.pop("verb"), arguments.pop("json")
        outcome = getattr(verbs, verb)(**arguments)
        print(json.dumps(outcome.data, indent=1, ensure_ascii=False) if as_json else outcome.text, flush=True)
        if outcome.error:
            raise outcome.error
        return 0
    except (StarError, CheckpointError) as error:
        # What looks like a bad file may be a library that ran out of memory while it read it.
        cause = error.__context__ if isinstance(error, InputError) else None
        told = out_of_memory(cause, verb) if cause else None
        print(three_lines(told or error), file=sys.stderr)
        return (told or error).exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Otherwise Python complains about the broken pipe when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERRUPTED
    except Exception as error:
        missing = out_of_memory(error, verb)
        if missing is None:
            raise
        print(three_lines(missing), file=sys.stderr)
        return missing.exit_code


class Parser(argparse.ArgumentParser):
    """An argparse parser that accepts no abbreviations and raises UsageError."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str):
        raise UsageError(
            "The command line is not valid", where=f"{self.prog}: {message}", fix=f"{self.prog} -h"
        )


def build_parser() -> Parser:
    """Add one sub-command per verb; its destinations are the keywords of the verb's function in `verbs`."""
    parser = Parser(
        prog="star-export",
        description="STAR from a checkpoint to TensorRT engines, answers and images, with proof.",
    )
    parser.add_argument("--version", action="version", version=f"star-export {__version__}")
    verb = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for add in (
        commands.add_export,
        commands.add_build,
        commands.add_validate,
        commands.add_certificate,
        runs.add_generate,
        runs.add_edit,
        runs.add_ask,
        runs.add_bench,
        commands.add_score,
        commands.add_plan,
        commands.add_inspect,
        commands.add_targets,
        commands.add_doctor,
    ):
        add(verb)
    return parser
