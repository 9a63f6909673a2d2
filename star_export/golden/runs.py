"""Whole runs of the oracle, recorded for a bundle: a greedy and a sampled image's first ids, and those of two
answers.

The second answer rewards repetition instead of penalising it, so that what the prompt holds decides each of
its ids: a penalty of 1.05 seldom decides one, and a checkpoint may have none.

Of the sampled image the guided logits are recorded too, as the case `forced`: a bundle that is fed its ids
must give them again.

They share each step's forward, so that the weights of a large model are read once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from engines.runtime.gumbel import gumbel_noise
from reference import tasks
from reference.model import Star

from ..tensor_files import save_tensors
from .feeds import rng_of
from .oracle import resident
from .record import Oracle

PROMPT_TOKENS, TRIES = 12, 50
REWARDS = 0.01, 0.2, 0.5  # repetition penalties of the second answer, tried in turn
HELD = 1 << 26  # weights; those of a larger model are read and rounded at every step again


def run_golden(oracle: Oracle, path: Path, *, tick: Callable[[], None] = lambda: None) -> None:
    """Record short whole runs: greedy and sampled image ids of one prompt, the logits that the latter were
    drawn from, and the ids of two answers.

    `tick` is called after each step of all.
    """
    rng, config = rng_of("run"), oracle.star.config
    shape = (2, PROMPT_TOKENS)
    settings = RunSettings(
        guidance=3.0,
        top_k=min(100, config.vq.codebook_size),
        top_p=float(np.float32(0.9)),
        seed=7,
        image_tokens=min(oracle.spec.image_tokens, config.vq.image_tokens),
        answer_tokens=oracle.spec.answer_tokens,
    )
    # A trained model may repeat one word over and over, which would prove nothing.
    numbers = sum(parameter.numel() for parameter in oracle.star.parameters())
    with resident(*[oracle.star] * (numbers <= HELD)):
        for tried in range(TRIES if oracle.spec.images > 1 else 1):
            rows, reward = rng.integers(0, config.vocab_size, shape), REWARDS[tried % len(REWARDS)]
            greedy, sampled, answers, logits = runs_in_step(oracle.star, rows, settings, reward, tick=tick)
            if len(set(answers[0].tolist())) > 2 and len(set(answers[1].tolist())) > 1:
                break
    common = {"input_ids": rows, "guidance": np.array([settings.guidance], np.float32)}
    recorded = {f"generate/in/{k}": v for k, v in common.items()} | {
        f"sample/in/{k}": v for k, v in common.items()
    }
    recorded |= {
        "generate/out/image_ids": greedy,
        "sample/out/image_ids": sampled,
        "sample/in/top_k": np.array([settings.top_k]),
        "sample/in/top_p": np.array([settings.top_p], np.float32),
        "sample/in/seed": np.array([settings.seed]),
        "forced/in/input_ids": rows,
        "forced/in/guidance": common["guidance"],
        "forced/in/image_ids": sampled,
        "forced/out/logits": logits,
        "repeat/in/repetition_penalty": np.array([reward], np.float32),
    }
    for case, ids in zip(("answer", "repeat"), answers, strict=True):
        recorded |= {
            f"{case}/in/input_ids": rows[:1],
            f"{case}/in/position_ids": np.broadcast_to(np.arange(PROMPT_TOKENS), (3, 1, PROMPT_TOKENS)),
            f"{case}/out/ids": ids,
        }
    save_tensors({k: np.ascontiguousarray(v) for k, v in recorded.items()}, path)


@dataclass(frozen=True)
class RunSettings:
    """Settings of `runs_in_step`; `seed` decides the `image_tokens` sampled ids."""

    guidance: float
    top_k: int
    top_p: float
    seed: int
    image_tokens: int
    answer_tokens: int


@dataclass
class Answering:
    """An answer on its way: the ids `seen` of prompt and answer, until one of `eos`."""

    seen: torch.Tensor
    penalty: float
    eos: Collection[int]
    ended: bool = False

    def advance(self, logits: torch.Tensor) -> None:
        """Take the likeliest word of `logits` [V] after the penalty, unless the answer has ended."""
        if not self.ended:
            word = tasks.penalise_repetition(logits, self.seen, self.penalty).argmax()
            self.seen = torch.cat([self.seen, word[None]])
            self.ended = int(word) in self.eos


def runs_in_step(
    star: Star,
    rows: np.ndarray,
    settings: RunSettings,
    reward: float,
    *,
    tick: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]:
    """Greedy and sampled `tasks.generate` of rows [2,L], and `tasks.answer` of the first, in step; and once
    more the answer, with the repetition penalty `reward`.

    They share each step's forward, so the weights of a streamed Star are read once per step and not once per
    run. Returns image ids [1,T] of the two, the ids [n] of both answers, and the sampled image's guided
    logits float32 [1,T,V].
    """
    config, prompt = star.config, torch.from_numpy(rows)
    ids, tokens = torch.cat([prompt, prompt, prompt[:1], prompt[:1]]), settings.image_tokens
    greedy: list[torch.Tensor] = []
    sampled: list[torch.Tensor] = []
    logits_of_sampled: list[torch.Tensor] = []
    answers, first = (
        [Answering(prompt[0], p, config.eos_token_ids) for p in (config.repetition_penalty, reward)],
        0,
    )
    steps = max(tokens, settings.answer_tokens)
    capacity = rows.shape[1] + steps - 1
    base_cache = star.base_ar.new_cache(len(ids), capacity_tokens=capacity)
    stacked_cache = star.stacked_ar.new_cache(len(ids) - 2, capacity_tokens=capacity)
    with torch.inference_mode():
        embeds = star.token_embedding(ids)
        for step in range(steps):
            length = embeds.shape[1]
            positions = torch.arange(first, first + length).expand(3, len(ids), -1)
            hidden = tasks.decode(star.base_ar, embeds, positions, first, base_cache)
            first += length
            if step < settings.answer_tokens:
                for one, logits in zip(answers, star.text_head(hidden[-2:, -1:])[:, 0].float(), strict=True):
                    one.advance(logits)
            if step < tokens:
                drawn = tasks.decode(
                    star.stacked_ar, hidden[:-2], positions[:, :-2], first - length, stacked_cache
                )
                guided = tasks.guide(star.image_head(drawn[:, -1:]).squeeze(1).float(), settings.guidance)
                greedy.append(guided[:1].argmax(-1))
                logits_of_sampled.append(guided[1:])
                noise = gumbel_noise(settings.seed, image=0, steps=[step], size=guided.shape[-1])
                sampled.append(
                    tasks.sample(
                        guided[1:], top_k=settings.top_k, top_p=settings.top_p, noise=torch.from_numpy(noise)
                    )
                )
                pairs = star.image_embedding(torch.cat([greedy[-1], sampled[-1]])).repeat_interleave(2, dim=0)
            words = torch.stack([one.seen[-1] for one in answers])
            embeds = torch.cat([pairs, star.token_embedding(words)])[:, None]
            tick()
    return (
        torch.stack(greedy, dim=1).numpy(),
        torch.stack(sampled, dim=1).numpy(),
        [one.seen[rows.shape[1] :].numpy() for one in answers],
        torch.stack(logits_of_sampled, dim=1).numpy(),
    )
