"""The released sizes as configurations (docs/star.md 1), and a tiny one on which everything here is tried
without a GPU."""

from __future__ import annotations

from reference.config import DecoderConfig, StarConfig, VisionConfig, VQConfig
from reference.special import SpecialIds

PARTS = ("base_ar", "stacked_ar", "image_head")  # what a decode step of an image runs
SPECIAL = SpecialIds(
    im_start=151644,
    im_end=151645,
    vision_start=151652,
    vision_end=151653,
    vision_pad=151654,
    image_pad=151655,
    fim_pad=151662,
)


def star(
    name: str,
    *,
    hidden: int,
    layers: int,
    stacked: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    codes: int,
    sections: tuple[int, int, int] = (16, 24, 24),
) -> StarConfig:
    """A STAR of these sizes. The vision encoder and VQ, which no decode step runs, are as small as they
    come."""

    def decoder(count: int) -> DecoderConfig:
        return DecoderConfig(
            hidden_size=hidden,
            num_layers=count,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=hidden // heads,
            intermediate_size=intermediate,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            mrope_section=sections,
            max_positions=128000,
        )

    vision = VisionConfig(
        depth=1,
        hidden_size=64,
        intermediate_size=64,
        num_heads=4,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        window_size=56,
        full_attention_blocks=(0,),
        out_hidden_size=hidden,
    )
    vq = VQConfig(
        ch=32,
        ch_mult=(1,),
        res_blocks=1,
        z_channels=32,
        num_heads=8,
        codebook_size=codes,
        codebook_dim=16,
        image_tokens=576,
    )
    return StarConfig(
        name=name,
        base_ar=decoder(layers),
        stacked_ar=decoder(stacked),
        vision=vision,
        vq=vq,
        adapter_depth=2,
        vocab_size=vocab,
        tie_word_embeddings=True,
        eos_token_ids=(151645,),
        repetition_penalty=1.05,
        special=SPECIAL,
    )


SIZES = {
    "3B": star(
        "STAR-3B",
        hidden=2048,
        layers=36,
        stacked=16,
        heads=16,
        kv_heads=2,
        intermediate=11008,
        vocab=1000,
        codes=65536,
    ),
    "7B": star(
        "STAR-7B",
        hidden=3584,
        layers=28,
        stacked=14,
        heads=28,
        kv_heads=4,
        intermediate=18944,
        vocab=1000,
        codes=65536,
    ),
    "tiny": star(
        "tiny",
        hidden=256,
        layers=3,
        stacked=2,
        heads=4,
        kv_heads=2,
        intermediate=384,
        vocab=1000,
        codes=2048,
        sections=(8, 12, 12),
    ),
}
