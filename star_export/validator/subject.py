"""The subject of a validation: a bundle on a backend, and the type that it computes in."""

from __future__ import annotations

from dataclasses import dataclass

from engines.bundle.reader import Bundle

from .evidence import Evidence

RUNS = "golden.safetensors"  # whole runs, at the bundle's root


@dataclass(frozen=True)
class Subject:
    """The components of `bundle` on `backend`, which computes in `compute` (fp32, fp16 or bf16).

    Rungs add to `evidence`, if there is one, what a report shows.
    """

    bundle: Bundle
    backend: str
    compute: str
    evidence: Evidence | None = None

    @property
    def target(self) -> str:
        """The target that the backend names, or ""."""
        return self.backend.partition(":")[2]
