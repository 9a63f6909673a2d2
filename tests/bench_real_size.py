"""The whole line at a released model's size, through the public commands, and the table of its limits.

    python -m tests.bench_real_size 3B|7B|nano FOLDER [--precision int4 bf16] [--steps export,build,...]

FOLDER gets a checkpoint of noise (`python -m reference.real_size`; `nano` is STAR-Nano, which tries this
script in two minutes), a bundle per precision, and `bench-SIZE.json`: every step with its command, seconds,
peak of own pages (`tests/helpers/measured.py`), exit code and what the machine did besides. Steps that stand
there for the same commit are not run again without `--again`. The tables are Markdown, as in docs/figures.md.

This is a benchmark, not a test: it asserts nothing, and its figures hold for this machine and this run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from engines.sessions.fused import FOLDER as FUSED
from tests.helpers.measured import Measured, drop_from_cache, run_measured, seconds_to_read
from tests.helpers.real_size_limits import GB, table

ROOT = Path(__file__).parents[1]
STEPS = ("export", "plan", "build", "validate", "read-back", "generate")
PROMPT = "a photo of a red cat"
BEFORE_FIRST_TOKEN = ("token_embedding", "base_ar", "stacked_ar", "image_head", "image_embedding")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_real_size", description=__doc__.split("\n")[0]
    )
    parser.add_argument("size", choices=("3B", "7B", "nano"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision", nargs="+", default=["int4"], metavar="P")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(STEPS), metavar="A,B,...")
    parser.add_argument("--checkpoint", metavar="FOLDER", help="one that is there already")
    for option in ("--layers", "--stacked-layers", "--vision-layers", "--vq-channels"):
        parser.add_argument(option, metavar="N", help="of the checkpoint that is made")
    parser.add_argument("--target", default="rtx-4090", metavar="T")
    parser.add_argument("--stop-at-gb", type=float, metavar="G", help="kill a step that takes more memory")
    parser.add_argument("--again", action="store_true", help="run steps that were run at this commit already")
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        parser.error(f"--steps: expected some of {', '.join(STEPS)}, got {', '.join(sorted(unknown))}")
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    bench.make_checkpoint()
    for precision in options.precision:
        for step in [step for step in STEPS if step in options.steps]:
            bench.run(precision, step)
    print("\n".join(table(bench.record)))
    return 0


class Bench:
    """The steps of one run, and their record on disk."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.folder = options, options.folder.absolute()
        self.path = self.folder / f"bench-{options.size}.json"
        self.commit = commit()
        self.record: dict[str, Any] = {"schema": 1, "size": options.size, "steps": {}}
        if self.path.exists():
            self.record = json.loads(self.path.read_text())
        self.record |= {"machine": machine()}
        names = ("layers", "stacked_layers", "vision_layers", "vq_channels")
        self.fewer = {name: getattr(options, name) for name in names if getattr(options, name)}
        self.record["fewer"] = self.fewer  # a model of real width with fewer layers has no limits

    @property
    def source(self) -> str:
        """What is exported."""
        if self.options.size == "nano":
            return "nano"
        return self.options.checkpoint or str(self.folder / "checkpoint")

    def bundle(self, precision: str) -> Path:
        return self.folder / f"bundle-{precision}"

    def make_checkpoint(self) -> None:
        """Write the checkpoint, unless there is one."""
        if self.source == "nano" or (
            Path(self.source).is_dir() and list(Path(self.source).glob("STAR*.json"))
        ):
            return
        shutil.rmtree(self.source, ignore_errors=True)
        fewer = [f"--{name.replace('_', '-')}={value}" for name, value in self.fewer.items()]
        command = [sys.executable, "-m", "reference.real_size", self.options.size, self.source, *fewer]
        self.keep("checkpoint", "checkpoint", self.measured(command))

    def run(self, precision: str, step: str) -> None:
        """Run a step, unless it was run at this commit, and keep what was measured."""
        known = self.record["steps"].get(precision, {}).get(step)
        if known and known["commit"] == self.commit and not self.options.again:
            print(f"{precision}: {step}: known from {known['date']}", file=sys.stderr)
            return
        if step != "export" and not self.bundle(precision).is_dir():
            print(f"{precision}: {step}: left out, as there is no bundle", file=sys.stderr)
            return
        self.keep(precision, step, getattr(self, step.replace("-", "_"))(precision))

    def export(self, precision: str) -> dict[str, Any]:
        bundle = self.bundle(precision)
        for place in (bundle, bundle.with_name(f".{bundle.name}.stage")):
            shutil.rmtree(place, ignore_errors=True)
        found = self.verb("export", self.source, "--out", bundle, "--precision", precision)
        if not found["exit_code"]:
            files = json.loads((bundle / "manifest.json").read_text())["files"].values()
            found["bundle_bytes"] = sum(file["size"] for file in files)
            found["distinct_bytes"] = sum(distinct_weights(self.source, precision).values())
        return found

    def plan(self, precision: str) -> dict[str, Any]:
        words = (self.source, "--precision", precision, "--target", self.options.target)
        return self.verb("plan", *words, "--json")

    def build(self, precision: str) -> dict[str, Any]:
        shutil.rmtree(self.bundle(precision) / "plans", ignore_errors=True)
        return self.verb("build", self.bundle(precision), "--target", self.options.target)

    def validate(self, precision: str) -> dict[str, Any]:
        return self.verb("validate", self.bundle(precision))

    def read_back(self, precision: str) -> dict[str, Any]:
        return self.verb("validate", self.bundle(precision), "--target", self.options.target)

    def generate(self, precision: str) -> dict[str, Any]:
        """Start thrice: from cold files, with nothing that an earlier start kept; from cold files again, to
        draw an image; and from warm ones. The first and the last start end at the first token."""
        from engines.bench import host_bandwidth

        bundle = self.bundle(precision)
        tokens = json.loads((bundle / "manifest.json").read_text())["model"]["image_tokens"]
        command = ("generate", bundle, PROMPT, "-o", self.folder / f"{precision}.png", "--seed", "7")
        first, last = f"| 1/{tokens} [", f"| {tokens}/{tokens} ["
        marks, read_s, first_token_s = {"first_token_s": first}, {}, {}
        shutil.rmtree(bundle / FUSED, ignore_errors=True)
        bandwidth, drawn = host_bandwidth(), {}
        for start in ("at first", "cold", "warm"):
            files = files_before_first_token(bundle)
            read_s[start] = seconds_to_read(files, cold=start != "warm")
            if start != "warm":
                drop_from_cache(files)
            if start == "cold":
                drawn = run = self.verb(*command, marks=marks | {"last_token_s": last})
            else:
                run = self.verb(*command, marks=marks, stop_text=first)
            first_token_s[start] = run["first_token_s"]
        return drawn | {
            "tokens": tokens,
            "read_bytes": sum(path.stat().st_size for path in files_before_first_token(bundle)),
            "read_s": read_s,
            "first_token_s": first_token_s,
            "step_bytes": bytes_of_step(self.source, bundle, precision),
            "bandwidth": max(bandwidth, host_bandwidth()),
        }

    def verb(self, *words: str | Path, **options: Any) -> dict[str, Any]:
        return self.measured([sys.executable, "-m", "star_export", *map(str, words)], **options)

    def measured(
        self, command: list[str], *, marks: dict[str, str] | None = None, stop_text: str | None = None
    ) -> dict[str, Any]:
        """Run a command; `marks` names texts on its terminal whose times are kept too."""
        print("$ " + " ".join(command[1:]), file=sys.stderr, flush=True)
        load = os.getloadavg()[0]
        stop = self.options.stop_at_gb
        run = run_measured(
            command, stop_bytes=int(stop * GB) if stop else None, stop_text=stop_text, cwd=ROOT
        )
        print(
            f"  {run.seconds:.1f} s, {run.peak_bytes / GB:.2f} GB, exit code {run.exit_code}", file=sys.stderr
        )
        return {
            "command": command[1:],
            "commit": self.commit,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "load_before": round(load, 2),
            "seconds": round(run.seconds, 2),
            "peak_bytes": run.peak_bytes,
            "exit_code": run.exit_code,
            "output": (run.stdout + plain(run))[-3000:],
        } | {name: run.first(text) for name, text in (marks or {}).items()}

    def keep(self, precision: str, step: str, found: dict[str, Any]) -> None:
        self.record["steps"].setdefault(precision, {})[step] = found
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.record, indent=1) + "\n")
        os.replace(partial, self.path)


