"""The peers of `bench_decode`: other runtimes at a decode step of STAR-3B's width, on weights of noise.

    .venv/bin/pip install openvino onnxruntime-genai llama-cpp-python gguf
    make peers

None is a dependency of this project, and one that is not installed is left out by name. Each holds a decoder
of the same widths and `filled` positions before the step, and computes as it does by itself, on all cores:

* transformers: `Qwen2Model`, eager, in float32 and bfloat16, with a `DynamicCache`;
* OpenVINO, the runtime of OpenVINO GenAI: a stateful graph in the form that GenAI loads (caches as state,
  rows chosen by `beam_idx`, integer weights with a scale per row, or per 128 features in int4), compiled for
  latency; with activations in bf16, its default here, and in f32, where it rounds them to int8 for integer
  weights. Its caches have 8 bits;
* ONNX Runtime GenAI: what its own builder makes of that `Qwen2` model, run by its `Generator`. Its step also
  looks up a token, multiplies by a head of 256 tokens and draws one;
* optimum: its ONNX export of the same model, made in an environment of its own (`tests/peers/exporter.py`),
  on ONNX Runtime with bound inputs and outputs. Its caches are returned as new ones, a position longer, and
  its step looks up a token and multiplies by the head, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from reference.config import DecoderConfig
from tests.peers import Steps
from tests.peers.llama_cpp import llama_cpp_steps, write_gguf
from tests.peers.openvino import openvino_steps

TOKENS = 256  # of the peers' vocabulary, since STAR's is another part of the model
POSITIONS = 1024  # of their tables of angles
NEEDED = {
    "OpenVINO": "openvino",
    "ONNX Runtime GenAI": "onnxruntime_genai",
    "llama.cpp": "llama_cpp",
    "transformers": "transformers",
}
OPTIMUM = Path(__file__).parents[1] / ".venv-peers" / "bin" / "python"
BITS = {"fp32": 32, "int8": 8, "int4": 4}


def peer_steps(
    precision: str, config: DecoderConfig, folder: Path, *, rows: list[int], filled: int, capacity: int
) -> Iterator[tuple[str, Steps]]:
    """(name, steps) of each installed peer that has such a precision, as `build_peers` left it in `folder`.

    The steps of a peer, by the number of rows, share its weights.
    """
    size = {"rows": rows, "filled": filled}
    if has("transformers") and precision == "fp32":
        for dtype in (torch.float32, torch.bfloat16):
            name = f"transformers, {str(dtype).removeprefix('torch.')}"
            yield name, transformers_steps(config, dtype, **size)
    if has("OpenVINO"):
        for kind in ("bf16", "f32"):
            yield f"OpenVINO, {precision}, {kind}", openvino_steps(config, BITS[precision], kind, **size)
    if has("ONNX Runtime GenAI") and has("transformers"):
        root = folder / f"genai-{precision}"
        yield f"ONNX Runtime GenAI, {precision}", genai_steps(config, root, capacity=capacity, **size)
    if has("llama.cpp"):
        file = folder / f"{precision}.gguf"
        yield f"llama.cpp, {precision}", llama_cpp_steps(file, capacity=capacity, **size)
    if has("optimum") and has("transformers") and precision == "fp32":
        yield "optimum, fp32", optimum_steps(config, folder / "optimum", **size)


def build_peers(precision: str, config: DecoderConfig, folder: Path) -> None:
    """Write the files of the peers that read a format of their own, unless `folder` has them."""
    genai, optimum, gguf = folder / f"genai-{precision}", folder / "optimum", folder / f"{precision}.gguf"
    if has("llama.cpp") and not gguf.exists():
        write_gguf(config, precision, gguf, tokens=TOKENS, positions=POSITIONS)
    if has("ONNX Runtime GenAI") and has("transformers") and not (genai / "genai_config.json").exists():
        build_genai(precision, folder, random_qwen2(config, folder), genai)
    if has("optimum") and has("transformers") and precision == "fp32" and not optimum.exists():
        module, source = "tests.peers.exporter", random_qwen2(config, folder)
        made = [OPTIMUM, "-m", module, "--source", source.absolute(), "--out", optimum.absolute()]
        subprocess.run(made, cwd=Path(__file__).parents[1], check=True, capture_output=True)


def missing() -> list[str]:
    """The peers that are not installed."""
    return [peer for peer in (*NEEDED, "optimum") if not has(peer)]


def has(peer: str) -> bool:
    """Whether a peer is installed; optimum is in the environment of `make peers`."""
    return OPTIMUM.exists() if peer == "optimum" else importlib.util.find_spec(NEEDED[peer]) is not None


def versions() -> list[str]:
    """Name and version of ONNX Runtime, PyTorch and each peer that is installed."""
    installed = [NEEDED[peer].replace("llama_cpp", "llama_cpp_python") for peer in NEEDED if has(peer)]
    packages = ["onnxruntime", "torch", *installed]
    found = [f"{name.replace('_', '-')} {version(name)}" for name in packages]
    if has("optimum"):
        asked = "from importlib.metadata import version; print('optimum-onnx', version('optimum-onnx'))"
        found.append(subprocess.check_output([OPTIMUM, "-c", asked], text=True).strip())
    return found


def qwen2_config(config: DecoderConfig):
    """The configuration of a `Qwen2` model of the same sizes."""
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=TOKENS,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=config.rms_norm_eps,
        bos_token_id=0,
        eos_token_id=1,
    )


def transformers_steps(config: DecoderConfig, dtype: torch.dtype, *, rows: list[int], filled: int) -> Steps:
    """One new position of `Qwen2Model` in eager mode; the cache is cut back after it."""
    from transformers import DynamicCache, Qwen2Model

    with torch.device("meta"):
        model = Qwen2Model(qwen2_config(config)).to(dtype).eval()
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.rotary_emb = type(model.rotary_emb)(config=model.config)

    def step_of(count: int) -> Callable[[], None]:
        cache = DynamicCache(config=model.config)

        def run(tokens: int) -> None:
            embeds = torch.ones(count, tokens, config.hidden_size, dtype=dtype)
            with torch.inference_mode():
                model(inputs_embeds=embeds, past_key_values=cache, use_cache=True)

        def step() -> None:
            run(1)
            cache.crop(-1)

        run(filled)
        return step

    stored = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" not in name)
    return {count: (step_of(count), stored) for count in rows}


def random_qwen2(config: DecoderConfig, folder: Path) -> Path:
    """The checkpoint of a random `Qwen2` model in `folder`, written on the first call."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

    source = folder / "qwen2"
    if not source.exists():
        Qwen2ForCausalLM(qwen2_config(config)).save_pretrained(source)
        words = Tokenizer(models.WordLevel({str(i): i for i in range(TOKENS)}, unk_token="0"))
        named = {"bos_token": "0", "eos_token": "1", "pad_token": "1"}
        PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(source)
    return source


