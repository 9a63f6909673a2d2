"""Memory that a task takes: the components that it needs at the same time, their caches and their buffers.

Loaded in turn, a task needs memory for its largest stage; resident, for all of its components at once. Some
components may even be loaded part by part. These are lower bounds: `workspace_bytes` estimates what an
executor takes beyond them and decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..bundle.manifest import component_of
from ..bundle.tensors import ITEM_BYTES
from .sizes import Sizes

EMBED = ("token_embedding",)
DRAW = ("base_ar", "stacked_ar", "image_head", "image_embedding")
ANSWER = ("token_embedding", "base_ar", "text_head")
DECODE = ("vq_decoder",)
# Task -> its stages in order: the components of a stage are needed at the same time.
TASKS: dict[str, tuple[tuple[str, ...], ...]] = {
    "generate": (EMBED, DRAW, DECODE),
    "edit": (EMBED, ("vq_encoder",), ("image_embedding",), ("vision_encoder",), DRAW, DECODE),
    "ask": (EMBED, ("vision_encoder",), ANSWER),
    "reason": (EMBED, ANSWER, DRAW, DECODE),
}
PAINT = (("codebook",), ("text_embedding", "text_encoder"), ("dit",), ("vae_decoder",))
# The tasks of a bundle with a diffusion decoder: `generate` and `edit` with `--decoder diffusion`.
PAINTED: dict[str, tuple[tuple[str, ...], ...]] = {
    "paint": (EMBED, DRAW, *PAINT),
    "repaint": (*TASKS["edit"][:-1], ("vae_encoder",), *PAINT),
}
# The same with previews, which keep what paints and what decodes loaded together.
PREVIEWED = {
    f"{task} with previews": (*stages[:-2], (*stages[-2], *stages[-1])) for task, stages in PAINTED.items()
}
PROMPT_TOKENS = 64  # a sentence in the chat template; the templates of an edit are longer
# Bytes that ONNX Runtime's CPU provider holds of a weight for each byte stored: on loading it widens 16-bit
# weights to float32, those in fp8 and nvfp4, and all those of convolutions; with exact arithmetic also those
# in int8 of a graph without int4.
CPU_HELD = {"fp32": 1, "fp16": 2, "bf16": 2, "int8": 1, "int4": 1, "fp8": 4, "nvfp4": 7}
CPU_HELD_WIDE = CPU_HELD | {"int8": 4, "int4": 8}
CONVOLUTIONS = ("vq_encoder", "vq_decoder", "vae_encoder", "vae_decoder")
PART_BY_PART = ("text_encoder", "dit")  # whose parts may be loaded in turn: they run seldom, and for long
IMAGE_WORKSPACE = 128  # estimate of the VQ model's working memory / bytes of an image in float32
SCORES_WORKSPACE = 2  # attention scores of one layer that exist at a time, in float32


@dataclass(frozen=True)
class Use:
    """How a model is used: `rows` of a batch (two per image), the `capacity_tokens` of its caches, the
    `prefill_tokens` of its longest prompt and the `window_tokens` that a step draws of an image. `on_cpu`
    tells whether ONNX Runtime's CPU provider runs it, and `exact` whether in float32 throughout."""

    rows: int
    capacity_tokens: int
    prefill_tokens: int
    on_cpu: bool
    window_tokens: int = 1
    exact: bool = False


@dataclass(frozen=True)
class TaskMemory:
    """Bytes that a task takes with all of its components `resident`, and with each stage loaded `in_turn`.

    `components` are all that it needs, and `largest` those of the largest stage.
    """

    task: str
    components: tuple[str, ...]
    resident_bytes: int
    in_turn_bytes: int
    largest: tuple[str, ...]


def tasks_of(sizes: Sizes) -> tuple[str, ...]:
    """The tasks whose components are all there: only a model with a diffusion decoder paints, and a bundle
    that was exported with some components only does less."""
    there = {*sizes.weights, *sizes.tables}
    return tuple(
        task for task, stages in (TASKS | PAINTED).items() if all(there.issuperset(stage) for stage in stages)
    )


