"""Qwen2.5-VL's text decoder with a static KV cache that is updated in place, used for `base_ar` and
`stacked_ar`.

One forward serves prefill, decode and rewind: new tokens are written to the slots from `write_indices` on in
a cache of fixed capacity, and the mask follows from that index alone. Slots that were never written may hold
anything, even NaN.

Source: docs/star.md 1.1 and 1.2; transformers 4.51.0, models/qwen2_5_vl/modeling_qwen2_5_vl.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DecoderConfig
from .layers import GatedMLP, RMSNorm, rotate_half

Cache = list[tuple[Tensor, Tensor]]  # per layer: key and value, each [B, KV, C, D]


def rotary_frequencies(config: DecoderConfig, *, rope_bf16: bool) -> Tensor:
    """theta^(-2i/D) for i < D/2, float32 [D/2] on the CPU.

    `rope_bf16` rounds them through bfloat16, which is what the released scripts end up computing with
    (docs/star.md 0.2).
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device="cpu").float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return frequencies.to(torch.bfloat16).float() if rope_bf16 else frequencies


class RotaryAngles(nn.Module):
    """Positions on the three axes (time, height, width) -> cos and sin: [3, B, S] int64 -> two of [B, S,
    D/2].

    The first `mrope_section[0]` of the D/2 frequencies turn with time, the next section with height and the
    last with width. Both buffers are constants of the configuration: checkpoints do not store them, and they
    keep their dtypes whatever `.to(dtype)` asks for.
    """

    def __init__(self, config: DecoderConfig, *, rope_bf16: bool):
        super().__init__()
        self.config, self.rope_bf16 = config, rope_bf16
        for name, value in self.constants().items():
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def constants(self) -> dict[str, Tensor]:
        """The values of the buffers on the CPU, even if the module was built on the meta device."""
        axis_of_dim = [axis for axis, dims in enumerate(self.config.mrope_section) for _ in range(dims)]
        return {
            "inv_freq": rotary_frequencies(self.config, rope_bf16=self.rope_bf16),
            "axis_of_dim": torch.tensor(axis_of_dim, dtype=torch.int64, device="cpu"),
        }

    def _apply(self, fn: Callable, recurse: bool = True) -> RotaryAngles:
        super()._apply(fn, recurse)
        for name, value in self.constants().items():  # move to another device but never change the dtype
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        positions = position_ids.float().index_select(0, self.axis_of_dim)  # [D/2, B, S]
        angles = positions.permute(1, 2, 0) * self.inv_freq  # [B, S, D/2]
        return angles.cos(), angles.sin()


def kv_cache_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    write_indices: Tensor,
    mask: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Write S new keys and values into the cache in place, then attend to the slots that the mask shows.

    query [B, heads, S, D], key and value [B, KV, S, D], past_key and past_value [B, KV, C, D], write_indices
    [B] int64, mask [B, 1, S, C] bool -> (output [B, heads, S, D], past_key, past_value). Raises IndexError if
    the new tokens exceed the capacity.
    """
    rows = torch.arange(query.shape[0], device=query.device)[:, None]  # [B, 1]
    slots = write_indices[:, None] + torch.arange(query.shape[2], device=query.device)  # [B, S]
    past_key[rows, :, slots] = key.transpose(1, 2)
    past_value[rows, :, slots] = value.transpose(1, 2)
    seen = mask.any(dim=2).unsqueeze(-1)  # [B, 1, C, 1]: a masked weight of 0 times NaN would still be NaN
    output = F.scaled_dot_product_attention(
        query, past_key.where(seen, 0), past_value.where(seen, 0), attn_mask=mask, enable_gqa=True
    )
    return output, past_key, past_value


class Attention(nn.Module):
    """Grouped-query attention over the cache, with bias on q, k and v and none on the output."""

    def __init__(self, config: DecoderConfig, *, attention: Callable, rotate: Callable):
        super().__init__()
        self.head_dim, self.attention, self.rotate = config.head_dim, attention, rotate
        size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size)
        self.k_proj = nn.Linear(config.hidden_size, kv_size)
        self.v_proj = nn.Linear(config.hidden_size, kv_size)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: tuple[Tensor, Tensor],
        write_indices: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads or KV, S, D]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        output, *present = self.attention(query, key, value, *past, write_indices, mask)
        return self.o_proj(output.transpose(1, 2).flatten(2)), tuple(present)


class DecoderLayer(nn.Module):
    """A pre-norm residual block: attention, then SwiGLU."""

    def __init__(self, config: DecoderConfig, *, attention: Callable, rotate: Callable):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, attention=attention, rotate=rotate)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, bias=False)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        past: tuple[Tensor, Tensor],
        write_indices: Tensor,
        mask: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, past, write_indices, mask)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x)), present


class Decoder(nn.Module):
    """Decoder layers and the final norm, without embedding or head."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        rope_bf16: bool = True,
        attention: Callable = kv_cache_attention,
        rotate: Callable = rotate_half,
    ):
        super().__init__()
        self.config = config
        self.rotary = RotaryAngles(config, rope_bf16=rope_bf16)
        self.layers = nn.ModuleList(
            DecoderLayer(config, attention=attention, rotate=rotate) for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        write_indices: Tensor,
        past: Cache,
        layers: range | None = None,
    ) -> tuple[Tensor, Cache]:
        """One step of S tokens, through all layers or only some consecutive `layers`.

        inputs_embeds [B, S, H], position_ids [3, B, S] int64, write_indices [B] int64 (the slot of each row's
        first new token), past: key and value [B, KV, C, D] per layer, updated in place -> (hidden_states [B,
        S, H] after the final norm, present: the same tensors as past). All slots below the write index must
        have been written before. With `layers`, `past` holds their caches only, the residual stream comes in
        as inputs_embeds, and it goes out without the final norm unless the last layer is among them.
        """
        layers = layers or range(len(self.layers))
        cos, sin = (t.to(inputs_embeds.dtype) for t in self.rotary(position_ids))
        device = inputs_embeds.device
        last_visible = write_indices[:, None] + torch.arange(inputs_embeds.shape[1], device=device)  # [B, S]
        slots = torch.arange(past[0][0].shape[2], device=device)  # [C]
        mask = (slots <= last_visible[..., None]).unsqueeze(1)  # [B, 1, S, C]
        hidden_states, present = inputs_embeds, []
        for layer, layer_past in zip(layers, past, strict=True):
            hidden_states, layer_present = self.layers[layer](
                hidden_states, cos, sin, layer_past, write_indices, mask
            )
            present.append(layer_present)
        return self.norm(hidden_states) if layers.stop == len(self.layers) else hidden_states, present

    def new_cache(self, rows: int, *, capacity_tokens: int) -> Cache:
        """A zero cache for every layer, with the dtype and device of the weights."""
        shape = (rows, self.config.num_kv_heads, capacity_tokens, self.config.head_dim)
        return [(self.norm.weight.new_zeros(shape), self.norm.weight.new_zeros(shape)) for _ in self.layers]