def plain(run: Measured) -> str:
    """What the command said, without its bars."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", "".join(words for _, words in run.said))
    lines = re.split(r"[\r\n]+", text)
    return "\n".join(line for line in lines if line.strip() and not re.search(r"\| .* \[\d+:\d\d", line))


def distinct_weights(source: str, precision: str) -> dict[str, int]:
    """Every weight that the model needs -> its bytes at this precision, each once, scales included.

    The table of image embeddings stands for the adapter that it is computed with.
    """
    from reference.config import config_from_files
    from reference.names import aliases
    from reference.weights import named_tensors, resolve_checkpoint
    from star_export.graph.precisions import PRECISIONS

    files = resolve_checkpoint(source)
    config = config_from_files(files.config_json, files.qwen_folder)
    shapes = {
        name: lazy.shape
        for name, lazy in named_tensors(files, config).items()
        if name not in aliases(config) and not name.startswith("pixel_adapter.")
    }
    shapes["image_table.weight"] = (config.vq.codebook_size, config.base_ar.hidden_size)
    return {name: sum(PRECISIONS[precision].stored(name, tuple(shape))[1]) for name, shape in shapes.items()}


def bytes_of_step(source: str, bundle: Path, precision: str) -> int:
    """Bytes that a decode step must read: weights, and caches of two rows that are filled on average."""
    manifest = json.loads((bundle / "manifest.json").read_text())["model"]
    components = ("base_ar.", "stacked_ar.", "image_head.")
    weights = distinct_weights(source, precision)
    read = sum(size for name, size in weights.items() if name.startswith(components))
    width = 4 if precision == "fp32" else 2
    filled = 32 + manifest["image_tokens"] // 2  # a prompt is short
    caches = [2 * c["layers"] * c["kv_heads"] * c["head_dim"] for c in manifest["cache"].values()]
    return read + 2 * filled * width * sum(caches)


def files_before_first_token(bundle: Path) -> list[Path]:
    """The graphs and weights that `generate` needs to draw the first token, each once.

    What an earlier start kept of a component stands in place of the bundle's own files.
    """
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = [bundle / table["file"] for name, table in manifest["tables"].items() if needed(name)]
    for name, component in manifest["components"].items():
        kept = bundle / FUSED / name / "model.onnx"
        if needed(name):
            files.append(kept if kept.exists() else bundle / (component["twin"] or component["graph"]))
    files += [path.with_name("model.onnx.data") for path in files]
    return [path for path in dict.fromkeys(files) if path.exists()]


def needed(name: str) -> bool:
    return name.partition("/")[0] in BEFORE_FIRST_TOKEN


def commit() -> str:
    """The commit that is measured, marked if files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    changed = git("status", "--porcelain", "--untracked-files=no").strip()
    return git("rev-parse", "--short=12", "HEAD").strip() + (
        f", changed {time.time():.0f}" if changed else ""
    )


def machine() -> dict[str, Any]:
    cpus = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
    memory = int(re.findall(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    packages = ("torch", "onnx", "onnxruntime", "tensorrt-rtx-cu13", "numpy")
    return {
        "cpu": cpus[0] if cpus else platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }


if __name__ == "__main__":
    sys.exit(main())
