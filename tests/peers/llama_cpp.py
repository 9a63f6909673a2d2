"""A decoder of noise in the format of llama.cpp, and its decode steps through `llama-cpp-python`."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from reference.config import DecoderConfig
from tests.peers import Steps

FORMATS = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}  # blocks of 32 with a scale in fp16


def write_gguf(config: DecoderConfig, precision: str, file: Path, *, tokens: int, positions: int) -> None:
    """Write a `qwen2` model whose products have weights of noise in `precision`."""
    import gguf

    kind = gguf.GGMLQuantizationType[FORMATS[precision]]
    size, inner, kv = config.hidden_size, config.intermediate_size, config.num_kv_heads * config.head_dim
    rng, made = np.random.default_rng(0), file.with_suffix(".part")
    writer = gguf.GGUFWriter(made, "qwen2")
    writer.add_block_count(config.num_layers)
    writer.add_context_length(positions)
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(tokens)

    def add(name: str, rows: int, features: int) -> None:
        noise = rng.standard_normal((rows, features), dtype=np.float32) / features**0.5
        writer.add_tensor(f"{name}.weight", gguf.quantize(noise, kind), raw_dtype=kind)

    for i in range(config.num_layers):
        layer = f"blk.{i}"
        for name, rows in {"attn_q": size, "attn_k": kv, "attn_v": kv}.items():
            add(f"{layer}.{name}", rows, size)
            writer.add_tensor(f"{layer}.{name}.bias", np.zeros(rows, np.float32))
        add(f"{layer}.attn_output", size, size)
        add(f"{layer}.ffn_gate", inner, size)
        add(f"{layer}.ffn_up", inner, size)
        add(f"{layer}.ffn_down", size, inner)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{layer}.{name}.weight", np.ones(size, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(size, np.float32))
    for name in ("token_embd", "output"):
        add(name, tokens, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made.rename(file)


@functools.cache  # llama.cpp keeps its address
def unlogged(api: ModuleType):
    """A receiver of llama.cpp's messages that drops them."""
    return api.llama_log_callback(lambda level, text, data: None)


def llama_cpp_steps(file: Path, *, rows: list[int], filled: int, capacity: int) -> Steps:
    """One new position of each row, which is taken back after it; its head gives logits of each row."""
    import gguf
    import llama_cpp as api

    api.llama_backend_init()
    api.llama_log_set(unlogged(api), ctypes.c_void_p())
    model = api.llama_model_load_from_file(bytes(file), api.llama_model_default_params())

    def step_of(count: int) -> Callable[[], None]:
        given = api.llama_context_default_params()
        given.n_seq_max, given.n_ctx, given.n_batch = count, count * capacity, count * filled
        given.n_threads = given.n_threads_batch = os.cpu_count() or 1
        context = api.llama_init_from_model(model, given)
        memory = api.llama_get_memory(context)

        def batch(positions: range):
            made = api.llama_batch_init(count * len(positions), 0, 1)
            places = [(row, position) for row in range(count) for position in positions]
            made.n_tokens = len(places)
            for i, (row, position) in enumerate(places):
                made.token[i], made.pos[i], made.n_seq_id[i], made.seq_id[i][0] = 7, position, 1, row
                made.logits[i] = position == positions[-1]
            return made

        def run(made) -> None:
            if code := api.llama_decode(context, made):
                raise RuntimeError(f"llama_decode returned {code}")

        run(batch(range(filled)))
        one = batch(range(filled, filled + 1))

        def step() -> None:
            run(one)
            for row in range(count):
                api.llama_memory_seq_rm(memory, row, filled, -1)

        return step

    tensors = gguf.GGUFReader(file).tensors
    stored = sum(int(t.n_bytes) for t in tensors if t.name != "token_embd.weight")  # a row of which is read
    return {count: (step_of(count), stored) for count in rows}
