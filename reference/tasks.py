"""The model's tasks: answer, generate and edit. These are slow, obvious loops, the oracle of every fast path.

They work on ids, positions and tensors. Prompts, tokenising and image files are up to the caller. Implicit
reasoning is `answer` followed by `generate`, with the ids of the answer in place of the prompt
(docs/star.md 3.5).

Source: docs/star.md 3; MM-MVR/STAR, star/models/model.py; transformers 4.51.0, generation/logits_process.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoder import Cache, Decoder
from .model import Star
from .special import SpecialIds


@dataclass(frozen=True)
class Generated:
    """N images and the tensors computed on the way.

    The rows of a batch alternate: conditional, unconditional, conditional, ...
    `image` is about [-1, 1], not clipped, and None if `image_tokens` stopped the drawing early.
    """

    image_ids: Tensor  # [N, T] int64
    image: Tensor | None  # [N, 3, R, R]
    prefill_embeds: Tensor  # [2N, L, H]
    base_hidden: Tensor  # [2N, L, H] of the prefill: base_ar after its final norm
    head_in: Tensor  # [T, 2N, H] of each step: the last position of stacked_ar after its final norm
    cfg_logits: Tensor  # [T, N, K] of each step, after guidance


@torch.no_grad()
def generate(
    star: Star,
    input_ids: Tensor,
    *,
    guidance: float,
    top_k: int,
    top_p: float,
    noise: Callable[[int], Tensor] | None,
    image_tokens: int | None = None,
    inputs_embeds: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Generated:
    """Draw N images from 2N prompt rows (`guidance_rows`).

    input_ids [2N, L]; `inputs_embeds` [2N, L, H] replaces their embeddings (for editing: `edit_embeds`).
    position_ids [3, 1 or 2N, at least L + T - 1] replaces the slot numbers on all three axes. `noise` gives
    the numbers [N, K] that decide the draws of a step (`gumbel.py`); without it each step takes the arg-max
    after guidance. `image_tokens` stops early.
    """
    count = image_tokens or star.config.vq.image_tokens
    embeds = star.token_embedding(input_ids) if inputs_embeds is None else inputs_embeds
    rows, length, _ = embeds.shape
    if position_ids is None:
        position_ids = torch.arange(length + count, device=embeds.device).expand(3, 1, -1)
    caches = new_caches(star, rows, capacity_tokens=length + count - 1)
    prefill_embeds, first, image_ids, head_in, cfg_logits = embeds, 0, [], [], []
    for step in range(count):
        positions = position_ids[:, :, first : first + embeds.shape[1]].expand(-1, rows, -1)
        base_hidden, hidden = both_decoders(star, embeds, positions, first, caches)
        first += embeds.shape[1]
        if step == 0:
            prefill_hidden = base_hidden
        head_in.append(hidden[:, -1])
        cfg_logits.append(guide(star.image_head(hidden[:, -1:]).squeeze(1).float(), guidance))  # [N, K]
        if noise is None:
            image_ids.append(cfg_logits[-1].argmax(-1))
        else:
            image_ids.append(sample(cfg_logits[-1], top_k=top_k, top_p=top_p, noise=noise(step)))
        embeds = star.image_embedding(image_ids[-1]).repeat_interleave(2, dim=0).unsqueeze(1)  # [2N, 1, H]
    drawn = torch.stack(image_ids, dim=1)
    image = star.vq_decoder(drawn) if count == star.config.vq.image_tokens else None
    return Generated(
        drawn, image, prefill_embeds, prefill_hidden, torch.stack(head_in), torch.stack(cfg_logits)
    )


@torch.no_grad()
def answer(
    star: Star, input_ids: Tensor, position_ids: Tensor, image_embeds: Tensor | None, *, max_new_tokens: int
) -> Tensor:
    """Answer in text with the base model alone, greedily; the checkpoint's repetition penalty covers prompt
    and answer.

    input_ids [1, L], position_ids [3, 1, L] (`mrope_position_ids`), image_embeds [P/4, H] for the
    `<|image_pad|>` places -> new ids [n] int64, n <= max_new_tokens, including the id that ended the answer.
    """
    config = star.config
    replaced = {} if image_embeds is None else {config.special.image_pad: image_embeds}
    embeds = prompt_embeds(star, input_ids, replaced)
    cache = star.base_ar.new_cache(1, capacity_tokens=input_ids.shape[1] + max_new_tokens)
    seen, positions, first = input_ids[0], position_ids, 0
    for _ in range(max_new_tokens):
        hidden = decode(star.base_ar, embeds, positions, first, cache)
        first, positions = first + embeds.shape[1], positions.max() + torch.ones_like(positions[:, :, :1])
        logits = star.text_head(hidden[:, -1:])[0, 0].float()
        token = penalise_repetition(logits, seen, config.repetition_penalty).argmax()
        seen = torch.cat([seen, token[None]])
        if int(token) in config.eos_token_ids:
            break
        embeds = star.token_embedding(token.view(1, 1))
    return seen[input_ids.shape[1] :]


def new_caches(star: Star, rows: int, *, capacity_tokens: int) -> tuple[Cache, Cache]:
    """Empty caches for both decoders."""
    return (
        star.base_ar.new_cache(rows, capacity_tokens=capacity_tokens),
        star.stacked_ar.new_cache(rows, capacity_tokens=capacity_tokens),
    )


def both_decoders(
    star: Star, embeds: Tensor, positions: Tensor, first: int, caches: tuple[Cache, Cache]
) -> tuple[Tensor, Tensor]:
    """One step through base and stack: embeds [B, S, H], positions [3, B, S] -> hidden states of each, [B, S,
    H]."""
    base_hidden = decode(star.base_ar, embeds, positions, first, caches[0])
    return base_hidden, decode(star.stacked_ar, base_hidden, positions, first, caches[1])


def decode(decoder: Decoder, embeds: Tensor, positions: Tensor, first: int, cache: Cache) -> Tensor:
    """One step of one decoder; `first` is the cache slot of the first new token in every row."""
    write_indices = torch.full(embeds.shape[:1], first, dtype=torch.int64, device=embeds.device)
    return decoder(embeds, positions, write_indices, cache)[0]


def guide(logits: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance u + w (c - u): logits [2N, V] with rows c, u, c, u, ... -> [N, V]."""
    conditional, unconditional = logits[0::2], logits[1::2]
    return unconditional + guidance * (conditional - unconditional)


