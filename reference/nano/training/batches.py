"""Batches of the stages after `eyes` as tensors: padded rows of ids, scenes to draw, and targets.

A batch is a function of (seed, stage, step) and made in a worker process. Causal attention never looks ahead,
so padding at the end of a row changes nothing before it, and rows need no mask, as in the release.
"""

from __future__ import annotations

from random import Random

import numpy as np
import torch
from torch import Tensor

from ...tasks import mrope_position_ids
from ..checkpoint.tokens import Rows
from ..checkpoint.vision import MERGED_SIDE
from ..recipe import DROPPED_PROMPTS, IMAGE_TOKENS, SEED, TOKENS_SIDE
from ..world import edits, prompts, questions, riddles
from ..world.draw import arrays_from_scenes
from ..world.world import COLORS, MAX_THINGS, RADII, SHAPES, SIDE_PIXELS, Look, Scene, random_scene
from .wanted import TOKEN_PIXELS, meant_tensor, request_of_scene, wanted_tensors

QUESTIONS = {"color": 16, "shape": 8, "count": 16, "position": 20, "yes/no": 32, "describe": 8}  # shares
PROMPTS = {"mixed": 30, "attributes": 15, "position": 20, "counting": 15, "two": 10, "colors": 5, "single": 5}
QUESTIONS_PER_IMAGE = 5  # drawing and seeing an image costs as much as four more questions
TEXT_SHARE = (
    0.125  # rows of stage `base` without an image, half of them riddles; text is learned long before seeing
)
MAGIC_SHARE = 0.3  # share of the prompts that end like a reasoned answer, with the release's suffix
MERGED_PATCHES = MERGED_SIDE**2
CELL_PIXELS = SIDE_PIXELS // MERGED_SIDE
REACHED_PIXELS = 3.0  # a token shows a thing whose radius ends at most this far from the token's centre
EDITS_PER_IMAGE = 4  # in stage `edit`, where the image takes more than half of a row
WIDTHS = 32  # rows are padded to a multiple of this
IGNORED = -100


def drawn_from(random: Random, shares: dict[str, int]) -> str:
    """A random name, weighted by its share."""
    return random.choices(list(shares), weights=list(shares.values()))[0]


def base_batch(step: int, *, rows: Rows, batch: int) -> dict:
    """Stage `base`: conversations about images, then prompts to put in plain words.

    Labels cover only the answers. Returns input_ids [B, S], labels [B, S] (IGNORED elsewhere), position_ids
    [3, B, S], things and backgrounds of the first rows' images, their `cell_tensors`, and `sharp`: which of
    them are prepared as for `edit`.
    """
    random, texts = Random(f"{SEED} base {step}"), int(TEXT_SHARE * batch)
    scenes, turns = [], []  # turns of each row: what is given and what must be said
    while len(scenes) < batch - texts:
        scene = random_scene(random)
        if found := conversation(random, scene):
            scenes.append(scene)
            (question, answer), *others = found
            first = (rows.ask(question, merged_patches=MERGED_PATCHES), answer)
            turns.append([first, *((rows.again(q), a) for q, a in others)])
    for turn in range(texts):
        if turn % 2:
            text, request = riddles.random_riddle(random, random.choice(riddles.KINDS), test=False)
        else:
            text, request = prompts.random_prompt(random, drawn_from(random, PROMPTS), test=False)
        turns.append([(rows.question(text), prompts.caption(request))])
    said = [[(given, [*rows.ids(answer), rows.special.im_end]) for given, answer in row] for row in turns]
    ids = padded([[i for given, answer in row for i in given + answer] for row in said])
    answers = [[i for given, answer in row for i in [IGNORED] * len(given) + answer] for row in said]
    labels = padded(answers, fill=IGNORED)
    positions = torch.arange(ids.shape[1]).expand(3, batch, -1).clone()
    positions[:, : len(scenes)] = mrope_position_ids(ids[0], [(MERGED_SIDE, MERGED_SIDE)], rows.special)
    return {
        "input_ids": ids,
        "labels": labels.roll(-1, dims=1),
        "position_ids": positions,
        **scene_tensors(scenes),
        **cell_tensors(scenes),
        "sharp": torch.rand(len(scenes), generator=torch.Generator().manual_seed(step)) < 0.3,
    }


def conversation(random: Random, scene: Scene) -> list[questions.Question]:
    """Differently worded questions about a scene; a description comes last, because it tells everything."""
    kinds = [drawn_from(random, QUESTIONS) for _ in range(QUESTIONS_PER_IMAGE)]
    kinds.sort(key=lambda kind: kind == "describe")
    found = [questions.random_question(random, scene, kind, test=False) for kind in kinds]
    return list(dict.fromkeys(question for question in found if question))


