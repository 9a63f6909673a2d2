"""A calibrated layer: what is stored of it, what it hands on, and that others are left alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from reference.config import DecoderConfig
from reference.decoder import Decoder
from star_export.calibration.examples import Example
from star_export.calibration.gptq import SingularError, feedback_of, quantised
from star_export.calibration.layers import calibrate_layer, moments_of, rows_of, through_norm, wanted
from star_export.graph.formats import INT8
from star_export.graph.precisions import PRECISIONS, Precision

CONFIG = DecoderConfig(
    num_layers=2,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    mrope_section=(2, 3, 3),
    max_positions=4096,
)
PREFIX = "base_ar.layers.0"
LINEARS = {
    *(f"{PREFIX}.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"{PREFIX}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}
BIASES = {f"{PREFIX}.self_attn.{name}_proj.bias" for name in "qkv"}
NORMS = {f"{PREFIX}.{name}_layernorm.weight" for name in ("input", "post_attention")}


def decoder(dtype: torch.dtype = torch.bfloat16) -> Decoder:
    """Its weights are numbers of `dtype`, in float32."""
    made, generator = Decoder(CONFIG).requires_grad_(False), torch.Generator().manual_seed(0)
    for name, parameter in made.named_parameters():
        near = 1.0 if "norm" in name else 0.0
        parameter.copy_((near + torch.randn(parameter.shape, generator=generator) / 8).to(dtype))
    return made


def stream(seed: int = 1) -> list[Example]:
    """Two rows of 40 positions and one of 24, with a few strong channels, as trained models have them."""
    generator, strength = torch.Generator().manual_seed(seed), torch.ones(64)
    strength[::20] = 20.0
    return [
        Example(
            torch.randn(rows, length, 64, generator=generator) * strength,
            torch.arange(length).expand(3, rows, -1),
            image=rows == 2,
        )
        for rows, length in ((2, 40), (1, 24))
    ]


def passed(model: Decoder, example: Example) -> Tensor:
    """What the layer computes as the reference runs it."""
    rows, length, _ = example.embeds.shape
    cache = model.new_cache(rows, capacity_tokens=length)[:1]
    return model(
        example.embeds,
        example.positions,
        torch.zeros(rows, dtype=torch.int64),
        cache,
        range(1),
    )[0]


@pytest.fixture(params=["int8", "int4"])
def precision(request: pytest.FixtureRequest) -> Precision:
    return PRECISIONS[request.param]


def test_the_layer_that_hands_on_has_the_weights_that_are_stored(precision: Precision) -> None:
    model = decoder()
    found, handed_on = calibrate_layer(model, 0, stream(), prefix=PREFIX, precision=precision)
    assert found.encoded.keys() == found.errors.keys() == LINEARS and found.norms.keys() == NORMS
    weights = {f"base_ar.{name}": value for name, value in model.named_parameters()}
    for name, encoded in found.encoded.items():
        format = precision.format_of(name, tuple(weights[name].shape))
        assert torch.equal(weights[name], encoded.decode()) and encoded.scales.dtype == torch.bfloat16
        assert format.bottom <= int(encoded.codes.min()) and int(encoded.codes.max()) <= format.top
    for name, norm in found.norms.items():
        assert torch.equal(weights[name], norm)
    for output, example in zip(handed_on, stream(), strict=True):
        torch.testing.assert_close(output.embeds, passed(model, example), rtol=0, atol=1e-4)
        torch.testing.assert_close(output.exact, passed(decoder(), example), rtol=0, atol=1e-4)


def test_less_is_lost_than_by_rounding_to_nearest(precision: Precision) -> None:
    model, exact = decoder(), decoder()
    found, handed_on = calibrate_layer(model, 0, stream(), prefix=PREFIX, precision=precision)
    assert all(0 < stored < nearest for stored, nearest in found.errors.values())
    rounded = decoder()
    for name, parameter in rounded.named_parameters():
        if f"base_ar.{name}" in LINEARS:
            parameter.copy_(precision.rounded(f"base_ar.{name}", parameter))

    def off(got: list[Tensor]) -> float:
        pairs = zip(got, (passed(exact, example) for example in stream()), strict=True)
        return sum(float((a - b).square().sum()) for a, b in pairs)

    assert off([output.embeds for output in handed_on]) < 0.7 * off(
        [passed(rounded, example) for example in stream()]
    )


def test_norms_and_biases_are_met_as_they_are_stored(precision: Precision) -> None:
    model, exact = decoder(torch.float32), decoder(torch.float32)
    found, (output, _) = calibrate_layer(model, 0, stream(), prefix=PREFIX, precision=precision)
    for name, norm in found.norms.items():
        assert torch.equal(norm, norm.bfloat16().float()), name
    bias = exact.layers[0].self_attn.q_proj.bias
    assert not torch.equal(bias, bias.bfloat16().float())
    assert torch.equal(model.layers[0].self_attn.q_proj.bias, bias.bfloat16().float())
    torch.testing.assert_close(output.embeds, passed(model, stream()[0]), rtol=0, atol=1e-4)
    torch.testing.assert_close(output.exact, passed(exact, stream()[0]), rtol=0, atol=1e-4)


def test_a_decoders_last_norm_is_passed_by_ours_as_stored_and_by_the_exact_one_as_it_was() -> None:
    norm, example = decoder(torch.float32).norm, stream()[0]
    before = norm(example.embeds)
    given = [Example(2 * example.embeds, example.positions, True, example.embeds)]
    (output,) = through_norm(norm, given, prefix="base_ar.norm", precision=PRECISIONS["int8"])
    assert torch.equal(norm.weight, norm.weight.bfloat16().float()) and output.image
    assert torch.equal(output.exact, before) and torch.equal(output.embeds, norm(2 * example.embeds))
    assert not torch.equal(norm(example.embeds), before)


@pytest.mark.parametrize("rows", [8, 200], ids=["fewer rows than features", "more"])
def test_the_wanted_weights_are_the_nearest_ones_by_least_squares(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("star_export.calibration.gptq.DAMPING", 1e-6)
    generator = torch.Generator().manual_seed(2)
    exact = rows_of([example.embeds for seed in range(4) for example in stream(seed)])
    share = len(exact) / (len(exact) + 64)
    inputs = exact + 0.3 * torch.randn(exact.shape, generator=generator)
    weights = [torch.randn(count, 64, generator=generator) for count in (rows, 3)]
    got = wanted(weights, inputs, exact, feedback_of(moments_of(inputs)))
    for weight, found in zip(weights, got, strict=True):
        best = torch.linalg.lstsq(inputs, exact @ weight.T).solution.T
        torch.testing.assert_close(found, weight + share * (best - weight), rtol=0, atol=2e-3)
        assert float((best - weight).abs().max()) > 0.05


def test_a_layer_takes_back_what_the_ones_before_it_lost(precision: Precision) -> None:
    """As far as it follows from the inputs; on examples that it was not calibrated on."""
    lost = 1 + 0.2 * torch.randn(64, generator=torch.Generator().manual_seed(3))

    def examples(*seeds: int) -> list[Example]:
        exact = [example for seed in seeds for example in stream(seed)]
        return [replace(example, embeds=example.embeds * lost, exact=example.embeds) for example in exact]

    taken_back, not_taken = decoder(), decoder()
    calibrate_layer(taken_back, 0, examples(*range(20)), prefix=PREFIX, precision=precision)
    blind = [replace(example, exact=None) for example in examples(*range(20))]
    calibrate_layer(not_taken, 0, blind, prefix=PREFIX, precision=precision)

    def off(model: Decoder) -> float:
        pairs = ((e, replace(e, embeds=e.exact)) for e in examples(*range(50, 60)))
        changes = (queries(model, ours) - queries(decoder(), exact) for ours, exact in pairs)
        return sum(float(change.square().sum()) for change in changes)

    def queries(model: Decoder, example: Example) -> Tensor:
        layer = model.layers[0]
        return layer.self_attn.q_proj(layer.input_layernorm(example.embeds))

    assert off(taken_back) < 0.7 * off(not_taken)


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_floats_lose_less_than_by_rounding_too_and_norms_before_nvfp4_are_left_alone(name: str) -> None:
    model = decoder()
    found, handed_on = calibrate_layer(model, 0, stream(), prefix=PREFIX, precision=PRECISIONS[name])
    assert found.encoded.keys() == LINEARS and found.norms.keys() == NORMS
    assert all(0 < stored < nearest for stored, nearest in found.errors.values())
    weights = {f"base_ar.{key}": value for key, value in model.named_parameters()}
    for key, encoded in found.encoded.items():
        assert torch.equal(weights[key], encoded.decode()), key
    for key in ("input_layernorm", "post_attention_layernorm") if name == "nvfp4" else ():
        norm = getattr(decoder().layers[0], key).weight
        assert torch.equal(found.norms[f"{PREFIX}.{key}.weight"], norm)
    for output, example in zip(handed_on, stream(), strict=True):
        torch.testing.assert_close(output.embeds, passed(model, example), rtol=0, atol=1e-4)


def test_codes_are_chosen_for_the_inputs_that_the_scales_of_channels_leave(precision: Precision) -> None:
    model, exact = decoder(), decoder().layers[0]
    found, _ = calibrate_layer(model, 0, stream(), prefix=PREFIX, precision=precision)
    norm = model.layers[0].input_layernorm
    factors = exact.input_layernorm.weight / norm.weight
    assert torch.equal(factors.log2(), factors.log2().round()) and len(factors.unique()) > 1
    unscaled = feedback_of(
        moments_of(rows_of([exact.input_layernorm(example.embeds) for example in stream()]))
    )
    feedback = unscaled.scaled(factors)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = getattr(exact.self_attn, name).weight
        format = precision.format_of(f"{PREFIX}.self_attn.{name}.weight", tuple(weight.shape))
        expected = quantised(weight * factors, feedback, format, torch.bfloat16)
        got = found.encoded[f"{PREFIX}.self_attn.{name}.weight"]
        assert torch.equal(got.codes, expected.codes) and torch.equal(got.scales, expected.scales)


def test_only_this_layers_parameters_are_replaced_and_no_tensor_is_written(precision: Precision) -> None:
    """The old parameters may be memory-mapped: writing to them would change what is read of the file."""
    model = decoder()
    held = dict(model.named_parameters())
    before = {name: value.clone() for name, value in held.items()}
    calibrate_layer(model, 0, stream(), prefix=PREFIX, precision=precision)
    assert all(torch.equal(value, before[name]) for name, value in held.items())
    changed = {f"base_ar.{name}" for name, new in model.named_parameters() if new is not held[name]}
    assert changed == LINEARS | NORMS | BIASES


def test_the_same_stream_gives_the_same_codes(precision: Precision) -> None:
    first, second = (
        calibrate_layer(decoder(), 0, stream(), prefix=PREFIX, precision=precision)[0] for _ in range(2)
    )
    assert all(torch.equal(first.encoded[name].codes, second.encoded[name].codes) for name in LINEARS)


def test_a_norm_is_left_alone_where_a_layer_behind_it_stays_dense() -> None:
    """Its scales would have to go into that layer's weight too, which is stored as the checkpoint has it."""
    query = f"{PREFIX}.self_attn.q_proj.weight"
    mixed = Precision(PRECISIONS["int8"].compute, {}, chosen=dict.fromkeys(LINEARS - {query}, INT8))
    model = decoder()
    found, _ = calibrate_layer(model, 0, stream(), prefix=PREFIX, precision=mixed)
    untouched, folded = (
        torch.equal(found.norms[f"{PREFIX}.{name}.weight"], getattr(decoder().layers[0], name).weight)
        for name in ("input_layernorm", "post_attention_layernorm")
    )
    assert found.norms.keys() == NORMS and untouched and not folded
    assert found.encoded.keys() == LINEARS - {query}
    kept = dict(model.named_parameters())["layers.0.self_attn.q_proj.weight"]
    assert torch.equal(kept, dict(decoder().named_parameters())["layers.0.self_attn.q_proj.weight"])


def test_activations_that_are_not_finite_are_refused() -> None:
    examples = stream()
    examples[1].embeds[0, 3, 5] = torch.nan
    with pytest.raises(SingularError):
        calibrate_layer(decoder(), 0, examples, prefix=PREFIX, precision=PRECISIONS["int4"])


def test_moments_are_of_all_inputs_or_of_evenly_spaced_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [example.embeds for example in stream()]
    rows = torch.cat([x.flatten(0, -2) for x in inputs])
    assert torch.equal(rows_of(inputs), rows)
    torch.testing.assert_close(moments_of(rows), rows.T @ rows / len(rows))
    monkeypatch.setattr("star_export.calibration.layers.OPERATIONS", len(rows) * 64**2 / 3)
    assert torch.equal(rows_of(inputs), torch.cat([x.flatten(0, -2)[::3] for x in inputs]))
