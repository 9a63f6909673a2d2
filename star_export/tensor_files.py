"""Safetensors files, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from engines.bundle.files import not_written

_NUMBER = re.compile(r"os error (\d+)")


def save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Write numpy arrays, or torch tensors, by name to `path`, which takes its name when it is complete.

    Raises InputError where the system does not let it be written: safetensors has an error of its own for it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file as save_arrays
    from safetensors.torch import save_file as save_torch

    arrays = all(isinstance(tensor, np.ndarray) for tensor in tensors.values())
    partial = path.with_name(f".{path.name}.tmp")
    try:
        (save_arrays if arrays else save_torch)(dict(tensors), partial)
        os.replace(partial, path)
    except SafetensorError as error:
        number = _NUMBER.search(str(error))
        if number is None:
            raise
        cause = OSError(int(number[1]), os.strerror(int(number[1])), str(path))
        raise not_written(path, cause) from cause
    except OSError as error:
        raise not_written(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
