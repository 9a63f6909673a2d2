"""Stage `reward`: policy gradients from the scorer's judgement of the stack's own images.

The stack draws each prompt several times, the scorer reads the images, and those that it finds better than
the prompt's others become more probable. Cross entropy asks how likely a given image is, token by token,
after tokens that are given too; it never sees what becomes of the stack's own tokens. Here they are drawn as
they will be, from the most probable few. Base and adapter are frozen, so the base's hidden states of what was
drawn serve both drawing and learning.

Source: Williams 1992 (policy gradients); Shao et al. 2024, 4.1 (advantages within a group of attempts); Liu
et al. 2025 (arXiv 2503.20783), 3.2 (no division by each group's deviation).
"""

from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Callable, Sequence
from functools import partial
from random import Random

import numpy as np
import torch
from torch import Tensor, nn

from ...decoder import Decoder
from ...model import Star
from ..benchmark.painter import images_of
from ..checkpoint.tokens import Rows
from ..recipe import ATTEMPTS, GIVEN_WEIGHT, IMAGE_TOKENS, REWARD_TOP_K, REWARD_TOP_P, SEED, Stage
from ..world import edits, prompts
from ..world.scorer import read
from .batches import drawn_from, edit_rows, image_rows, prompt_row, scene_tensors
from .loop import Job, Losses, freeze, process
from .sequences import behind_prompt, through
from .stage_image import DRAWING_PARTS, given_tensors, painted_ids, with_images
from .stage_vq import background_ids

READ_TOGETHER = 16  # images that a process gets at a time
REWARDED = {  # shares of the prompts
    "mixed": 10,
    "single": 10,
    "two": 20,
    "counting": 10,
    "colors": 5,
    "position": 25,
    "attributes": 20,
}
EDITED_EVERY = 2  # one in so many batches edits


def reward_job(star: Star, rows: Rows, stage: Stage, *, workers: int = 0) -> Job:
    """Stage `reward`: one batch in EDITED_EVERY edits, the others draw.

    A batch is ATTEMPTS images for each of its prompts. `workers` processes read the images, or this one if 0.
    """
    count = stage.groups(ATTEMPTS, "attempts at a prompt")
    parts = freeze(star, trained=DRAWING_PARTS)
    painter = copy.deepcopy(star).requires_grad_(False).bfloat16()
    batch_of = partial(reward_batch, rows=rows, count=count)
    each = partial(multiprocessing.Pool(workers).map, chunksize=READ_TOGETHER) if workers else map
    return Job(stage, parts, batch_of, partial(reward_losses, star, painter, background_ids(star), each))


def reward_batch(step: int, *, rows: Rows, count: int) -> dict:
    """The prompts of a step, of edits or of drawings.

    input_ids [P, S], `first` [P] and position_ids [3, P, S] as in `generate_batch`, the images of edits, and
    `judges`, which map an image to the demands of its prompt that it meets or not.
    """
    random = Random(f"{SEED} reward {step}")
    if step % EDITED_EVERY == 0:
        asked = [edits.random_edit(random, edits.random_kind(random), test=False) for _ in range(count)]
        judges = [partial(edits.check, edit) for edit in asked]
        return edit_rows(asked, [True] * count, rows) | {"judges": judges}
    full, scenes, judges = [], [], []
    for _ in range(count):
        text, request = prompts.random_prompt(random, drawn_from(random, REWARDED), test=False)
        full.append(prompt_row(random, rows, text, request))
        scenes.append(prompts.scene_of(random, request))
        judges.append(partial(prompts.check, request))
    return image_rows(full) | scene_tensors(scenes) | {"judges": judges}


