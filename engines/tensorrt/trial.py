"""A plan is loaded by another process first: if TensorRT crashes on it, that process ends, and not this one.

A plan with the right hash may crash all the same, where it was damaged before it was hashed or the library is
another build of the same version. One process tries the small plans of a target, all at once, when the first
of them is needed, since starting it takes most of the time. Large ones are not tried.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

from .. import plugins
from ..bundle.reader import Bundle
from ..errors import InputError
from ..targets import Target
from .plan import Build, plan_bytes, read_build, rebuild_command

TRIAL_BYTES = 256 << 20  # of plans together: more would take longer than a second to read and load
SECONDS = 60.0  # on a busy machine
CRASHES = ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE", "SIGABRT")
EXCEPTIONS = 0xC0000000  # exit codes of Windows from here on are exceptions of the system
_loaded_before: set[str] = set()  # the SHA-256 of plans that another process could load


def try_plan(bundle: Bundle, target: Target, component: str, data: bytes) -> None:
    """Raise InputError if another process crashes while it loads this plan, whose bytes are `data`.

    Whatever else goes wrong there goes wrong here too, with a message of its own.
    """
    build = read_build(bundle, target.name)
    if build.components[component].plan.sha256 in _loaded_before or len(data) > TRIAL_BYTES:
        return
    plans = {component: data} | _others(bundle, build, component)
    begun, code = _run(target.builder, plans, _library(bundle, target, build, component))
    loaded = begun if code == 0 else begun[:-1]
    _loaded_before.update(build.components[name].plan.sha256 for name in loaded)
    if begun[-1:] == [component] and (crash := _crash(code)):
        raise InputError(
            "TensorRT crashes on this plan",
            where=f"{component} for {target.name}: expected a plan that loads, got {crash} in a process "
            "that loaded it",
            fix=rebuild_command(bundle, target.name),
        )


def _others(bundle: Bundle, build: Build, component: str) -> dict[str, bytes]:
    """The other plans that are small enough to be tried with that of `component`, the smallest first."""
    plans, size = dict[str, bytes](), build.components[component].plan.size
    for name, spec in sorted(build.components.items(), key=lambda item: item[1].plan.size):
        size += spec.plan.size
        if name == component or spec.plan.sha256 in _loaded_before:
            continue
        if size > TRIAL_BYTES:
            break
        try:
            plans[name] = plan_bytes(bundle, build.target, name, spec)
        except InputError:  # told when that plan is needed
            continue
    return plans


def _run(builder: str, plans: dict[str, bytes], library: str | None) -> tuple[list[str], int]:
    """The plans that a process began to load, in order, and its exit code."""
    program = str(Path(__file__).with_name("loading.py"))
    sizes = {name: len(data) for name, data in plans.items()}
    request = json.dumps({"builder": builder, "library": library, "plans": sizes})
    try:  # isolated, and with our search path: no module of the current folder is imported
        done = subprocess.run(
            [sys.executable, "-I", "-S", program, json.dumps(sys.path), request],
            input=b"".join(plans.values()),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired):
        return [], 0
    return done.stdout.decode().split(), done.returncode


def _library(bundle: Bundle, target: Target, build: Build, component: str) -> str | None:
    """The path of the plugin's library, where the plan contains the plugin; `read_plan` checked it."""
    if build.components[component].plugin is None:
        return None
    library = plugins.library_for(target, bundle.component(component), tensorrt=build.tensorrt)
    return str(library.path.resolve()) if library else None


def _crash(code: int) -> str:
    """What ended a process, or "" if it was no crash, as where it was killed for its memory."""
    if code >= EXCEPTIONS:
        return f"exception {code:#x}"
    names = {-getattr(signal, name, 0): name for name in CRASHES}
    return f"signal {-code} ({names[code]})" if code < 0 and code in names else ""
