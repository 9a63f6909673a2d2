"""What every refusal of a checkpoint must look like."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from reference.errors import CheckpointError


@contextmanager
def refused(*parts: str) -> Iterator[None]:
    """The block must raise CheckpointError: exit code 3, three lines, holding all `parts`."""
    with pytest.raises(CheckpointError) as caught:
        yield
    message = str(caught.value)
    what, where, fix = message.splitlines()
    assert what and where.startswith("  where: ") and fix.startswith("  fix: "), message
    assert len(where) > len("  where: ") and len(fix) > len("  fix: "), message
    assert caught.value.exit_code == 3
    for part in parts:
        assert part in message, f"expected {part!r} in:\n{message}"
