"""Let the reference draw an image, edit it and answer about it, with the weights that a bundle stores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engines.bundle.manifest import ModelSpec, SamplingSpec
from engines.inputs.image_io import write_image
from engines.inputs.preprocess import VisionInputs, ask_inputs, edit_inputs, images_from_decoded
from engines.inputs.prompt import Chat, Prompt
from engines.runtime.gumbel import gumbel_noise
from reference import tasks

from ..graph.wrappers import FoldedStar
from .oracle import resident
from .tasks import DRAWN_FILE, EDITED_FILE, FOLDER, TASKS_FILE, RecordedTasks, json_from_tasks

SEED, ANSWER_TOKENS = 7, 32


def record_tasks(
    star: FoldedStar, chat: Chat, model: ModelSpec, *, prompt: str, edit: str, question: str, bundle: Path
) -> None:
    """Write to the folder `bundle` what `star` draws of `prompt`, how it edits that image, and its answer."""
    with torch.inference_mode(), resident(star):
        asked = chat.generate_prompt(prompt, num_images=1)
        drawn_ids, drawn = _drawn(star, asked, _embedded(star, asked), model.sampling.generate)
        vision, square = edit_inputs(drawn, model)
        asked = chat.edit_prompt(edit, grid_h=vision.grid_h, grid_w=vision.grid_w)
        embeds = _embedded(star, asked, vision)
        embeds[:, asked.vq_tokens] = star.image_embedding(star.vq_encoder(torch.from_numpy(square))[0])
        edited_ids, edited = _drawn(star, asked, embeds, model.sampling.edit)
        vision = ask_inputs(drawn, model)
        asked = chat.ask_prompt(question, grid_h=vision.grid_h, grid_w=vision.grid_w)
        words = tasks.answer(
            star,
            torch.from_numpy(asked.input_ids),
            torch.from_numpy(asked.position_ids),
            _seen(star, vision),
            max_new_tokens=ANSWER_TOKENS,
        )
    (bundle / FOLDER).mkdir(exist_ok=True)
    write_image(bundle / DRAWN_FILE, drawn)
    write_image(bundle / EDITED_FILE, edited)
    recorded = RecordedTasks(
        seed=SEED,
        prompt=prompt,
        instruction=edit,
        question=question,
        answer_tokens=ANSWER_TOKENS,
        drawn_ids=drawn_ids,
        edited_ids=edited_ids,
        answer=chat.text(words.numpy()),
    )
    (bundle / TASKS_FILE).write_bytes(json_from_tasks(recorded).encode())


def _drawn(
    star: FoldedStar, prompt: Prompt, embeds: Tensor, sampling: SamplingSpec
) -> tuple[tuple[int, ...], np.ndarray]:
    """The ids [T] of an image and the image uint8 [R, R, 3], from a prompt with embeds [2, L, H]."""
    positions = torch.from_numpy(prompt.position_ids)
    after = int(positions.max()) + 1 + torch.arange(star.config.vq.image_tokens)
    size = star.config.vq.codebook_size
    made = tasks.generate(
        star,
        torch.from_numpy(prompt.input_ids),
        guidance=sampling.guidance,
        top_k=min(sampling.top_k, size),
        top_p=sampling.top_p,
        noise=lambda step: torch.from_numpy(gumbel_noise(SEED, image=0, steps=[step], size=size)),
        inputs_embeds=embeds,
        position_ids=torch.cat([positions, after.expand(*positions.shape[:2], -1)], 2),
    )
    assert made.image is not None  # all of it was drawn
    return tuple(made.image_ids[0].tolist()), images_from_decoded(made.image.numpy())[0]


def _embedded(star: FoldedStar, prompt: Prompt, vision: VisionInputs | None = None) -> Tensor:
    """The embeddings of a prompt [B, L, H], with those of an image as the vision encoder sees it."""
    embeds = star.token_embedding(torch.from_numpy(prompt.input_ids))
    if vision is not None:
        embeds[:, prompt.vision_tokens] = _seen(star, vision)
    return embeds


def _seen(star: FoldedStar, vision: VisionInputs) -> Tensor:
    return star.vision_encoder(*[torch.from_numpy(array) for array in vision.feeds().values()])
