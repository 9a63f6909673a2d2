"""Layers that the decoders and the vision encoder share: RMS norm, gated MLP, rotary embedding by halves."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32 whatever the dtype of x: [..., size] -> [..., size]."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)), without bias in the decoders and with bias in the vision
    encoder."""

    def __init__(self, size: int, hidden: int, *, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden, bias=bias)
        self.up_proj = nn.Linear(size, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply a rotary embedding in which dimension d pairs with d + D/2 (not interleaved).

    x [B, heads, S, D], cos and sin [B, S, D/2] -> [B, heads, S, D].
    """
    first, second = x.chunk(2, dim=-1)  # [B, heads, S, D/2]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # [B, 1, S, D/2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
