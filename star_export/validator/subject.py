"""The subject of a validation: a bundle on a backend, and the type that it computes in."""

from __future__ import annotations

from dataclasses import dataclass

from engines.bundle.reader import Bundle
from engines.fit.memory import task_memory, tasks_of
from engines.runtime.star import Star

from .evidence import Evidence

RUNS = "golden.safetensors"  # whole runs, at the bundle's root
IN_TURN_BYTES = 4 << 30  # a task that takes more has its components loaded in turn
RUN_TOKENS = 2048  # of a whole run, at most


@dataclass(frozen=True)
class Subject:
    """The components of `bundle` on `backend`, which computes in `compute` (fp32, fp16 or bf16).

    Rungs add to `evidence`, if there is one, what a report shows. `threads` is that of
    `engines.sessions.open_session`.
    """

    bundle: Bundle
    backend: str
    compute: str
    evidence: Evidence | None = None
    threads: int | None = None

    @property
    def target(self) -> str:
        """The target that the backend names, or ""."""
        return self.backend.partition(":")[2]

    def star(self, *, window: int = 1) -> Star:
        """The runtime to try whole runs with; on a CPU a large model's components are loaded in turn.

        Exact arithmetic takes four bytes of a weight in int8, and nothing here needs all of them at once.
        """
        star = Star(self.bundle, backend=self.backend, window=window, threads=self.threads)
        use = star.loaded.use(rows=4, tokens=RUN_TOKENS, prompt_tokens=RUN_TOKENS)
        taken = [task_memory(star.loaded.sizes, task, use) for task in tasks_of(star.loaded.sizes)]
        if not star.loaded.on_cpu or max(task.resident_bytes for task in taken) <= IN_TURN_BYTES:
            return star
        star.close()
        budget = max(task.in_turn_bytes for task in taken)
        return Star(self.bundle, backend=self.backend, window=window, memory=budget, threads=self.threads)
