"""The subject of a validation: a bundle on a backend, and the type that it computes in."""

from __future__ import annotations

from dataclasses import dataclass

from engines.bundle.reader import Bundle

RUNS = "golden.safetensors"  # whole runs, at the bundle's root


@dataclass(frozen=True)
class Subject:
    """The components of `bundle` on `backend`, which computes in `compute` (fp32, fp16 or bf16)."""

    bundle: Bundle
    backend: str
    compute: str

    @property
    def target(self) -> str:
        """The target that the backend names, or ""."""
        return self.backend.partition(":")[2]
