"""Calibrate one layer of a decoder: its linear weights, in the order in which inputs pass through them.

Each weight is quantised for the inputs that the weights before it, quantised already, give it. So the stream
of the examples passes each layer once, and a model of any size needs the memory of one layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from reference.decoder import Decoder, DecoderLayer

from ..graph.formats import Encoded, Format
from ..graph.precisions import Precision
from .examples import Example
from .folding import channel_exponents
from .gptq import Feedback, error_of, feedback_of, quantised

OPERATIONS = 5e11  # of the moments of a weight, which limits the inputs that they are taken from


@dataclass
class Calibrated:
    """What a layer became, by the names of its weights: codes, norms with any scales folded in, and errors.

    `errors` are mean squares of the change of a weight's products over those of the products: as stored, and
    what rounding to nearest would give.
    """

    encoded: dict[str, Encoded] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def calibrate_layer(
    decoder: Decoder, layer: int, stream: Sequence[Example], *, prefix: str, precision: Precision
) -> tuple[Calibrated, list[Tensor]]:
    """Quantise the weights of one layer, named from `prefix` on, and pass the stream through it.

    `stream` is what the layer before handed on. Returns what the layer became, and its outputs [B, L, H] for
    each example. Afterwards the layer in memory has the linear weights that are stored, as new parameters,
    because the old ones may be those of a memory-mapped file. Raises SingularError.
    """
    block = cast(DecoderLayer, decoder.layers[layer])
    found, attention, mlp = Calibrated(), block.self_attn, block.mlp
    work = _Work(found, prefix, precision)
    streams = [example.embeds for example in stream]

    inputs = [block.input_layernorm(x) for x in streams]
    projections = {f"self_attn.{name}": getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")}
    inputs = work.quantise(projections, inputs, norm=("input_layernorm", block.input_layernorm))
    with _without(attention, "o_proj"):
        inputs = [_attended(decoder, block, x, example) for x, example in zip(inputs, stream, strict=True)]
    work.quantise({"self_attn.o_proj": attention.o_proj}, inputs)
    streams = [x + attention.o_proj(y) for x, y in zip(streams, inputs, strict=True)]

    inputs = [block.post_attention_layernorm(x) for x in streams]
    both = {"mlp.gate_proj": mlp.gate_proj, "mlp.up_proj": mlp.up_proj}
    norm = "post_attention_layernorm", block.post_attention_layernorm
    inputs = work.quantise(both, inputs, norm=norm)
    with _without(mlp, "down_proj"):
        inputs = [mlp(x) for x in inputs]
    work.quantise({"mlp.down_proj": mlp.down_proj}, inputs)
    return found, [x + mlp.down_proj(y) for x, y in zip(streams, inputs, strict=True)]


@dataclass
class _Work:
    found: Calibrated
    prefix: str
    precision: Precision

    def quantise(
        self, linears: dict[str, nn.Linear], inputs: list[Tensor], norm: tuple[str, nn.Module] | None = None
    ) -> list[Tensor]:
        """Quantise linear layers that share `inputs`, and return the inputs that they then take.

        Scales of channels are folded into `norm`, if the inputs come from one and no layer stays dense or
        multiplies by rounded activations, which were rounded otherwise then.
        """
        names = {f"{self.prefix}.{name}.weight": linear for name, linear in linears.items()}
        formats = {n: self.precision.format_of(n, tuple(m.weight.shape)) for n, m in names.items()}
        chosen = {name: found for name, found in formats.items() if found}
        dtype = self.precision.torch_dtype
        if norm is not None:
            self.found.norms[f"{self.prefix}.{norm[0]}.weight"] = cast(Tensor, norm[1].weight)
        if not chosen:
            return inputs
        moments = moments_of(inputs)
        feedback = feedback_of(moments)
        folded = len(chosen) == len(names) and not any(found.scale for found in chosen.values())
        if norm is not None and folded:
            weights = [names[name].weight for name in chosen]
            exponents = channel_exponents(weights, feedback.power, next(iter(chosen.values())), dtype)
            factors = exponents.float().exp2()
            weight = cast(Tensor, norm[1].weight) / factors
            norm[1].weight = nn.Parameter(weight, requires_grad=False)
            self.found.norms[f"{self.prefix}.{norm[0]}.weight"] = weight
            inputs = [x / factors for x in inputs]
            moments, feedback = moments / factors / factors[:, None], feedback.scaled(factors)
            for linear in names.values():
                linear.weight = nn.Parameter(linear.weight * factors, requires_grad=False)
        for name, linear in names.items():
            if (format := chosen.get(name)) is None:
                continue
            stored = quantise(self.found, name, linear.weight, moments, feedback, format, self.precision)
            linear.weight = nn.Parameter(stored, requires_grad=False)
        return inputs


def quantise(
    found: Calibrated,
    name: str,
    weight: Tensor,
    moments: Tensor,
    feedback: Feedback,
    format: Format,
    precision: Precision,
) -> Tensor:
    """Add the codes of a weight to `found`, and return what they stand for."""
    dtype = precision.torch_dtype
    encoded = quantised(weight, feedback, format, dtype)
    stored, nearest = encoded.decode(), format.rounded(weight, dtype)
    found.encoded[name] = encoded
    found.errors[name] = error_of(weight, stored, moments), error_of(weight, nearest, moments)
    return stored


def moments_of(inputs: Sequence[Tensor]) -> Tensor:
    """Second moments [K, K] of inputs [..., K], evenly spaced ones if there are too many (OPERATIONS)."""
    total, size = sum(x[..., 0].numel() for x in inputs), inputs[0].shape[-1]
    every = max(1, math.ceil(total * size**2 / OPERATIONS))
    moments, count = torch.zeros(size, size), 0
    for x in inputs:
        rows = x.flatten(0, -2)[::every]
        moments.addmm_(rows.T, rows)
        count += len(rows)
    return moments.div_(count)


def _attended(decoder: Decoder, block: DecoderLayer, x: Tensor, example: Example) -> Tensor:
    """The attention of normed inputs x [B, L, H], before its last projection."""
    config, (rows, length, _) = decoder.config, x.shape
    cos, sin = decoder.rotary(example.positions)
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
    shape = (rows, config.num_kv_heads, length, config.head_dim)
    past = torch.zeros(shape), torch.zeros(shape)
    return block.self_attn(x, cos, sin, past, torch.zeros(rows, dtype=torch.int64), mask)[0]


@contextlib.contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """Let the module `name` of `module` return its input during the block."""
    whole = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, whole)
