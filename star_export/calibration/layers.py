"""Calibrate one layer of a decoder: its linear weights, in the order in which inputs pass through them.

Each weight is quantised for the inputs that the weights before it, quantised already, give it; its products
are to be those that the checkpoint's layer computes of the inputs without any rounding. So two streams of the
examples pass each layer once, ours and the exact one, and a model of any size needs the memory of one layer.
"""

from __future__ import annotations

import contextlib
import copy
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
GROUPS = (  # linear weights that share inputs, and the norm that these come from
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.o_proj",), None),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.down_proj",), None),
)


@dataclass
class Calibrated:
    """What a layer became, by the names of its weights: codes, norms with any scales folded in, and errors.

    `errors` are mean squares of the change of a weight's products over those of the products, which are those
    wanted of its inputs: as stored, and what rounding to nearest would give.
    """

    encoded: dict[str, Encoded] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def calibrate_layer(
    decoder: Decoder, layer: int, stream: Sequence[Example], *, prefix: str, precision: Precision
) -> tuple[Calibrated, list[Example]]:
    """Quantise the weights of one layer, named from `prefix` on, and pass the stream through it.

    `stream` is what the layer before handed on. Returns what the layer became, and what it hands on, with
    `exact` numbers beside ours. Afterwards the layer in memory has the weights that are stored, as new
    parameters, because the old ones may be those of a memory-mapped file. Raises SingularError.
    """
    block = cast(DecoderLayer, decoder.layers[layer])
    found, as_it_was = Calibrated(), copy.deepcopy(block, {id(p): p for p in block.parameters()})
    _round_dense(block, prefix, precision)
    blocks, streams = (block, as_it_was), both_streams(stream)
    ours, exact = (_passed(decoder, b, x, stream) for b, x in zip(blocks, streams, strict=True))
    for linears, norm in GROUPS:
        rows = rows_of(next(ours)), rows_of(next(exact))
        _quantise(found, block, linears, norm, *rows, prefix=prefix, precision=precision)
        del rows
    return found, _handed_on(stream, next(ours), next(exact))


def both_streams(stream: Sequence[Example]) -> tuple[list[Tensor], list[Tensor]]:
    """The examples as the layers before made them, and as they are without any rounding: [B, L, H] each."""
    return [e.embeds for e in stream], [e.embeds if e.exact is None else e.exact for e in stream]


def through_norm(
    norm: nn.Module, stream: Sequence[Example], *, prefix: str, precision: Precision
) -> list[Example]:
    """Pass the stream through `norm`, the last of a decoder: ours as it is stored, which it then is."""
    ours, exact = both_streams(stream)
    exact = [norm(x) for x in exact]
    _round_dense(norm, prefix, precision)
    return _handed_on(stream, [norm(x) for x in ours], exact)


def _handed_on(stream: Sequence[Example], ours: list[Tensor], exact: list[Tensor]) -> list[Example]:
    return [Example(x, e.positions, e.image, y) for e, x, y in zip(stream, ours, exact, strict=True)]


def _round_dense(module: nn.Module, prefix: str, precision: Precision) -> None:
    """Give `module` those of its parameters as they are stored that no format is for: norms and biases."""
    for name, parameter in list(module.named_parameters()):
        if precision.format_of(f"{prefix}.{name}", tuple(parameter.shape)) is None:
            owner, _, key = name.rpartition(".")
            stored = precision.rounded(f"{prefix}.{name}", parameter)
            setattr(module.get_submodule(owner), key, nn.Parameter(stored, requires_grad=False))


def _passed(
    decoder: Decoder, block: DecoderLayer, given: list[Tensor], stream: Sequence[Example]
) -> Iterator[list[Tensor]]:
    """The inputs of each of GROUPS for every example of `given`, and at last the outputs of `block`.

    Each is computed when it is asked for, with the weights that `block` has by then.
    """
    attention, mlp = block.self_attn, block.mlp
    yield [block.input_layernorm(x) for x in given]
    with _without(attention, "o_proj"):
        inputs = [_attended(decoder, block, x, e) for x, e in zip(given, stream, strict=True)]
    yield inputs
    given = [x + attention.o_proj(y) for x, y in zip(given, inputs, strict=True)]
    del inputs
    yield [block.post_attention_layernorm(x) for x in given]
    with _without(mlp, "down_proj"):
        inputs = [mlp(block.post_attention_layernorm(x)) for x in given]
    yield inputs
    yield [x + mlp.down_proj(y) for x, y in zip(given, inputs, strict=True)]


