"""On what a run was made: GPU, driver, CUDA, packages, commit, time. Facts that are not there are None;
nothing is raised.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMIT_FILE = ROOT / "COMMIT"  # in a copy of the tree without .git: its one line names the commit
PACKAGES = (
    "torch",
    "numpy",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx-cu13",
    "tensorrt-cu13",
    "cuda-python",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "transformers",
    "tokenizers",
    "safetensors",
    "flash-attn",
    "nvidia-cudnn-cu13",
    "nvidia-cublas",
    "pytest",
    "pytest-xdist",
)
QUERY = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "power_limit_w": "power.limit",
    "compute_capability": "compute_cap",
    "memory_clock_mhz": "clocks.max.memory",
    "sm_clock_mhz": "clocks.max.sm",
}


def machine(*, commit: str | None = None) -> dict:
    """All facts, of this moment. `commit` stands for what git says."""
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit or commit_of(ROOT),
        "gpus": gpus(),
        "nvcc": last_line("nvcc", "--version"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def commit_of(root: Path) -> str | None:
    """The commit of `root`, with `+` behind it where files differ; without git, what COMMIT says."""
    head = last_line("git", "-C", str(root), "rev-parse", "HEAD") if (root / ".git").exists() else None
    if head is not None:
        return head + ("+" if last_line("git", "-C", str(root), "status", "--porcelain") else "")
    return COMMIT_FILE.read_text().strip() if COMMIT_FILE.exists() else None


def gpus() -> list[dict]:
    """What nvidia-smi says of each GPU; none where there is no nvidia-smi."""
    said = output("nvidia-smi", f"--query-gpu={','.join(QUERY.values())}", "--format=csv,noheader,nounits")
    return [
        dict(zip(QUERY, (word.strip() for word in line.split(",")))) for line in (said or "").splitlines()
    ]


def version(name: str) -> str | None:
    """Version of an installed distribution; the first on the path counts."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def last_line(*command: str) -> str | None:
    """The last line that a command prints; None where it prints none, fails or is not there."""
    lines = (output(*command) or "").strip().splitlines()
    return lines[-1] if lines else None


def output(*command: str) -> str | None:
    """What a command prints; None where it fails or is not there."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout if done.returncode == 0 else None