def reward_losses(
    star: Star, painter: Star, backgrounds: Tensor, each: Callable, batch: dict, step: int
) -> Losses:
    """`attempt_loss` of ATTEMPTS images for each prompt, read by `each`, which is a `map`.

    `edited` or `drawn` is the share of images that meet all demands.
    """
    painter.load_state_dict(star.state_dict())
    device, first, positions = batch["input_ids"].device, batch["first"], batch["position_ids"]
    length = -(-(int(first.max()) + 1) // 16) * 16
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        given, editing = painted_ids(star, backgrounds, batch), "before_things" in batch
        embeds = star.token_embedding(batch["input_ids"])
        if editing:
            own = given_tensors(star, batch, step)
            embeds = with_images(star, batch["input_ids"], own["given_ids"].long(), own["vision"])
    generator = torch.Generator(device).manual_seed((SEED * 1_000_003 + step) * 64 + process()[0])
    made = attempts(painter, embeds[:, :length].bfloat16(), first, positions, given, generator)
    images = images_of(painter.vq_decoder(made["ids"][:, :ATTEMPTS].flatten(0, 1)).float())
    reward, right = (found.to(device) for found in rewards(images, batch["judges"], each))
    with torch.autocast(device.type, torch.bfloat16):
        drawn, given = attempt_loss(star.stacked_ar, star.image_head, made, first, positions, evened(reward))
    return {
        "loss": drawn + GIVEN_WEIGHT * given,
        ("edited" if editing else "drawn"): right.mean(),
        "reward": reward.mean(),
        "given": given.detach(),
    }


def rewards(
    images: Sequence[np.ndarray], judges: Sequence[Callable], each: Callable = map
) -> tuple[Tensor, Tensor]:
    """The reward [P, A] of ATTEMPTS images for each judge, and whether each image meets all demands [P, A].

    Half of the reward is the share of demands met, the other half is for meeting all of them.
    """
    judged = [(judges[index // ATTEMPTS], image) for index, image in enumerate(images)]
    demands = list(each(demands_met, judged))
    right = torch.tensor([float(all(met)) for met in demands]).view(-1, ATTEMPTS)
    share = torch.tensor([sum(met) / len(met) for met in demands]).view(-1, ATTEMPTS)
    return 0.5 * share + 0.5 * right, right


def demands_met(attempt: tuple[Callable, np.ndarray]) -> list[bool]:
    """Which demands of a judge an image meets."""
    judge, image = attempt
    return list(judge(read(image)).values())


def evened(reward: Tensor) -> Tensor:
    """Rewards [P, A] minus their group's mean, divided by the standard deviation over all groups."""
    better = reward - reward.mean(1, keepdim=True)
    return better / better.square().mean().sqrt().clamp(min=1e-6)


@torch.no_grad()
def attempts(
    star: Star, embeds: Tensor, first: Tensor, positions: Tensor, given: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """ATTEMPTS images for each prompt, sampled with REWARD_TOP_K and REWARD_TOP_P, and then the given one.

    embeds [P, L, H], first [P]: the last column of each prompt, positions [3, P, S], given ids [P, T] ->
    `ids` [P, A + 1, T], `kept` [P, A, T, k], the ids from which each was drawn, -1 for those filtered out,
    and the base's hidden states, which the stack is fed: `prompt` [P, L, H] and `hidden` [P, A + 1, T - 1,
    H].
    """
    (*_, prompt), base_past = through(star.base_ar, embeds, positions[:, :, : embeds.shape[1]])
    (*_, states), stack_past = through(star.stacked_ar, prompt, positions[:, :, : embeds.shape[1]])
    shown, places = prompt_mask(first, embeds.shape[1]), image_positions(first, positions)  # [3, P, T - 1]
    given_embeds, past = star.image_embedding(given[:, :-1]), behind_prompt(base_past, 1)
    (*_, taught), _ = through(star.base_ar, given_embeds, places, past, shown)
    last = states.gather(1, first[:, None, None].expand(-1, 1, states.shape[-1]))
    last = last.repeat_interleave(ATTEMPTS, 0)  # [B, 1, H]
    base_past, stack_past = (behind_prompt(past, ATTEMPTS) for past in (base_past, stack_past))
    ids, kept, hidden, places = [], [], [], places.repeat_interleave(ATTEMPTS, 1)
    for step in range(IMAGE_TOKENS):
        drawn, among = sampled(star.image_head(last[:, 0]).float(), generator)
        ids.append(drawn)
        kept.append(among)
        if step < IMAGE_TOKENS - 1:
            x, place = star.image_embedding(drawn)[:, None], places[:, :, step : step + 1]
            (*_, x), base_past = through(star.base_ar, x, place, base_past, shown)
            hidden.append(x)
            (*_, last), stack_past = through(star.stacked_ar, x, place, stack_past, shown)
    groups = (len(first), ATTEMPTS)
    return {
        "ids": torch.cat([torch.stack(ids, 1).unflatten(0, groups), given[:, None]], 1),
        "kept": torch.stack(kept, 1).unflatten(0, groups),
        "prompt": prompt,
        "hidden": torch.cat([torch.cat(hidden, 1).unflatten(0, groups), taught[:, None]], 1),
    }


def attempt_loss(
    stack: Decoder, head: nn.Linear, made: dict[str, Tensor], first: Tensor, positions: Tensor, better: Tensor
) -> tuple[Tensor, Tensor]:
    """The policy-gradient loss of the attempts, and the cross entropy of the given images.

    The first is the negative log probability of each drawn token, times how much `better` [P, A] its image is
    than the prompt's others, averaged over tokens. `made` is what `attempts` returned.
    """
    prompt, (groups, each, _) = made["prompt"], made["ids"].shape
    (*_, states), past = through(stack, prompt, positions[:, :, : prompt.shape[1]])
    last = states.gather(1, first[:, None, None].expand(-1, 1, states.shape[-1])).repeat_interleave(each, 0)
    hidden, past = made["hidden"].flatten(0, 1), behind_prompt(past, each)
    places = image_positions(first, positions).repeat_interleave(each, 1)
    (*_, drawn), _ = through(stack, hidden, places, past, prompt_mask(first, prompt.shape[1]))
    logits = head(torch.cat([last, drawn], dim=1)).float().unflatten(0, (groups, each))  # [P, A + 1, T, K]
    chosen = logits.gather(-1, made["ids"].unsqueeze(-1)).squeeze(-1)  # [P, A + 1, T]
    among = logits[:, :-1].gather(-1, made["kept"].clamp(min=0)).masked_fill(made["kept"] < 0, float("-inf"))
    missed = among.logsumexp(-1) - chosen[:, :-1]  # [P, A, T]
    return (missed * better.unsqueeze(-1)).mean(), (logits[:, -1].logsumexp(-1) - chosen[:, -1]).mean()


def sampled(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """An id [B] from each row of logits [B, K], and the ids [B, k] it was drawn from.

    The filters are those of `tasks.sample`; -1 marks the ids that top-p filters out.
    """
    values, order = logits.topk(REWARD_TOP_K)
    shares = values.softmax(-1)
    beyond = shares.cumsum(-1) - shares > REWARD_TOP_P
    drawn = torch.multinomial(shares.masked_fill(beyond, 0), 1, generator=generator)
    return order.gather(1, drawn)[:, 0], order.masked_fill(beyond, -1)


def image_positions(first: Tensor, positions: Tensor) -> Tensor:
    """Positions [3, P, T - 1] of all but the last token of each prompt's image."""
    columns = first[:, None] + 1 + torch.arange(IMAGE_TOKENS - 1, device=first.device)  # [P, T - 1]
    return positions.gather(2, columns.expand(3, -1, -1))


def prompt_mask(first: Tensor, length: int) -> Tensor:
    """0 for the columns of each prompt and -inf after it, [P, length]."""
    behind = torch.arange(length, device=first.device) > first[:, None]
    return torch.zeros_like(behind, dtype=torch.float32).masked_fill(behind, float("-inf"))
