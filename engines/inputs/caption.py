"""Captions: the ids that the diffusion decoder's text encoder reads of a prompt.

Source: docs/diffusion.md, "Text"; diffusers 0.33, pipelines/lumina2/pipeline_lumina2.py.
"""

from __future__ import annotations

import numpy as np

from ..bundle.files import text_from_bytes
from ..bundle.manifest import DiffusionSpec
from ..bundle.reader import Bundle
from ..errors import InputError, listed
from .prompt import MAGIC_SUFFIX
from .tokenizer import ids_from_text, special_tokens, tokenizer_from_json

CAPTIONS_FILE = "caption_tokenizer.json"  # of a bundle
TOKENIZER_BYTES = 64 << 20  # Gemma's has 34 MiB
MAX_TOKENS = 256  # with the first one; a longer caption is cut
# Plain text to the tokenizer, the marker too.
BEFORE = (
    "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts. <Prompt Start> "
)


class Captions:
    """The tokenizer of captions. Raises InputError when it does not begin a text, even an empty one, with the
    model's first id alone."""

    def __init__(self, tokenizer_json: str, spec: DiffusionSpec, *, where: str = CAPTIONS_FILE):
        self.where = where
        self.tokenizer = tokenizer_from_json(tokenizer_json, where=where)
        self.empty = np.array([[spec.bos]])
        self._special = special_tokens(self.tokenizer, where=where)
        if (got := self._encoded("")) != [spec.bos]:
            raise InputError(
                "The tokenizer of captions is not the text encoder's",
                where=f"{where}: the empty text: expected the ids {[spec.bos]}, got {got[:8]}",
                fix="use the tokenizer/ of the same Lumina-Image-2.0",
            )

    @classmethod
    def from_bundle(cls, bundle: Bundle) -> Captions | None:
        """The tokenizer of a bundle's captions; None for a bundle without a diffusion decoder."""
        if bundle.manifest.model.diffusion is None:
            return None
        data = bundle.read(CAPTIONS_FILE, limit_bytes=TOKENIZER_BYTES)
        path = bundle.path / CAPTIONS_FILE
        text = text_from_bytes(data, path, where="caption")
        return cls(text, bundle.manifest.model.diffusion, where=str(path))

    def ids(self, prompt: str, *, answer: str | None = None) -> tuple[np.ndarray, int]:
        """The ids of a prompt's caption, int64 [1, L], and how many more it has than the model takes.

        An `answer` that is not empty takes the prompt's place, as it does for the image tokens
        (docs/star.md 3.5). Raises InputError for text that is not valid Unicode or holds a special token.
        """
        ids = self._encoded(BEFORE + (answer + MAGIC_SUFFIX if answer else prompt))
        if found := [self._special[id] for id in dict.fromkeys(ids[1:]) if id in self._special]:
            raise InputError(
                "The prompt contains special tokens of the text encoder",
                where=f"prompt: expected plain text, got {listed(found, separator=', ')}",
                fix="remove them from the prompt",
            )
        return np.array([ids[:MAX_TOKENS]]), max(0, len(ids) - MAX_TOKENS)

    def _encoded(self, text: str) -> list[int]:
        return ids_from_text(self.tokenizer, text, where=self.where, with_special=True)