def _quantise(
    found: Calibrated,
    block: DecoderLayer,
    linears: Sequence[str],
    norm: str | None,
    inputs: Tensor,
    exact: Tensor,
    *,
    prefix: str,
    precision: Precision,
) -> None:
    """Quantise linear layers of `block` that share `inputs` [n, K], for the products of the `exact` ones.

    Scales of channels are folded into `norm`, if the inputs come from one and no layer stays dense or
    multiplies by rounded activations, which were rounded otherwise then.
    """
    names = {f"{prefix}.{name}.weight": cast(nn.Linear, block.get_submodule(name)) for name in linears}
    formats = {n: precision.format_of(n, tuple(m.weight.shape)) for n, m in names.items()}
    chosen = {name: format for name, format in formats.items() if format}
    dtype = precision.torch_dtype
    before = None if norm is None else block.get_submodule(norm)
    if before is not None:
        found.norms[f"{prefix}.{norm}.weight"] = cast(Tensor, before.weight)
    if not chosen:
        return
    moments = moments_of(inputs)
    feedback = feedback_of(moments)
    weights = wanted([names[name].weight for name in chosen], inputs, exact, feedback)
    folded = len(chosen) == len(names) and not any(format.scale for format in chosen.values())
    if before is not None and folded:
        exponents = channel_exponents(weights, feedback.power, next(iter(chosen.values())), dtype)
        factors = exponents.float().exp2()
        before.weight = nn.Parameter(cast(Tensor, before.weight) / factors, requires_grad=False)
        found.norms[f"{prefix}.{norm}.weight"] = before.weight
        moments, feedback = moments / factors / factors[:, None], feedback.scaled(factors)
        weights = [weight * factors for weight in weights]
    for name, weight in zip(chosen, weights, strict=True):
        stored = quantise(found, name, weight, moments, feedback, chosen[name], precision)
        names[name].weight = nn.Parameter(stored, requires_grad=False)


def wanted(weights: Sequence[Tensor], inputs: Tensor, exact: Tensor, feedback: Feedback) -> list[Tensor]:
    """Weights [rows, K] whose products with `inputs` [n, K] are nearly those of `weights` with `exact` ones.

    The layers before have been rounded, so a weight W meets inputs X where it would meet Y. Of all weights,
    W + W (Y - X)^T X (X^T X)^-1 gives the products nearest to those of W with Y, and rounding it for X loses
    what it would have lost of W. n / (n + K) of this is added, since n inputs tell K numbers only so well.

    Source: Li et al., GPTAQ, 2025 (arXiv 2504.02692), which does both column by column.
    """
    counts, (known, features) = [len(weight) for weight in weights], inputs.shape
    stacked, off = torch.cat([weight.float() for weight in weights]), exact - inputs
    fewer = len(stacked) < features  # of two orders of the same product, the one that takes less
    cross = (off @ stacked.T).T @ inputs if fewer else stacked @ (off.T @ inputs)
    return list((stacked + feedback.solved(cross.div_(known + features))).split(counts))


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


def rows_of(inputs: Sequence[Tensor]) -> Tensor:
    """Inputs [..., K] as rows [n, K], evenly spaced ones if there are too many (OPERATIONS)."""
    total, size = sum(x[..., 0].numel() for x in inputs), inputs[0].shape[-1]
    every = max(1, math.ceil(total * size**2 / OPERATIONS))
    return torch.cat([x.flatten(0, -2)[::every] for x in inputs])


def moments_of(rows: Tensor) -> Tensor:
    """The second moments [K, K] of rows [n, K]."""
    return (rows.T @ rows).div_(len(rows))


def _attended(decoder: Decoder, block: DecoderLayer, x: Tensor, example: Example) -> Tensor:
    """The attention of x [B, L, H], before its last projection."""
    config, (rows, length, _) = decoder.config, x.shape
    cos, sin = decoder.rotary(example.positions)
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(rows, 1, -1, -1)
    shape = (rows, config.num_kv_heads, length, config.head_dim)
    past = torch.zeros(shape), torch.zeros(shape)
    normed = block.input_layernorm(x)
    return block.self_attn(normed, cos, sin, past, torch.zeros(rows, dtype=torch.int64), mask)[0]


@contextlib.contextmanager
def _without(module: nn.Module, name: str) -> Iterator[None]:
    """Let the module `name` of `module` return its input during the block."""
    whole = getattr(module, name)
    setattr(module, name, nn.Identity())
    try:
        yield
    finally:
        setattr(module, name, whole)
