"""Whole runs in step are the oracle's runs one by one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from engines.runtime.gumbel import gumbel_noise
from reference import tasks
from reference.weights import load_star, resolve_checkpoint
from star_export.golden.runs import REWARDS, RunSettings, runs_in_step


def test_runs_in_step_are_the_tasks_runs(mini_checkpoint: Path) -> None:
    star = load_star(resolve_checkpoint(str(mini_checkpoint)))
    rows = np.random.default_rng(5).integers(0, star.config.vocab_size, (2, 6))
    for answer_tokens in (2, 7):  # shorter and longer than the images
        settings = RunSettings(2.5, 30, 0.9, 3, 5, answer_tokens)
        greedy, sampled, answers, logits = runs_in_step(star, rows, settings, REWARDS[0])
        prompt = torch.from_numpy(rows)
        common = {"guidance": 2.5, "image_tokens": 5}
        wanted = tasks.generate(star, prompt, top_k=1, top_p=1.0, noise=None, **common)
        np.testing.assert_array_equal(greedy, wanted.image_ids)
        size = star.config.vq.codebook_size
        wanted = tasks.generate(
            star,
            prompt,
            top_k=30,
            top_p=0.9,
            noise=lambda step: torch.from_numpy(gumbel_noise(3, image=0, steps=[step], size=size)),
            **common,
        )
        np.testing.assert_array_equal(sampled, wanted.image_ids)
        np.testing.assert_allclose(logits, wanted.cfg_logits.transpose(0, 1), atol=1e-4)
        assert not np.array_equal(greedy, sampled)
        positions = torch.arange(6).expand(3, 1, -1)
        config = star.config
        for answer, penalty in zip(answers, (config.repetition_penalty, REWARDS[0]), strict=True):
            star.config = dataclasses.replace(config, repetition_penalty=penalty)
            ids = tasks.answer(star, prompt[:1], positions, None, max_new_tokens=answer_tokens)
            np.testing.assert_array_equal(answer, ids)
        star.config = config
        assert len(set(answers[0].tolist())) > 1
        assert set(answers[1].tolist()) <= set(rows[0].tolist())  # it repeats what the prompt holds