def build_genai(precision: str, folder: Path, source: Path, root: Path) -> None:
    """Let ONNX Runtime GenAI's builder convert a `Qwen2` model, in blocks of 128 features."""
    build = ["-i", source, "-o", root, "-p", precision, "-e", "cpu", "-c", folder / "cache"]
    build += [] if precision == "fp32" else ["--extra_options", "block_size=128", "accuracy_level=4"]
    module = "onnxruntime_genai.models.builder"
    subprocess.run([sys.executable, "-m", module, *build], check=True, capture_output=True)


def genai_steps(config: DecoderConfig, root: Path, *, rows: list[int], filled: int, capacity: int) -> Steps:
    """One token of ONNX Runtime GenAI's `Generator`."""
    import onnxruntime_genai as genai

    settings = genai.Config(str(root))
    session = {"session_options": {"intra_op_num_threads": os.cpu_count()}}  # by itself it takes one here
    settings.overlay(json.dumps({"model": {"decoder": session}}))
    model = genai.Model(settings)

    def step_of(count: int) -> Callable[[], None]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(batch_size=count, max_length=capacity, min_length=capacity)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.full((count, filled), 7, np.int32))
        generator.generate_next_token()
        return generator.generate_next_token

    tables = 4 * (TOKENS * config.hidden_size + POSITIONS * config.head_dim)  # of which a step reads a row
    stored = sum(file.stat().st_size for file in root.glob("*.data")) - tables
    return {count: (step_of(count), stored) for count in rows}


def optimum_steps(config: DecoderConfig, root: Path, *, rows: list[int], filled: int) -> Steps:
    """One new position of optimum's export on ONNX Runtime, always after the same others."""
    import onnxruntime
    from onnxruntime import OrtValue

    file = root / "model.onnx"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)

    def step_of(count: int) -> Callable[[], object]:
        binding, heads = session.io_binding(), (count, config.num_kv_heads)
        given = {
            "input_ids": np.full((count, 1), 7),
            "attention_mask": np.ones((count, filled + 1), np.int64),
            "position_ids": np.full((count, 1), filled),
        }
        for node in session.get_inputs()[len(given) :]:
            given[node.name] = rng.standard_normal((*heads, filled, config.head_dim), dtype=np.float32)
        for name, array in given.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for node in session.get_outputs():
            caches = (*heads, filled + 1, config.head_dim)
            shape = (count, 1, TOKENS) if node.name == "logits" else caches
            empty = OrtValue.ortvalue_from_shape_and_type(shape, np.float32)
            binding.bind_ortvalue_output(node.name, empty)
        return lambda: session.run_with_iobinding(binding)

    stored = file.stat().st_size - 4 * TOKENS * config.hidden_size  # of the embeddings a step reads a row
    return {count: (step_of(count), stored) for count in rows}
