"""Nano's tokenizer: a byte-level BPE trained on the grammar, with the release's special tokens and template.

Code never states ids; it reads them from the tokenizer's file (`SpecialIds`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random

from ...mini import SPECIAL
from ...special import SpecialIds
from ..recipe import SEED, VOCAB_ROWS
from ..world import edits, prompts, questions, riddles
from ..world.world import random_scene

SYSTEM = "You are a helpful assistant."
# The release appends this to a reasoned answer (docs/star.md 3.5).
MAGIC_SUFFIX = " Ultra HD, 4K, cinematic composition"
CORPUS_ROUNDS = 3000


def corpus() -> Iterator[str]:
    """Texts of every kind of task, none of them held out, and the words of the chat template."""
    random = Random(f"{SEED} corpus")
    for turn in range(CORPUS_ROUNDS):
        scene = random_scene(random)
        yield prompts.random_prompt(random, random.choice((*prompts.CATEGORIES, "mixed")), test=False)[0]
        yield edits.random_edit(random, random.choice(edits.KINDS), test=False).text
        text, request = riddles.random_riddle(random, random.choice(riddles.KINDS), test=False)
        yield text
        yield riddles.answer(request)
        yield from (
            questions.random_question(random, scene, random.choice(list(questions.ASKERS)), test=False) or ()
        )
        if turn % 20 == 0:
            yield f"system\n{SYSTEM}\nuser\nassistant\n"
            yield "caption" + MAGIC_SUFFIX


def write_tokenizer(path: Path) -> None:
    """Train the tokenizer and write `tokenizer.json`: at most VOCAB_ROWS ids, with text split as by GPT-2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_ROWS - len(SPECIAL),
        show_progress=False,
        min_frequency=4,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    assert tokenizer.get_vocab_size() <= VOCAB_ROWS
    tokenizer.save(str(path))


class Rows:
    """Texts as rows of ids in the layout of docs/star.md 3.2 to 3.6. A test proves that they equal the
    runtime's rows."""

    def __init__(self, tokenizer, special: SpecialIds):
        self.tokenizer, self.special = tokenizer, special
        self.prefix = self.ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
        self.suffix = self.ids("<|im_end|>\n<|im_start|>assistant\n")
        self.magic, self.newline = self.ids(MAGIC_SUFFIX), self.ids("\n")

    @classmethod
    def from_file(cls, path: Path, special: SpecialIds) -> Rows:
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(path)), special)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def text(self, ids) -> str:
        """The text of ids, without special tokens."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def draw(self, prompt: str, *, magic: bool = False) -> list[int]:
        """A prompt to draw, up to `<|vision_start|>`; `magic` appends the suffix of a reasoned answer."""
        ending = self.magic if magic else []
        return [*self.prefix, *self.ids(prompt), *ending, *self.suffix, self.special.vision_start]

    def question(self, text: str) -> list[int]:
        """A text for the base model to answer."""
        return self.prefix + self.ids(text) + self.suffix

    def ask(self, question: str, *, merged_patches: int) -> list[int]:
        """A question about an image."""
        return self.prefix + self.image(merged_patches) + self.ids(question) + self.suffix

    def again(self, question: str) -> list[int]:
        """The next question of a conversation, after an answer and its `<|im_end|>`."""
        return self.newline + self.ids("<|im_start|>user\n") + self.ids(question) + self.suffix

    def edit(self, instruction: str, *, image_tokens: int, merged_patches: int) -> list[int]:
        """An instruction preceded by the places of its image, up to `<|vision_start|>`."""
        special = self.special
        tokens = [special.vision_start, *[special.vision_pad] * image_tokens, special.vision_end]
        images = tokens + self.image(merged_patches) + self.newline
        return [*self.prefix, *images, *self.ids(instruction), *self.suffix, special.vision_start]

    def image(self, merged_patches: int) -> list[int]:
        special = self.special
        return [special.vision_start, *[special.image_pad] * merged_patches, special.vision_end]

    def unconditional(self, row: list[int]) -> list[int]:
        """The row without its text: `<|fim_pad|>` replaces all ids but the first, the last four and the
        places of an image."""
        special, newline = self.special, self.newline[0]
        kept = range(len(row) - 4, len(row))
        if special.vision_end in row:
            first, last = row.index(special.vision_start), len(row) - 1 - row[::-1].index(special.vision_end)
            assert row[last + 1] == newline
            kept = [*range(first, last + 2), *kept]
        masked = [row[0]] + [special.fim_pad] * (len(row) - 1)
        for index in kept:
            masked[index] = row[index]
        return masked
