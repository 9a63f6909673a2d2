"""Profiles follow from the axes and the limits; a wrong one is refused by the name of its input."""

from dataclasses import replace

import pytest

from engines.bundle.manifest import ComponentSpec, TensorSpec
from engines.errors import InputError, UsageError
from engines.tensorrt.profiles import (
    Limits,
    Profile,
    Range,
    check_profiles,
    fits,
    largest,
    limits_from_options,
    profiles_from_limits,
)
from tests.helpers.decoder_bundle import decoder_io
from tests.helpers.tiny_bundle import MODEL


def component(inputs, outputs=()):
    return ComponentSpec(
        graph="x/model.onnx",
        twin=None,
        golden="x/golden.safetensors",
        inputs=tuple(inputs),
        outputs=tuple(outputs),
    )


DECODER = component(*decoder_io())
LIMITS = Limits(capacity_tokens=256, prefill_tokens=200, rows=4)


def test_a_decoder_has_prefill_and_decode_and_one_capacity():
    profiles = profiles_from_limits(DECODER, MODEL, LIMITS)
    check_profiles(profiles, DECODER, MODEL)
    assert [p.name for p in profiles] == ["prefill", "decode"]
    assert profiles[0].inputs["inputs_embeds"] == Range((1, 1, 64), (2, 64, 64), (4, 200, 64))
    assert profiles[1].inputs["position_ids"] == Range((3, 1, 1), (3, 2, 1), (3, 4, 1))
    assert profiles[1].inputs["past_key_values.0.key"] == Range(
        (1, 2, 256, 16), (2, 2, 256, 16), (4, 2, 256, 16)
    )
    assert largest(profiles, DECODER, axis="C") == 256 and largest(profiles, DECODER, axis="S") == 200


def test_other_components_have_profiles_from_their_axes():
    head = component(
        [TensorSpec("hidden_states", "float32", ("2N", 1, 8)), TensorSpec("noise", "float32", ("N",))]
    )
    (profile,) = profiles_from_limits(head, MODEL, LIMITS)
    assert profile.inputs == {
        "hidden_states": Range((2, 1, 8), (2, 1, 8), (4, 1, 8)),
        "noise": Range((1,), (1,), (2,)),
    }
    with_noise = component([TensorSpec("noise", "float32", ("N", "S", 50))])
    window, decode = profiles_from_limits(with_noise, MODEL, LIMITS)
    assert window.inputs == {"noise": Range((1, 1, 50), (1, 16, 50), (2, 32, 50))}
    assert decode.inputs == {"noise": Range((1, 1, 50), (1, 1, 50), (2, 1, 50))}
    assert largest((window, decode), with_noise, axis="S") == 32
    vision = component([TensorSpec("pixel_values", "float32", ("P", 6))])
    (profile,) = profiles_from_limits(vision, MODEL, LIMITS)
    assert profile.inputs["pixel_values"] == Range((4, 6), (800, 6), (800, 6))  # four patches a token
    assert largest((profile,), vision, axis="C") is None


def test_an_axis_without_a_meaning_is_refused():
    with pytest.raises(InputError, match="X"):
        profiles_from_limits(component([TensorSpec("x", "float32", ("X",))]), MODEL, LIMITS)


def test_a_diffusion_transformer_takes_images_of_64_to_1024_pixels_and_captions_of_256_ids():
    spec = component(
        [
            TensorSpec("latents", "float32", ("N", "T", 4, 16)),
            TensorSpec("caption", "float32", (1, "L", 48)),
            TensorSpec("image_cos", "float32", ("2T", 8)),
        ]
    )
    (profile,) = profiles_from_limits(spec, MODEL, LIMITS)
    latents, caption, cos = (profile.inputs[name] for name in ("latents", "caption", "image_cos"))
    assert (latents.min, latents.opt) == ((1, 16, 4, 16), (2, 1024, 4, 16))
    assert latents.max == (LIMITS.rows, 4096, 4, 16)
    assert (caption.min[1], caption.max[1]) == (1, 256) and (cos.min[0], cos.max[0]) == (32, 8192)


