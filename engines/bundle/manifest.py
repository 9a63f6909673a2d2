"""The manifest of a bundle, as frozen dataclasses. This module reads no files; `reader.py` does."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from .records import Within, record_from_json

SCHEMA = 6  # 5 had no hash of its own
PART = "/"  # between a component's name and the number of its part: `base_ar/1`

Size = Annotated[int, Within(1, 1 << 24)]  # of an axis, in numbers
Few = Annotated[int, Within(1, 4096)]  # layers, heads, pixels of a patch
Bytes = Annotated[int, Within(0, 1 << 50)]
Id = Annotated[int, Within(0, (1 << 24) - 1)]  # of a token


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a component.

    `shape` holds sizes, or names of dynamic axes (`B`, `S`, `C`, `N`, `P`).
    """

    name: str
    dtype: str  # float32 float16 bfloat16 int64 int32 bool
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class ComponentSpec:
    """Files, inputs and outputs of one graph: a component, or a part of one (`base_ar/0`, `base_ar/1`, ...).

    A part holds consecutive layers of a decoder. It takes the residual stream as `inputs_embeds` and hands it
    on as `hidden_states`; its caches have the numbers that their layers have in the whole decoder.

    `twin` is the fp32 twin of a 16-bit graph, for executors without bf16. `classic` is the same graph for
    TensorRT before 10.15, and `plugin_abi` the ABI of the KV-cache plugin that it calls (None when it calls
    no plugin). `weights` maps each format (`bf16`, `int4`, ...) to the bytes of the weights stored in it.
    """

    graph: str
    twin: str | None
    golden: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    classic: str | None = None
    plugin_abi: int | None = None
    weights: dict[str, Bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class TableSpec:
    """A component that is only a lookup: the host reads rows of a weight, and no graph is needed.

    The weight, `shape` [rows, H] of `dtype`, begins at `offset` bytes of `file`, which may be the weights of
    a graph that uses it too. If it is quantised (`int8`), a scale for each row, of `scales_dtype`, begins at
    `scales_offset` of the same file. The input is ids, the output their rows in float32. `weights` are as in
    ComponentSpec, without what a graph stores.
    """

    file: str
    offset: Bytes
    shape: Annotated[tuple[int, int], Within(1, 1 << 24)]
    dtype: str
    golden: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    scales_offset: int | None = None
    scales_dtype: str | None = None
    weights: dict[str, Bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class CacheSpec:
    """KV geometry of one decoder.

    Each layer has a key and a value of shape [rows, kv_heads, capacity, head_dim].
    """

    layers: Few
    kv_heads: Few
    head_dim: Few


@dataclass(frozen=True)
class TokenSpec:
    """Ids of the special tokens, read from the checkpoint's tokenizer."""

    im_start: Id
    im_end: Id
    vision_start: Id
    vision_end: Id
    vision_pad: Id
    image_pad: Id
    fim_pad: Id
    eos: Annotated[tuple[int, ...], Within(0, (1 << 24) - 1)]


@dataclass(frozen=True)
class VisionSpec:
    """What numpy needs to prepare an image for `vision_encoder`."""

    patch_size: Few
    temporal_patch_size: Few
    spatial_merge_size: Few
    window_size: Few
    head_dim: Few
    image_mean: Annotated[tuple[float, float, float], Within(0.0, 1.0)]
    image_std: Annotated[tuple[float, float, float], Within(0.01, 10.0)]


@dataclass(frozen=True)
class SamplingSpec:
    """Default sampling settings of one task. The field defaults are the release's (docs/star.md 3.1)."""

    guidance: Annotated[float, Within(-1e6, 1e6)] = 1.1
    top_k: Annotated[int, Within(1, 1 << 31)] = 1000
    top_p: Annotated[float, Within(1e-6, 1.0)] = 0.8


@dataclass(frozen=True)
class SamplingSpecs:
    """Default sampling settings of each task.

    A prompt allows many images, but an edit leaves most of its image as given, so the two may differ.
    """

    generate: SamplingSpec = SamplingSpec()
    edit: SamplingSpec = SamplingSpec()


@dataclass(frozen=True)
class DiffusionSpec:
    """What numpy needs to paint with the diffusion decoder.

    `axes` counts the dimensions of a head that turn with caption position, row and column. A latent has
    `latent_channels` at 1/8 of an image's side and is `(z - latent_shift) * latent_scale` of what the VAE's
    encoder finds. `time_shift` is the schedule's, and `bos` the id that a caption begins with. `hidden_size`,
    `blocks` and `token_weights`, those that multiply every token, decide how long a step takes.
    """

    axes: Annotated[tuple[int, int, int], Within(2, 4096)]
    latent_channels: Few
    vq_channels: Size
    latent_scale: Annotated[float, Within(1e-6, 1e6)]
    latent_shift: Annotated[float, Within(-1e6, 1e6)]
    time_shift: Annotated[float, Within(1e-3, 1e3)]
    bos: Id
    hidden_size: Size
    blocks: Few
    token_weights: Annotated[int, Within(1, 1 << 48)]


@dataclass(frozen=True)
class ModelSpec:
    """The model as the runtime sees it. `image_size` in pixels, `max_positions` in tokens; `diffusion` is
    None without a diffusion decoder."""

    name: str
    hidden_size: Size
    vocab_size: Size
    codebook_size: Size
    image_tokens: Size
    image_size: Annotated[int, Within(1, 1 << 14)]
    top_k_limit: Size
    max_positions: Size
    repetition_penalty: Annotated[float, Within(0.01, 100.0)]
    rope_bf16: bool
    tokens: TokenSpec
    vision: VisionSpec
    cache: dict[str, CacheSpec]
    sampling: SamplingSpecs = SamplingSpecs()
    diffusion: DiffusionSpec | None = None


@dataclass(frozen=True)
class FileSpec:
    """Size in bytes and SHA-256 (hex) of one file."""

    size: Bytes
    sha256: str


@dataclass(frozen=True)
class GoldenSpec:
    """How much was recorded of the reference: a large model has fewer and shorter cases.

    Up to `images` images at once, `decoder_cases` of a decoder or a part, `draw_cases` of the image head, and
    whole runs of `image_tokens` and `answer_tokens`.
    """

    images: Size
    decoder_cases: Size
    draw_cases: Size
    image_tokens: Size
    answer_tokens: Size


@dataclass(frozen=True)
class CalibrationSpec:
    """What the codes of the decoders were chosen for: images that the model drew and edited, and answers.

    `images` counts those that were given to it. `sha256` is that of all texts and images.
    """

    prompts: int
    edits: int
    questions: int
    images: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    `components` maps a graph's name to its spec, the parts of a component in their order. `tables` are the
    components without a graph. `part_bytes` is the size above which layers were stored in parts. `golden`
    says what was recorded, and `calibration` what the decoders were quantised for, if not rounded to nearest.
    `hub` maps each repository of the hub that the checkpoint came from to its commit. `files` lists all files
    but the manifest itself, plans and certificates.
    The file has one entry more, the hash of all others (`seal`).
    """

    schema: int
    precision: str
    model: ModelSpec
    components: dict[str, ComponentSpec]
    tables: dict[str, TableSpec]
    part_bytes: Annotated[int, Within(1, 1 << 50)]
    golden: GoldenSpec
    files: dict[str, FileSpec]
    calibration: CalibrationSpec | None = None
    hub: dict[str, str] = field(default_factory=dict)


def component_of(name: str) -> str:
    """The component that a graph's name belongs to: `base_ar` of `base_ar/1`, and `text_head` of itself."""
    return name.partition(PART)[0]


def manifest_from_json(text: str, *, where: str) -> Manifest:
    """Parse and check `manifest.json`. Raises InputError with the key path."""
    fix = "export the bundle again with this version of star-export"
    other = "The bundle has an unsupported schema version"
    return record_from_json(Manifest, text, schema=SCHEMA, other=other, fix=fix, where=where)
