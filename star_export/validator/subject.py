"""What is validated: a bundle on a backend, and the type that it computes in."""

from __future__ import annotations

from dataclasses import dataclass

from engines.bundle.reader import Bundle

RUNS = "golden.safetensors"  # whole runs, at the bundle's root


@dataclass(frozen=True)
class Subject:
    """What is validated: the components of `bundle` on `backend`, computing in `compute` (fp32, fp16, bf16)."""

    bundle: Bundle
    backend: str
    compute: str

    @property
    def target(self) -> str | None:
        return self.backend.partition(":")[2] or None
