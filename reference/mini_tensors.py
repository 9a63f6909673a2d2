"""The miniature checkpoint's tensors: their sizes, and each as a function of its name and shape alone.

`tests/golden/` holds what the official code computes on these tensors, so the bytes must not change.
"""

from __future__ import annotations

import math
import zlib

import numpy as np

HIDDEN, LAYERS, STACKED_LAYERS, HEADS, KV_HEADS, INTERMEDIATE = 64, 4, 2, 4, 2, 160
HEAD_DIM = HIDDEN // HEADS
VOCAB = 151_936
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 112,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
    "out_hidden_size": HIDDEN,
    "hidden_act": "silu",
    "in_chans": 3,
    "spatial_patch_size": 14,
    "tokens_per_second": 2,
}
VQ_CH, VQ_CH_MULT, VQ_HEADS, RES_BLOCKS, Z_CHANNELS = 32, [1, 2, 2, 4, 8], 8, 2, 32
CODEBOOK_SIZE, CODEBOOK_DIM, IMAGE_TOKENS = 1024, 16, 16

Shapes = dict[str, tuple[int, ...]]


def state_dicts() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """STAR's state dict with the base model under `llm.`, and the VQ model's, with the release's names."""
    embedding = (VOCAB, HIDDEN)
    star = (
        {"llm.model." + name: shape for name, shape in decoder_shapes(LAYERS).items()}
        | {"llm.model.embed_tokens.weight": embedding, "llm.lm_head.weight": embedding}
        | {"llm.visual." + name: shape for name, shape in vision_shapes().items()}
        | {"stacked_ar.model." + name: shape for name, shape in decoder_shapes(STACKED_LAYERS).items()}
        | linear("pixel_adapter.layers.0", HIDDEN, CODEBOOK_DIM)
        | linear("pixel_adapter.layers.2", HIDDEN, HIDDEN)
        | linear("pixel_output_head", CODEBOOK_SIZE, HIDDEN)
    )
    vq = {name: tensor("pixel_encoder." + name, shape) for name, shape in vq_shapes().items()}
    vq["quantize.codebook_used"] = np.zeros(65_536, np.float32)
    return {name: tensor(name, shape) for name, shape in star.items()}, vq


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Noise determined by name and shape: float32, or float64 if a fan-in scales it, as when the golden
    arrays were recorded."""
    rng = np.random.Generator(np.random.Philox(zlib.crc32(name.encode())))
    noise = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("bias"):
        return 0.05 * noise
    if len(shape) == 1:  # the gain of a norm
        return 1 + 0.1 * noise
    if name.endswith(("quantize.embedding.weight", "embed_tokens.weight")):
        return noise * (0.5 if "quantize" in name else 1.0)
    if name.startswith("pixel_output_head") or name.endswith("lm_head.weight"):
        noise = 3.0 * noise
    return noise.astype(np.float64) / math.sqrt(math.prod(shape[1:]))


def linear(prefix: str, outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {prefix + ".weight": (outputs, inputs)} | ({prefix + ".bias": (outputs,)} if bias else {})


def decoder_shapes(layers: int) -> Shapes:
    shapes: Shapes = {"norm.weight": (HIDDEN,)}
    for i in range(layers):
        p, kv_size = f"layers.{i}.", KV_HEADS * HEAD_DIM
        shapes |= {p + "input_layernorm.weight": (HIDDEN,), p + "post_attention_layernorm.weight": (HIDDEN,)}
        shapes |= linear(p + "self_attn.q_proj", HIDDEN, HIDDEN)
        shapes |= linear(p + "self_attn.o_proj", HIDDEN, HIDDEN, bias=False)
        for name in ("k_proj", "v_proj"):
            shapes |= linear(p + "self_attn." + name, kv_size, HIDDEN)
        for name in ("gate_proj", "up_proj"):
            shapes |= linear(p + "mlp." + name, INTERMEDIATE, HIDDEN, bias=False)
        shapes |= linear(p + "mlp.down_proj", HIDDEN, INTERMEDIATE, bias=False)
    return shapes


def vision_shapes() -> Shapes:
    size, hidden, merged = VISION["hidden_size"], VISION["intermediate_size"], VISION["hidden_size"] * 4
    shapes: Shapes = {"patch_embed.proj.weight": (size, 3, 2, 14, 14), "merger.ln_q.weight": (size,)}
    for i in range(VISION["depth"]):
        p = f"blocks.{i}."
        shapes |= {p + "norm1.weight": (size,), p + "norm2.weight": (size,)}
        shapes |= linear(p + "attn.qkv", 3 * size, size) | linear(p + "attn.proj", size, size)
        shapes |= linear(p + "mlp.gate_proj", hidden, size) | linear(p + "mlp.up_proj", hidden, size)
        shapes |= linear(p + "mlp.down_proj", size, hidden)
    return shapes | linear("merger.mlp.0", merged, merged) | linear("merger.mlp.2", HIDDEN, merged)


def conv(prefix: str, outputs: int, inputs: int, kernel: int) -> Shapes:
    return {prefix + ".weight": (outputs, inputs, kernel, kernel), prefix + ".bias": (outputs,)}


def norm(prefix: str, channels: int) -> Shapes:
    return {prefix + ".weight": (channels,), prefix + ".bias": (channels,)}


def res_block(prefix: str, inputs: int, outputs: int) -> Shapes:
    shapes = norm(prefix + ".norm1", inputs) | conv(prefix + ".conv1", outputs, inputs, 3)
    shapes |= norm(prefix + ".norm2", outputs) | conv(prefix + ".conv2", outputs, outputs, 3)
    return shapes | (conv(prefix + ".nin_shortcut", outputs, inputs, 1) if inputs != outputs else {})


def attention_block(prefix: str, channels: int) -> Shapes:
    shapes = norm(prefix + ".norm", channels)
    for name in ("q", "k", "v", "proj_out"):
        shapes |= conv(f"{prefix}.{name}", channels, channels, 1)
    return shapes


def vq_shapes() -> Shapes:
    widths = [VQ_CH * m for m in VQ_CH_MULT]
    shapes: Shapes = {"quantize.embedding.weight": (CODEBOOK_SIZE, CODEBOOK_DIM)}
    shapes |= conv("quant_conv", CODEBOOK_DIM, Z_CHANNELS, 1)
    shapes |= conv("post_quant_conv", Z_CHANNELS, CODEBOOK_DIM, 1)
    shapes |= conv("encoder.conv_in", VQ_CH, 3, 3) | conv("encoder.conv_out", Z_CHANNELS, widths[-1], 3)
    shapes |= conv("decoder.conv_in", widths[-1], Z_CHANNELS, 3) | conv("decoder.conv_out", 3, widths[0], 3)
    shapes |= norm("encoder.norm_out", widths[-1]) | norm("decoder.norm_out", widths[0])
    down, up = [VQ_CH, *widths], [widths[-1], *reversed(widths)]
    shapes |= levels("encoder", down, blocks=RES_BLOCKS, attended=len(widths) - 1, resample="downsample")
    shapes |= levels("decoder", up, blocks=RES_BLOCKS + 1, attended=0, resample="upsample")
    for half in ("encoder", "decoder"):
        shapes |= res_block(half + ".mid.0", widths[-1], widths[-1])
        shapes |= res_block(half + ".mid.2", widths[-1], widths[-1])
        shapes |= attention_block(half + ".mid.1", widths[-1])
    return shapes


def levels(half: str, widths: list[int], *, blocks: int, attended: int, resample: str) -> Shapes:
    """The resolutions of one half. `widths` starts with the incoming channels; level `attended` has
    attention."""
    shapes: Shapes = {}
    for level, (inputs, outputs) in enumerate(zip(widths, widths[1:])):
        p = f"{half}.conv_blocks.{level}"
        for block in range(blocks):
            shapes |= res_block(f"{p}.res.{block}", outputs if block else inputs, outputs)
            shapes |= attention_block(f"{p}.attn.{block}", outputs) if level == attended else {}
        if level < len(widths) - 2:
            shapes |= conv(f"{p}.{resample}.conv", outputs, outputs, 3)
    return shapes