def sample(logits: Tensor, *, top_k: int, top_p: float, noise: Tensor) -> Tensor:
    """Draw from the filtered distribution: logits [N, V], noise [N, V] -> ids [N].

    The id is the arg-max of log p + G over the ids that the filters keep. log p is the logit but for a
    constant, so the noise is added to the logits, in float32.
    """
    return filtered(logits, top_k, top_p).add(noise).argmax(-1)


def filtered_probabilities(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Softmax after the release's top-k and top-p filters: [N, V] -> [N, V]."""
    return filtered(logits, top_k, top_p).softmax(-1)


def filtered(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits float32 [N, V] with -inf for those that the release's filters leave out (docs/star.md 3.4).

    top-k keeps the k largest (0 keeps every one). top-p, applied next if below 1, keeps the largest up to and
    including the first whose cumulative probability exceeds it. Whatever ties with a kept one is kept.
    """
    logits = logits.float()
    ranked = logits.sort(dim=-1, descending=True).values
    if top_k > 0:
        threshold = ranked[:, min(top_k, ranked.shape[-1]) - 1, None]
        ranked = ranked.masked_fill(ranked < threshold, -torch.inf)
    if top_p < 1:
        beyond = ranked.softmax(-1).cumsum(-1) > top_p
        # The first one beyond top_p is kept as well.
        beyond = torch.cat([torch.zeros_like(beyond[:, :1]), beyond[:, :-1]], dim=-1)
        ranked = ranked.masked_fill(beyond, -torch.inf)
    lowest = ranked.masked_fill(ranked == -torch.inf, torch.inf).amin(-1, keepdim=True)
    return logits.masked_fill(logits < lowest, -torch.inf)


def penalise_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of ids that occurred: logits [V], seen [n] ->
    [V]."""
    old = logits[seen]
    return logits.scatter(0, seen, torch.where(old < 0, old * penalty, old / penalty))


def prompt_embeds(star: Star, input_ids: Tensor, replaced: dict[int, Tensor]) -> Tensor:
    """Token embeddings with those of the placeholder ids replaced in order: input_ids [B, L], id -> [n, H] ->
    [B, L, H]."""
    embeds = star.token_embedding(input_ids)
    for placeholder, values in replaced.items():
        embeds[input_ids == placeholder] = values.to(embeds.dtype).repeat(input_ids.shape[0], 1)
    return embeds


def edit_embeds(star: Star, input_ids: Tensor, *, image_ids: Tensor, image_embeds: Tensor) -> Tensor:
    """The embeddings of an edit's prompt.

    input_ids [2, L] (`edit_ids`), image_ids [T] of the image, image_embeds [P/4, H] -> [2, L, H].
    """
    special = star.config.special
    replaced = {special.vision_pad: star.image_embedding(image_ids), special.image_pad: image_embeds}
    return prompt_embeds(star, input_ids, replaced)


def guidance_rows(input_ids: Tensor, special: SpecialIds) -> Tensor:
    """Each prompt and its unconditional twin, in which `<|fim_pad|>` replaces the ids between the first and
    the last four.

    input_ids [N, L] ending in `<|vision_start|>` -> [2N, L] (docs/star.md 3.3; editing masks before it
    inserts the image).
    """
    unconditional = input_ids.clone()
    unconditional[:, 1:-4] = special.fim_pad
    return torch.stack([input_ids, unconditional], dim=1).flatten(0, 1)


def edit_ids(
    rows: Tensor, special: SpecialIds, *, insert_at: int, newline: int, image_tokens: int, merged_patches: int
) -> Tensor:
    """Prompt rows with places for the image: `<|vision_pad|>` for its image ids, `<|image_pad|>` for its
    merged patches.

    rows [2, L0], `insert_at` after "<|im_start|>user\\n" -> [2, L] (docs/star.md 3.6).
    """
    image = [
        special.vision_start,
        *[special.vision_pad] * image_tokens,
        special.vision_end,
        special.vision_start,
        *[special.image_pad] * merged_patches,
        special.vision_end,
        newline,
    ]
    inserted = torch.tensor(image, device=rows.device).expand(rows.shape[0], -1)
    return torch.cat([rows[:, :insert_at], inserted, rows[:, insert_at:]], dim=1)


def mrope_position_ids(
    input_ids: Tensor, grids: Sequence[tuple[int, int]], special: SpecialIds, *, trailing: int = 0
) -> Tensor:
    """Positions on the three axes: input_ids [L], merged rows and columns of each image -> [3, 1, L +
    trailing] int64.

    Text advances all axes by one. An image is the run of `<|image_pad|>` after `<|vision_start|>`: it takes
    one place in time, and its rows and columns on the other axes; text continues after the larger of the two.
    `trailing` continues the positions for ids yet to come.
    """
    columns: list[Tensor] = []  # each [3, n]
    start, done, remaining = 0, 0, list(grids)
    ids = input_ids.tolist()
    while done < len(ids):
        if ids[done] == special.image_pad and done and ids[done - 1] == special.vision_start:
            grid_h, grid_w = remaining.pop(0)
            rows = torch.arange(grid_h).repeat_interleave(grid_w)
            places = torch.stack([torch.zeros_like(rows), rows, torch.arange(grid_w).repeat(grid_h)])
            columns.append(start + places)
            start, done = start + max(grid_h, grid_w), done + grid_h * grid_w
        else:
            columns.append(torch.full((3, 1), start))
            start, done = start + 1, done + 1
    columns.append((start + torch.arange(trailing)).expand(3, -1))
    return torch.cat(columns, dim=1).unsqueeze(1).to(input_ids.device)
