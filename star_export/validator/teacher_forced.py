"""What a bundle would draw from at each position of an image that is given: its teacher-forced logits.

The image's tokens are fed as if they had been drawn, so two bundles are asked the same question at every
position. One pass through both decoders takes the place of the decode steps.
"""

from __future__ import annotations

import numpy as np

from engines.inputs.prompt import Prompt
from engines.runtime.prefill import run_chunks
from engines.runtime.star import Star
from engines.sessions import run

HEAD_POSITIONS = 32  # at once: the logits of more than a few positions of a large codebook take memory


def forced_logits(star: Star, prompt: Prompt, image_ids: np.ndarray, *, guidance: float) -> np.ndarray:
    """The guided, unfiltered logits float32 [N, T, V] of each token of `image_ids` int64 [N, T].

    Position t has seen `prompt` (2N rows conditional, unconditional, ..., text only) and the tokens before
    t; guidance combines the two rows. Raises InputError for an id outside of the codebook and a prompt that
    is too long, and the errors of the runtime.
    """
    (images, tokens), length = image_ids.shape, prompt.input_ids.shape[1]
    loop = star.image_loop(num_images=images, length=length, tokens=tokens)
    drawn = run(star.session("image_embedding"), {"image_ids": image_ids})["inputs_embeds"][:, :-1]
    embeds = np.concatenate([star.embedded(prompt), drawn.repeat(2, axis=0)], axis=1)  # [2N, L + T - 1, H]
    after = prompt.position_ids.max() + 1 + np.arange(tokens - 1)
    after = np.broadcast_to(after, (*prompt.position_ids.shape[:2], tokens - 1))
    positions = np.concatenate([prompt.position_ids, after], axis=2)  # [3, 2N, L + T - 1]
    chunks = run_chunks(loop.decoders, embeds, positions, loop.slots)
    hidden = np.concatenate([chunk.read().copy() for chunk in chunks], axis=1)[:, length - 1 :]
    return _head_logits(star, hidden, guidance=guidance)


def _head_logits(star: Star, hidden: np.ndarray, *, guidance: float) -> np.ndarray:
    """Hidden states [2N, T, H] -> guided logits [N, T, V], some positions at a time."""
    head = star.session("image_head")
    step = min(HEAD_POSITIONS, head.prefill_tokens or HEAD_POSITIONS)
    settings: dict[str, np.ndarray] = {
        "guidance": np.array([guidance], np.float32),
        "top_k": np.ones(1, np.int64),
        "top_p": np.ones(1, np.float32),
    }
    found = []
    for at in range(0, hidden.shape[1], step):
        part = np.ascontiguousarray(hidden[:, at : at + step])
        noise = np.zeros((len(part) // 2, part.shape[1], star.model.codebook_size), np.float32)
        found.append(run(head, settings | {"hidden_states": part, "noise": noise})["logits"])
    return np.concatenate(found, axis=1)
