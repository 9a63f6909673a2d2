"""A bundle's tokenizers: loaded from its JSON, and never an error but ours.

The library is written in Rust. Where its code panics, Python sees a PanicException, which is no Exception.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from ..errors import InputError

FIX = "use the tokenizer.json of the model itself; a bundle's comes with `star-export export`"


def tokenizer_from_json(text: str, *, where: str):
    """The tokenizer, without truncation and padding. `where` names its file. Raises InputError."""
    from tokenizers import Tokenizer

    with _refused("The tokenizer cannot be read", where):
        tokenizer = Tokenizer.from_str(text)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def ids_from_text(tokenizer, text: str, *, where: str, with_special: bool = False) -> list[int]:
    """Encode `text`, and add the special tokens around it only `with_special`.

    Raises InputError for text that is not valid Unicode.
    """
    try:
        text.encode()
    except UnicodeError:
        raise InputError(
            "The text cannot be encoded",
            where="prompt: expected valid Unicode, got lone surrogates",
            fix="write the prompt in UTF-8",
        ) from None
    with _refused("The tokenizer cannot encode this text", where):
        return tokenizer.encode(text, add_special_tokens=with_special).ids


def special_tokens(tokenizer, *, where: str) -> dict[int, str]:
    """Id -> text of the tokens that mean something to the model and are no words: those that the tokenizer
    calls special, and all of the form `<|name|>`. Raises InputError."""
    with _refused("The tokenizer cannot be read", where):
        added = tokenizer.get_added_tokens_decoder()
    return {
        id: token.content
        for id, token in added.items()
        if token.special or (token.content.startswith("<|") and token.content.endswith("|>"))
    }


@contextlib.contextmanager
def _refused(what: str, where: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise InputError(what, where=f"{where}: {said}", fix=FIX) from None
