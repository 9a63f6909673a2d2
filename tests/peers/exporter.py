"""A Qwen2 decoder through optimum's ONNX export: python -m tests.peers.exporter [--record]

[--source FOLDER --out FOLDER]

It runs in an environment of its own, since optimum-onnx asks for an older transformers; `make peers` makes
it. The base AR of STAR-Nano is written as a plain Qwen2 checkpoint: its positions are equal on the three axes
for text, and then multimodal rotary embedding is the plain one. transformers reads the checkpoint,
optimum-onnx exports it, and ONNX Runtime decodes with the caches that optimum chose. The numbers are compared
with the recorded ones, or take their place with `--record`. No code of this project has a part in them, but
for the loop that feeds each id back.

With `--source` and `--out`, any Qwen2 checkpoint is exported, as for `tests.bench_peers`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.exporters.onnx import onnx_export_from_model
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from transformers import Qwen2ForCausalLM

from . import oracle

PACKAGES = ("optimum", "optimum-onnx", "transformers", "torch", "onnx", "onnxruntime", "numpy")
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("hidden_act", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "bos_token_id", "eos_token_id"),
)


def write_qwen2(folder: Path) -> None:
    """Write STAR-Nano's base AR, token embedding and text head as a Qwen2 checkpoint."""
    base = json.loads((oracle.NANO / "config.json").read_text())
    config = {name: base[name] for name in SIZES}
    config |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(oracle.NANO / "model.safetensors")
    kept = {name: array for name, array in tensors.items() if not name.startswith("visual.")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def export_qwen2(source: Path, out: Path, *, rope_bf16: bool) -> None:
    """Export a Qwen2 checkpoint in float32. `rope_bf16` rounds its rotary frequencies first."""
    model = Qwen2ForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    if rope_bf16:
        rotary = model.model.rotary_emb
        rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    onnx_export_from_model(model, out, task="text-generation-with-past", do_validation=False)


def step_of(folder: Path) -> oracle.Step:
    """A step of the exported decoder, which hands its caches back to itself."""
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    shapes = {node.name: node.shape for node in session.get_inputs() if node.name.startswith("past")}
    outputs = [node.name for node in session.get_outputs()]
    past: dict[str, np.ndarray] = {}

    def step(ids: np.ndarray, first: int) -> np.ndarray:
        if not first:
            past.update({name: np.zeros((1, s[1], 0, s[3]), np.float32) for name, s in shapes.items()})
        feeds = {
            "input_ids": ids[None],
            "attention_mask": np.ones((1, first + len(ids)), np.int64),
            "position_ids": np.arange(first, first + len(ids))[None],
        }
        found = dict(zip(outputs, session.run(None, feeds | past)))
        past.update({name: found[name.replace("past_key_values", "present")] for name in shapes})
        return found["logits"][0]

    return step


def main(argv: list[str] | None = None) -> int:
    about = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m tests.peers.exporter", description=about)
    parser.add_argument("--record", action="store_true", help="replace the recorded arrays")
    parser.add_argument("--source", type=Path, help="export this Qwen2 checkpoint instead")
    parser.add_argument("--out", type=Path, help="to this folder")
    given = parser.parse_args(argv)
    versions = {name: version(name).partition("+")[0] for name in PACKAGES}
    print(", ".join(f"{name} {number}" for name, number in versions.items()), flush=True)
    if given.source:
        export_qwen2(given.source, given.out, rope_bf16=False)
        return 0
    tokenizer = Tokenizer.from_file(str(oracle.NANO / "tokenizer.json"))
    prompt = np.array(tokenizer.encode(oracle.PROMPT, add_special_tokens=False).ids)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "qwen2"
        source.mkdir()
        write_qwen2(source)
        for rope in oracle.ROPES:
            out = Path(folder) / rope
            export_qwen2(source, out, rope_bf16=rope == "bf16")
            results[rope] = oracle.decoded(step_of(out), prompt)
            print(f"{rope}: {tokenizer.decode(results[rope]['ids'], skip_special_tokens=False)!r}")
    if given.record:
        oracle.write_oracle(prompt, results, versions)
    failed = False
    for rope, found in results.items():
        compared = oracle.against_oracle(found, rope)
        print(oracle.line_of(f"optimum now against recorded, --rope {rope}", compared), flush=True)
        failed |= not all(result.passed for result in compared)
    if not np.array_equal(prompt, oracle.oracle_prompt()):
        print("the prompt's ids are not the recorded ones: FAILED")
        failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
