"""STAR on a device: bundles, plans, and a runtime that needs neither torch nor transformers.

The public names are imported on first use, so `import engines` loads neither numpy nor an executor.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bundle.reader import Bundle
    from .errors import InputError, MissingError, ParityError, StarError, UsageError
    from .runtime.painting import Painting
    from .runtime.results import Answer, Images
    from .runtime.star import Star
    from .tensorrt.build import build_plans as build

# ONNX Runtime 1.32 writes an id of the machine and a database of events under HOME at every run. It reads
# this when it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Star": "runtime.star",
    "Answer": "runtime.results",
    "Images": "runtime.results",
    "Painting": "runtime.painting",
    "Bundle": "bundle.reader",
    "build": "tensorrt.build:build_plans",
    "StarError": "errors",
    "UsageError": "errors",
    "InputError": "errors",
    "ParityError": "errors",
    "MissingError": "errors",
}
__all__ = [
    "Answer",
    "Bundle",
    "Images",
    "InputError",
    "MissingError",
    "Painting",
    "ParityError",
    "Star",
    "StarError",
    "UsageError",
    "build",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute or name)
