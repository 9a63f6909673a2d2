"""Precisions: the name of one covers the whole model, and says what stays wider."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reference.weights import resolve_checkpoint
from star_export.components import components_of, whole
from star_export.graph.formats import FP8, INT4, INT8
from star_export.graph.precisions import DENSE, EVERY, PRECISIONS
from star_export.planner.source import shapes_of

LINEAR = "base_ar.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("name", "shape", "precision", "expected"),
    [
        (LINEAR, (64, 256), "int4", INT4),
        (LINEAR, (64, 40), "int4", INT8),  # no block divides its rows
        (LINEAR, (64, 256), "int8", INT8),
        (LINEAR, (64, 256), "bf16", None),
        ("image_head.weight", (64, 256), "int4", INT8),
        (LINEAR.replace("base", "stacked"), (64, 256), "int4", INT8),  # it bears 4 bits far worse
        (LINEAR.replace("base", "stacked"), (64, 256), "nvfp4", INT8),
        ("image_table.weight", (64, 256), "int4", None),  # in 8 bits it would change draws
        ("token_embedding.weight", (64, 256), "int8", INT8),
        ("vision_encoder.patch_embed.weight", (64, 3, 2, 14, 14), "int8", INT8),
        ("vq_decoder.conv_in.weight", (64, 3, 3, 3), "int4", INT8),
        ("codebook.weight", (1024, 8), "int8", None),  # the VQ encoder compares with it
        ("vq_encoder.conv_out.weight", (8, 64, 3, 3), "int8", None),
        ("dit.layers.0.attn.to_q.weight", (64, 64), "int8", INT8),
        ("dit.layers.0.attn.to_q.weight", (64, 64), "fp8", FP8),
        ("dit.layers.0.attn.to_q.weight", (64, 64), "nvfp4", INT8),  # an image bears no 4 bits
        ("dit.noise_refiner.0.attn.to_q.weight", (64, 64), "fp8", INT8),  # it bears fp8 worse than the layers
        ("dit.x_embedder.weight", (64, 128), "fp8", None),  # both ends stay wide
        ("dit.norm_out.linear_2.weight", (64, 64), "int8", None),
        ("text_encoder.layers.0.mlp.up_proj.weight", (96, 48), "fp8", INT8),
        ("vae_decoder.conv_in.weight", (32, 16, 3, 3), "int8", None),
        ("base_ar.norm.weight", (64,), "int4", None),
        ("base_ar.layers.0.self_attn.q_proj.bias", (64,), "int8", None),
    ],
)
def test_each_weight_has_the_format_of_its_kind(name, shape, precision, expected) -> None:
    assert PRECISIONS[precision].format_of(name, shape) is expected


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_nothing_but_norms_biases_the_image_table_the_vae_and_what_is_near_an_end_stays_wide(
    diffusion_checkpoint: Path, precision: str
) -> None:
    config = resolve_checkpoint(str(diffusion_checkpoint)).config()
    shapes = {
        k: v for name in components_of(config) for k, v in shapes_of(whole(name, config), config).items()
    }
    wide = {name for name, shape in shapes.items() if not PRECISIONS[precision].format_of(name, shape)}
    assert {name for name in wide if len(shapes[name]) > 1 and not name.startswith("vae_")} == {
        *("codebook.weight", "image_table.weight"),
        *DENSE,
    }
    assert {name.partition(".")[0] for name in shapes.keys() - wide} == set(EVERY)


def test_a_chosen_format_goes_before_that_of_its_kind() -> None:
    mixed = replace(PRECISIONS["int4"], chosen={LINEAR: INT8})
    assert mixed.format_of(LINEAR, (64, 256)) is INT8
    assert mixed.format_of(LINEAR.replace("layers.0", "layers.1"), (64, 256)) is INT4


@pytest.mark.parametrize("precision", list(PRECISIONS))
def test_a_rounded_weight_keeps_its_shape_and_is_the_stored_one(precision: str) -> None:
    chosen = PRECISIONS[precision]
    for name, shape in ((LINEAR, (8, 64)), ("image_head.weight", (8, 64)), ("vq_decoder.w", (8, 4, 3, 3))):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        got = chosen.rounded(name, weight)
        assert got.shape == weight.shape and got.dtype == torch.float32
        assert torch.equal(got, weight) == (precision == "fp32")
        stored, sizes = chosen.stored(name, shape)
        if not (found := chosen.format_of(name, shape)):
            assert stored == chosen.dense_name and sizes == (weight.numel() * chosen.compute.itemsize,)
            continue
        encoded = found.encode(weight, torch.bfloat16)
        assert stored == found.name and torch.equal(got, encoded.decode().reshape(shape))
        assert sizes[:2] == (weight.numel() * found.bits // 8, encoded.scales.nbytes)


def test_the_diffusion_decoder_is_never_in_fp16() -> None:
    """With the released weights it would overflow; as in the release, it is in bf16 then."""
    weight = torch.full((2, 2), 7e4)  # more than fp16 holds
    fp16, bf16 = PRECISIONS["fp16"], PRECISIONS["bf16"]
    for name in ("text_embedding", "text_encoder", "dit", "vae_encoder", "vae_decoder"):
        assert fp16.within(name) == bf16.within(name) == bf16
        assert torch.equal(fp16.rounded(f"{name}.w", weight), bf16.rounded(f"{name}.w", weight))
        assert fp16.stored(f"{name}.w", (2, 2)) == ("bf16", (8,))
        assert PRECISIONS["fp32"].within(name) == PRECISIONS["fp32"]
    for name in ("base_ar", "vq_decoder", "codebook"):
        assert fp16.within(name) is fp16 and fp16.stored(f"{name}.w", (2, 2)) == ("fp16", (8,))


def test_the_noise_of_16_bit_dense_weights_is_that_of_their_type() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    for name, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        assert torch.equal(PRECISIONS[name].rounded(LINEAR, weight), weight.to(dtype).float())
