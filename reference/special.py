"""Ids of the special tokens in a prompt row, read from the base model's tokenizer.

Qwen's `config.json` states some of them and its `tokenizer.json` all. Only the latter is read, so that the
two cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from .errors import CheckpointError
from .strict_json import Section, kind, read_object

FIX = "use the base model's own tokenizer.json"
MAX_TOKENIZER_VALUES = 1 << 20  # Qwen's has 0.3 million, and 0.6 million as newer libraries write its merges


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
    """The ids that `tokenizer.json` gives its added tokens.

    Raises CheckpointError if one is missing, or if the file is not a BPE whose ids all lie in the vocabulary.
    """
    tokenizer = Section(read_object(path, max_values=MAX_TOKENIZER_VALUES), source=path)
    model = tokenizer.section("model")
    model.text("type", choices=("BPE",), default="BPE")
    vocabulary, merges = model.section("vocab"), model.take("merges", "a list")
    if type(merges) is not list:
        raise model.refuse("merges", "a list", kind(merges))
    for token in vocabulary.values:
        vocabulary.integer(token, low=0, high=vocab_size - 1)
    added = tokenizer.take("added_tokens", "a list")
    if type(added) is not list:
        raise tokenizer.refuse("added_tokens", "a list", kind(added))
    ids: dict[str, int] = {}
    for i, item in enumerate(added):
        if type(item) is not dict:
            raise tokenizer.refuse(f"added_tokens[{i}]", "an object", kind(item))
        entry = Section(item, source=path, path=f"added_tokens[{i}]")
        content = entry.text("content")
        if content in ids:
            raise entry.refuse("content", "another token than those before it", kind(content))
        ids[content] = entry.integer("id", low=0, high=vocab_size - 1)
    names = [field.name for field in fields(SpecialIds)]
    if absent := [f"<|{name}|>" for name in names if f"<|{name}|>" not in ids]:
        raise CheckpointError(
            "the tokenizer does not belong to the model",
            where=f"{path}: added_tokens: expected {', '.join(f'<|{name}|>' for name in names)}; "
            f"absent: {', '.join(absent)}",
            fix=FIX,
        )
    return SpecialIds(**{name: ids[f"<|{name}|>"] for name in names})