def generate_batch(step: int, *, rows: Rows, batch: int, stage: str) -> dict:
    """Stage `generate`: prompts and scenes that fulfil them.

    input_ids [B, S] with room for the image after each prompt, `first` [B], the column from which its first
    token is predicted, position_ids [3, B, S], things, backgrounds, `token_tensors` and `wanted_tensors`.
    """
    random, requests, scenes, full, told = Random(f"{SEED} {stage} generate {step}"), [], [], [], []
    for _ in range(batch):
        text, request = prompts.random_prompt(random, drawn_from(random, PROMPTS), test=False)
        requests.append(request)
        scenes.append(prompts.scene_of(random, request))
        row = prompt_row(random, rows, text, request)
        told.append(random.random() >= DROPPED_PROMPTS)
        full.append(row if told[-1] else rows.unconditional(row))
    targets = token_tensors(scenes) | wanted_tensors(requests, scenes, told)
    return image_rows(full) | scene_tensors(scenes) | targets


def edit_batch(step: int, *, rows: Rows, batch: int) -> dict:
    """Stage `edit`: instructions on images, EDITS_PER_IMAGE for each.

    The tensors of `generate_batch` cover what comes after an image. What comes before is the same for all of
    its instructions: prompt_ids [P, L] and prompt_positions [3, P, L], with the image in the columns `given`
    [P, T] and as `before_things` and `before_backgrounds`. Each instruction also has `given_classes` and
    `given_offsets` (the `token_tensors` of that image), `meant` (`meant_tensor`) and `touched`
    (`touched_tensor`).
    """
    random, asked, told = Random(f"{SEED} edit {step}"), [], []
    for _ in range(batch // EDITS_PER_IMAGE):
        asked += edits.random_edits(random, EDITS_PER_IMAGE, test=False)
        told += [random.random() >= DROPPED_PROMPTS] * EDITS_PER_IMAGE
    before, after = [edit.before for edit in asked], [edit.after for edit in asked]
    found = edit_rows(asked, told, rows)
    ids, positions, one = found["input_ids"], found["position_ids"], slice(None, None, EDITS_PER_IMAGE)
    length = (ids[0] == rows.special.vision_end).nonzero()[-1].item() + 2  # including the newline
    found |= {
        "prompt_ids": ids[one, :length],
        "prompt_positions": positions[:, one, :length],
        "input_ids": ids[:, length:],
        "position_ids": positions[:, :, length:],
        "first": found["first"] - length,
        "given": (ids[one] == rows.special.vision_pad).nonzero()[:, 1].view(-1, IMAGE_TOKENS),
        **{name: found[name][one] for name in ("before_things", "before_backgrounds")},
        **{f"given_{name}": tensor for name, tensor in token_tensors(before).items()},
        "meant": meant_tensor(asked),
        "touched": touched_tensor(asked),
    }
    wanted = wanted_tensors([request_of_scene(scene) for scene in after], after, told)
    return found | token_tensors(after) | wanted


def prompt_row(random: Random, rows: Rows, text: str, request: prompts.Request) -> list[int]:
    """A prompt as it is worded or, sometimes, as a reasoned answer."""
    magic = random.random() < MAGIC_SHARE
    return rows.draw(prompts.caption(request) if magic and random.random() < 0.7 else text, magic=magic)


def edit_rows(asked: list[edits.Edit], told: list[bool], rows: Rows) -> dict:
    """`image_rows` of edits, without the text of those that are not `told`, and the scenes after and
    `before_` them."""
    full = [rows.edit(edit.text, image_tokens=IMAGE_TOKENS, merged_patches=MERGED_PATCHES) for edit in asked]
    shown = [row if said else rows.unconditional(row) for row, said in zip(full, told, strict=True)]
    found = image_rows(shown)
    length = found["input_ids"].shape[1]
    positions = mrope_position_ids(found["input_ids"][0], [(MERGED_SIDE, MERGED_SIDE)], rows.special)
    found["position_ids"] = positions[:, :, :length].expand(-1, len(full), -1).contiguous()
    before = scene_tensors([edit.before for edit in asked])
    given = {f"before_{name}": tensor for name, tensor in before.items()}
    return found | scene_tensors([edit.after for edit in asked]) | given


def image_rows(full: list[list[int]]) -> dict:
    """Prompt rows padded for all but the last token of an image: ids, first predicted column, positions."""
    ids = padded([row + [0] * (IMAGE_TOKENS - 1) for row in full])
    positions = torch.arange(ids.shape[1]).expand(3, len(full), -1).contiguous()
    return {
        "input_ids": ids,
        "first": torch.tensor([len(row) - 1 for row in full]),
        "position_ids": positions,
    }


def padded(full: list[list[int]], *, fill: int = 0) -> Tensor:
    """Rows as one tensor [B, S], filled at their ends. A few widths S are faster than a few columns less."""
    width = -(-max(map(len, full)) // WIDTHS) * WIDTHS
    return torch.tensor([row + [fill] * (width - len(row)) for row in full])


def scene_tensors(scenes: list[Scene]) -> dict[str, Tensor]:
    things, backgrounds = arrays_from_scenes(scenes)
    return {"things": torch.from_numpy(things), "backgrounds": torch.from_numpy(backgrounds)}


def token_tensors(scenes: list[Scene]) -> dict[str, Tensor]:
    """What each image token shows: `classes` [B, T, 4] and `offsets` [B, T, 2], as in `cell_tensors`.

    They cover every token that a thing reaches. Offsets are in units of `TOKEN_PIXELS`, from the token's
    centre to the thing's.
    """
    things, _ = arrays_from_scenes(scenes)
    x, y, radius = (things[:, None, :, index] for index in (2, 3, 4))  # [B, 1, 4]
    index = np.arange(IMAGE_TOKENS)[:, None]
    right = x / TOKEN_PIXELS - index % TOKENS_SIDE - 0.5  # [B, T, 4]
    down = y / TOKEN_PIXELS - index // TOKENS_SIDE - 0.5
    absent = things[:, None, :, 0] == 0
    beyond = np.hypot(right, down) * TOKEN_PIXELS - radius + 1e6 * absent  # pixels beyond a thing's edge
    nearest = beyond.argmin(-1)[..., None]  # [B, T, 1]
    there = np.take_along_axis(beyond, nearest, -1) < REACHED_PIXELS  # [B, T, 1]
    looks = np.full((len(scenes), MAX_THINGS, 3), IGNORED)
    for n, scene in enumerate(scenes):
        for m, thing in enumerate(scene.things):
            looks[n, m] = look_classes(thing.look)
    nearest_looks = np.take_along_axis(looks, nearest, 1)  # [B, T, 3]
    looks = np.where(there, nearest_looks, (0, IGNORED, IGNORED))
    colors = np.array([list(COLORS).index(scene.background) for scene in scenes])
    backgrounds = colors[:, None, None].repeat(IMAGE_TOKENS, 1)  # [B, T, 1]
    offsets = np.concatenate([np.take_along_axis(v, nearest, -1) for v in (right, down)], -1) * there
    return {
        "classes": torch.from_numpy(np.concatenate([looks, backgrounds], -1)),
        "offsets": torch.from_numpy(offsets.astype(np.float32)),
    }


def touched_tensor(asked: list[edits.Edit]) -> Tensor:
    """1.0 for tokens [B, T] that are reached by what an edit changes or removes."""
    alone = [Scene(edit.before.background, () if edit.meant is None else (edit.meant,)) for edit in asked]
    return (token_tensors(alone)["classes"][..., 0] > 0).float()


def look_classes(look: Look) -> list[int]:
    """A shape, counted from 1, its colour and its size as numbers."""
    return [1 + SHAPES.index(look.shape), list(COLORS).index(look.color), list(RADII).index(look.size)]


def cell_tensors(scenes: list[Scene]) -> dict[str, Tensor]:
    """What each merged patch shows.

    `classes` [B, 16, 4]: a shape (0 for none), its colour, its size and the background, IGNORED where there
    is none. `offsets` [B, 16, 2]: a thing's centre relative to the patch's, from -1 to 1, right and down.
    """
    found = [cells_of(scene) for scene in scenes]
    return {
        "classes": torch.tensor([classes for classes, _ in found]),
        "offsets": torch.tensor([offsets for _, offsets in found]),
    }


def cells_of(scene: Scene) -> tuple[list[list[int]], list[list[float]]]:
    """Classes and offsets of each merged patch, row by row."""
    background = list(COLORS).index(scene.background)
    classes = [[0, IGNORED, IGNORED, background] for _ in range(MERGED_SIDE**2)]
    offsets = [[0.0, 0.0] for _ in classes]
    for thing in scene.things:
        column, row = int(thing.x // CELL_PIXELS), int(thing.y // CELL_PIXELS)
        cell = row * MERGED_SIDE + column
        classes[cell] = [*look_classes(thing.look), background]
        offsets[cell] = [2 * (thing.x / CELL_PIXELS - column) - 1, 2 * (thing.y / CELL_PIXELS - row) - 1]
    return classes, offsets
