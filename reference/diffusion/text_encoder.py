"""Gemma-2 as the release runs it: all layers but the last, no final norm, and no soft-capping of attention.

transformers 4.51, with which the release runs, gives Gemma-2 an attention that leaves out the capping which
the configuration asks for; 5.x applies it, and computes another function.

Source: docs/diffusion.md; transformers 4.51.0, models/gemma2/modeling_gemma2.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import rotate_half
from .config import TextEncoderConfig


class ShiftedRMSNorm(nn.Module):
    """x / rms(x) * (1 + weight), computed in float32 whatever the dtype of x."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention, without biases."""

    def __init__(self, config: TextEncoderConfig, *, rotate: Callable):
        super().__init__()
        self.head_dim, self.rotate = config.head_dim, rotate
        self.scale = config.query_scalar**-0.5
        size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads or KV, S, D]
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = self.rotate(query, cos, sin), self.rotate(key, cos, sin)
        attended = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=self.scale, enable_gqa=True
        )
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(gelu(gate(x)) * up(x)) with GELU's tanh form."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=False)
        self.up_proj = nn.Linear(size, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class TextLayer(nn.Module):
    """Attention, then the MLP; each has a norm before it and one after it, inside the residual."""

    def __init__(self, config: TextEncoderConfig, *, rotate: Callable):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = ShiftedRMSNorm(size, eps)
        self.self_attn = Attention(config, rotate=rotate)
        self.post_attention_layernorm = ShiftedRMSNorm(size, eps)
        self.pre_feedforward_layernorm = ShiftedRMSNorm(size, eps)
        self.mlp = MLP(size, config.intermediate_size)
        self.post_feedforward_layernorm = ShiftedRMSNorm(size, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        attended = self.self_attn(self.input_layernorm(x), cos, sin, mask)
        x = x + self.post_attention_layernorm(attended)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class TextRotary(nn.Module):
    """cos and sin of the positions from 0 on.

    The frequencies are a constant of the configuration: checkpoints do not store them, and they keep their
    dtype. `rope_bf16` rounds them, as the release's cast of the whole model does.
    """

    def __init__(self, config: TextEncoderConfig, *, rope_bf16: bool):
        super().__init__()
        self.config, self.rope_bf16 = config, rope_bf16
        for name, value in self.constants().items():
            self.register_buffer(name, value.to(torch.get_default_device()), persistent=False)

    def constants(self) -> dict[str, Tensor]:
        """The values of the buffers on the CPU, even if the module was built on the meta device."""
        size = self.config.head_dim
        exponents = torch.arange(0, size, 2, dtype=torch.int64, device="cpu").float() / size
        frequencies = 1.0 / self.config.rope_theta**exponents
        return {"inv_freq": frequencies.to(torch.bfloat16).float() if self.rope_bf16 else frequencies}

    def _apply(self, fn: Callable, recurse: bool = True) -> TextRotary:
        super()._apply(fn, recurse)
        for name, value in self.constants().items():  # move to another device but never change the dtype
            setattr(self, name, value.to(getattr(self, name).device))
        return self

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """position_ids [B, S] int64 -> cos and sin [B, S, D/2] float32."""
        angles = position_ids.float()[..., None] * self.inv_freq
        return angles.cos(), angles.sin()


class TextEncoder(nn.Module):
    """The residual stream before Gemma's last layer, from rows of its embedding."""

    def __init__(self, config: TextEncoderConfig, *, rope_bf16: bool = True, rotate: Callable = rotate_half):
        super().__init__()
        self.config = config
        self.rotary = TextRotary(config, rope_bf16=rope_bf16)
        self.layers = nn.ModuleList(TextLayer(config, rotate=rotate) for _ in range(config.num_layers))

    def forward(self, inputs_embeds: Tensor, position_ids: Tensor, layers: range | None = None) -> Tensor:
        """inputs_embeds [B, S, H], position_ids [B, S] int64 counting from 0 -> hidden_states [B, S, H].

        The rows have no padding. A token sees those before it and itself. `layers` runs only some of them;
        those that begin with a later one take the residual stream as `inputs_embeds`.
        """
        layers = range(len(self.layers)) if layers is None else layers
        cos, sin = (t.to(inputs_embeds.dtype) for t in self.rotary(position_ids))
        mask = (position_ids[:, None, :] <= position_ids[:, :, None]).unsqueeze(1)  # [B, 1, S, S]
        x = inputs_embeds
        if not layers.start:
            x = (x.float() * math.sqrt(self.config.hidden_size)).to(x.dtype)
        for layer in layers:
            x = self.layers[layer](x, cos, sin, mask)
        return x