def test_shapes_fit_a_profile_within_its_ranges():
    decode = profiles_from_limits(DECODER, MODEL, LIMITS)[1]
    shapes = {name: r.opt for name, r in decode.inputs.items()}
    assert fits(decode, shapes) and not fits(decode, shapes | {"inputs_embeds": (2, 2, 64)})


@pytest.mark.parametrize(
    "options, name",
    [
        ({"capacity_tokens": 4097}, "capacity_tokens"),
        ({"capacity_tokens": 0}, "capacity_tokens"),
        ({"capacity_tokens": -1}, "capacity_tokens"),
        ({"capacity_tokens": 64, "prefill_tokens": 65}, "prefill_tokens"),
        ({"prefill_tokens": 0}, "prefill_tokens"),
        ({"rows": 1}, "rows"),
        ({"rows": 10**9}, "rows"),
        ({"rows": True}, "rows"),
        ({"capacity_tokens": 64.0}, "capacity_tokens"),
    ],
)
def test_a_wrong_limit_is_a_usage_error_by_name(options, name):
    with pytest.raises(UsageError) as error:
        limits_from_options(MODEL, **options)
    assert name in error.value.where


def test_limits_have_defaults_from_the_model():
    assert limits_from_options(MODEL) == Limits(2048, 2048, 4)
    assert limits_from_options(replace(MODEL, max_positions=100)) == Limits(100, 100, 4)
    assert limits_from_options(MODEL, capacity_tokens=64) == Limits(64, 64, 4)


def decode(**changes):
    profile = profiles_from_limits(DECODER, MODEL, LIMITS)[1]
    inputs = profile.inputs | {k.replace("__", "."): v for k, v in changes.items()}
    return (Profile("decode", {k: v for k, v in inputs.items() if v is not None}),)


KEY, VALUE = "past_key_values__0__key", "past_key_values__0__value"


def cache(*capacities, rows=(1, 2, 4)):
    return Range(*((b, 2, c, 16) for b, c in zip(rows, capacities)))


@pytest.mark.parametrize(
    "profiles, words",
    [
        ((), "at least one profile"),
        (decode(surprise=Range((1,), (1,), (1,))), "surprise"),
        (decode(write_indices=None), "write_indices: expected a range"),
        (decode(write_indices=Range((3,), (2,), (4,))), "write_indices: expected 1 <= min <= opt <= max"),
        (decode(write_indices=Range((1,), (5,), (4,))), "write_indices"),
        (decode(write_indices=Range((-1,), (2,), (4,))), "write_indices"),
        (decode(write_indices=Range((0,), (2,), (4,))), "write_indices"),
        (decode(write_indices=Range((1,), (2,), (8,))), "max: write_indices"),
        (
            decode(write_indices=Range((1, 1), (2,), (4,))),
            "write_indices: expected min, opt and max of one rank",
        ),
        (decode(inputs_embeds=Range((1, 1, 65), (2, 1, 65), (4, 1, 65))), "inputs_embeds"),
        (decode(inputs_embeds=Range((1, 1), (2, 1), (4, 1))), "inputs_embeds"),
        (
            decode(**{KEY: cache(64, 64, 128), VALUE: cache(64, 64, 128)}),
            "past_key_values: expected a fixed capacity",
        ),
        (
            decode(**{KEY: cache(9999, 9999, 9999), VALUE: cache(9999, 9999, 9999)}),
            "the model's 4096 positions",
        ),
        (
            decode(
                inputs_embeds=Range((1, 1, 64), (2, 1, 64), (4, 257, 64)),
                position_ids=Range((3, 1, 1), (3, 2, 1), (3, 4, 257)),
            ),
            "at most 256 new positions",
        ),
        ((*decode(), *decode(**{KEY: cache(64, 64, 64), VALUE: cache(64, 64, 64)})), "one cache capacity"),
    ],
)
def test_a_wrong_profile_is_refused_by_the_name_of_its_input(profiles, words):
    with pytest.raises(InputError) as error:
        check_profiles(profiles, DECODER, MODEL)
    assert words in error.value.where and "x/model.onnx" in error.value.where