def weight_bytes(sizes: Sizes, component: str, *, on_cpu: bool, exact: bool = False) -> int:
    """Bytes that an executor holds of the component's weights; none of a table's."""
    return sum(_held(sizes, component, on_cpu=on_cpu, exact=exact))


def part_bytes(sizes: Sizes, component: str, *, on_cpu: bool, exact: bool = False) -> int:
    """Bytes that it holds of the largest part of a component whose parts are loaded in turn."""
    return max(_held(sizes, component, on_cpu=on_cpu, exact=exact), default=0)


def _held(sizes: Sizes, component: str, *, on_cpu: bool, exact: bool) -> list[int]:
    """The bytes of each part of a component."""
    if not on_cpu:
        return [size for graph, size in sizes.graphs.items() if component_of(graph) == component]
    held = []
    for graph, formats in sizes.formats.items():
        if component_of(graph) == component:
            wide = component in CONVOLUTIONS or (exact and "int4" not in formats)
            held.append(
                sum(size * (CPU_HELD_WIDE if wide else CPU_HELD)[name] for name, size in formats.items())
            )
    return held


def loop_bytes(sizes: Sizes, components: tuple[str, ...], use: Use) -> int:
    """Bytes of the caches of `components`, and of the activations that a decode loop keeps and hands on."""
    decoders = [name for name in components if name in sizes.model.cache]
    if not decoders:
        return 0
    rows = 1 if "text_head" in components else use.rows
    caches = sum(sizes.cache_bytes(name, rows=rows, capacity_tokens=use.capacity_tokens) for name in decoders)
    if use.on_cpu:  # the fp32 twin keeps its caches in float32
        caches = caches * ITEM_BYTES["float32"] // sizes.cache_item_bytes
    one = rows * sizes.model.hidden_size * ITEM_BYTES["float32"]
    hidden = one * (1 + len(decoders)) * (use.window_tokens + use.prefill_tokens)
    if "image_head" not in components:
        return caches + hidden
    draws = rows // 2 * use.window_tokens * sizes.model.codebook_size  # logits, and as many numbers of noise
    return caches + hidden + 2 * draws * ITEM_BYTES["float32"]


def stage_bytes(sizes: Sizes, components: tuple[str, ...], use: Use) -> int:
    """Bytes that `components` take together, loaded in turn: their weights, caches and buffers."""
    weights = sum(
        (part_bytes if name in PART_BY_PART else weight_bytes)(
            sizes, name, on_cpu=use.on_cpu, exact=use.exact
        )
        for name in components
    )
    return weights + loop_bytes(sizes, components, use)


def task_memory(sizes: Sizes, task: str, use: Use) -> TaskMemory:
    """What `task` takes resident and loaded in turn."""
    stages = (TASKS | PAINTED | PREVIEWED)[task]
    largest = max(stages, key=lambda stage: stage_bytes(sizes, stage, use))
    names = tuple(dict.fromkeys(name for stage in stages for name in stage))
    weights = sum(weight_bytes(sizes, name, on_cpu=use.on_cpu, exact=use.exact) for name in names)
    loops = max(loop_bytes(sizes, stage, use) for stage in stages)
    return TaskMemory(task, names, weights + loops, stage_bytes(sizes, largest, use), largest)


def workspace_bytes(sizes: Sizes, use: Use) -> int:
    """An estimate of an executor's working memory: the larger of a prefill's attention and the VQ model."""
    heads = max(sizes.model.hidden_size // c.head_dim for c in sizes.model.cache.values())
    scores = heads * use.rows * use.prefill_tokens * use.capacity_tokens
    pixels = 3 * sizes.model.image_size**2 * max(1, use.rows // 2)
    return max(scores * SCORES_WORKSPACE, pixels * IMAGE_WORKSPACE) * ITEM_BYTES["float32"]
