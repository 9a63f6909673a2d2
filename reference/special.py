"""Ids of the special tokens in a prompt row, read from the base model's tokenizer.

Qwen's `config.json` states some of them and its `tokenizer.json` all. Only the latter is read, so that the
two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from .errors import CheckpointError
from .strict_json import read_object

FIX = "use the base model's own tokenizer.json"


@dataclass(frozen=True)
class SpecialIds:
    """Each field holds the id of the token `<|field|>`."""

    im_start: int
    im_end: int
    vision_start: int
    vision_end: int
    vision_pad: int
    image_pad: int
    fim_pad: int


def special_ids_from_tokenizer(path: Path, *, vocab_size: int) -> SpecialIds:
    """The ids that `tokenizer.json` gives its added tokens. Raises CheckpointError if one is missing or out
    of range."""
    added = read_object(path).get("added_tokens")
    entries = [entry for entry in added if isinstance(entry, dict)] if isinstance(added, list) else []
    ids = {entry.get("content"): entry.get("id") for entry in entries}
    found = {field.name: ids.get(f"<|{field.name}|>") for field in fields(SpecialIds)}
    for name, value in found.items():
        if type(value) is not int or not 0 <= value < vocab_size:
            raise CheckpointError(
                "the tokenizer does not belong to the model",
                where=f"{path}: added_tokens: <|{name}|>: "
                f"expected an id below {vocab_size}, got {value!r:.40}",
                fix=FIX,
            )
    return SpecialIds(**found)
