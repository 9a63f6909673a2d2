"""The training recipe: the model's sizes and one row per stage. Training has no other free numbers.

The sizes follow the release where it decides (heads of 64, grouped queries, three-axis positions, windowed
vision with some full blocks, a VQ model of the same blocks) and are small elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

NAME, BASE_FOLDER = "STAR-Nano", "Qwen2.5-VL-nano"
SEED = 1

HIDDEN, HEADS, KV_HEADS, INTERMEDIATE = 256, 4, 2, 448
BASE_LAYERS, STACKED_LAYERS = 4, 4
# The release has (16, 24, 24). The last section turns with the column of a merged patch, and an image here
# has four columns. With the release's proportions and theta of 1e6, neighbouring columns differ by a
# hundred-thousandth of a radian; with (8, 12, 12) and theta 50 by 0.02 to 0.09, and which thing is left of
# which was answered by chance. With these values they differ by up to 0.38; the slowest period is 280 tokens.
MROPE_SECTION = (4, 4, 24)
MAX_POSITIONS, ROPE_THETA = 512, 50.0
VOCAB_ROWS = 640
VISION = {
    "depth": 4,
    "hidden_size": 128,
    "num_heads": 2,
    "intermediate_size": 256,
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
# 64 channels give each of the 32 norm groups two. With 32 channels each would be normalised by itself, which
# forgets colours: trained on equally many images, that was 2 to 4 dB worse from the start.
VQ = {"ch": 64, "ch_mult": [1, 1, 1, 2], "res_blocks": 1, "z_channels": 64, "num_heads": 2}
CODEBOOK_SIZE, CODEBOOK_DIM, TOKENS_SIDE = 2048, 8, 8
IMAGE_TOKENS = TOKENS_SIDE**2
ADAPTER_DEPTH = 2

# The sampling of the release's README, until the sweep has written its choice to `sampling.json` beside the
# weights.
GUIDANCE, TOP_K, TOP_P = 1.1, 1000, 0.8


@dataclass(frozen=True)
class Stage:
    """One stage of training: `steps` batches of `batch` samples.

    The learning rate rises over `warmup` steps and falls at the end as a cosine. The batches repeat after
    `distinct` of them. During the first `alone` steps only the auxiliary heads, which are discarded after
    training, learn.
    """

    name: str
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 200
    weight_decay: float = 0.01
    clip: float = 1.0
    distinct: int | None = None
    alone: int = 0

    def number(self, step: int) -> int:
        """The number of the batch that a step takes."""
        return step % self.distinct if self.distinct else step

    def groups(self, size: int, of: str) -> int:
        """How many groups of `size` samples a batch holds; `of` names a group in errors. Raises ValueError on
        a remainder."""
        if self.batch % size:
            raise ValueError(
                f"stage {self.name}: the {self.batch} samples of a process "
                f"are not a multiple of {size} {of}; train in fewer processes"
            )
        return self.batch // size


# Batches are small because arithmetic is scarce: from as many images the VQ model learned far more with 16.
STAGES = {
    stage.name: stage
    for stage in (
        Stage("vq", steps=7_500, batch=16, learning_rate=1e-3, weight_decay=0.0),
        Stage("local", steps=1_100, batch=16, learning_rate=3e-4, warmup=100, weight_decay=0.0),
        Stage("decoder", steps=2_500, batch=16, learning_rate=3e-4, warmup=50, weight_decay=0.0),
        Stage("eyes", steps=4_000, batch=64, learning_rate=1e-3),
        Stage("base", steps=13_500, batch=32, learning_rate=6e-4),
        Stage("generate", steps=6_000, batch=32, learning_rate=2e-3, warmup=100),
        Stage("edit", steps=40_000, batch=32, learning_rate=1e-3, warmup=100, distinct=15_000, alone=300),
        Stage("reward", steps=990, batch=128, learning_rate=1e-4, warmup=10),
    )
}
VQ_UNQUANTISED = 0.15  # share of stage `vq` before the codebook exists
DROPPED_PROMPTS = 0.1  # share of generation and editing samples with the unconditional prompt
ATTEMPTS = 8  # images per prompt in stage `reward`
REWARD_TOP_K, REWARD_TOP_P = 20, 0.9  # sampling in stage `reward`, without guidance
GIVEN_WEIGHT = 0.1  # weight of the given images, which fulfil the prompts, in stage `reward`
