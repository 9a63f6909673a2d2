"""STAR-Nano is a STAR, small enough to ship: the release's layout, loader, rows and image preparation."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.errors import InputError
from engines.inputs import preprocess as runtime_image
from engines.inputs.prompt import Chat
from reference import vision
from reference.gumbel import gumbel_noise
from reference.nano import recipe
from reference.nano.benchmark.painter import SAMPLED, Painter, Sampling, images_of
from reference.nano.checkpoint import layout
from reference.nano.checkpoint.tokens import MAGIC_SUFFIX, Rows
from reference.nano.checkpoint.vision import MERGED_SIDE, embeds_of, patches, prepared, seen
from reference.nano.world.draw import images_from_scenes
from reference.nano.world.world import random_scene
from reference.weights import load_star, resolve_checkpoint
from star_export.exporter.model_spec import model_spec_from_checkpoint, tokenizer_files

TEXTS = [
    "a red circle",
    "three small stars and a violet box on a yellow background",
    "ein blaues Pferd, 馬!",
    "x",
    "why? " * 30,
]
SIZE_LIMIT = 20_000_000


@pytest.fixture(scope="module")
def chat(nano_root: Path) -> Chat:
    files = resolve_checkpoint(nano_root)
    spec = model_spec_from_checkpoint(files, layout.read_config(nano_root), rope_bf16=True)
    parts = tokenizer_files(files, spec)
    return Chat(parts["tokenizer.json"].decode(), parts["chat_template.jinja"].decode(), spec)


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    from random import Random

    random = Random(9)
    return images_from_scenes([random_scene(random) for _ in range(6)], seed=9)


def test_all_files_together_are_small_enough_to_ship(nano_root: Path) -> None:
    assert sum(path.stat().st_size for path in nano_root.rglob("*") if path.is_file()) <= SIZE_LIMIT


def test_the_sizes_are_those_that_every_target_is_fast_with(nano_root: Path) -> None:
    config = layout.read_config(nano_root)
    for decoder in (config.base_ar, config.stacked_ar):
        assert decoder.head_dim in (64, 128) and decoder.num_heads // decoder.num_kv_heads > 1
        assert all(decoder.mrope_section) and 2 * sum(decoder.mrope_section) == decoder.head_dim
    heads = (
        config.vision.hidden_size // config.vision.num_heads,
        config.vq.ch * config.vq.ch_mult[-1] // config.vq.num_heads,
    )
    assert set(heads) <= {64, 128}
    blocks = set(range(config.vision.depth)) - set(config.vision.full_attention_blocks)
    side = config.vision.window_size // config.vision.patch_size
    assert (
        blocks and side < 112 // config.vision.patch_size
    )  # some blocks see windows, and an image has several
    assert config.vq.image_size == 64


def test_the_release_loader_reads_what_is_written(nano_root: Path) -> None:
    star = layout.new_star(layout.read_config(nano_root))
    loaded = load_star(resolve_checkpoint(nano_root))
    assert all(
        torch.equal(tensor, star.state_dict()[name].half().float())
        for name, tensor in loaded.state_dict().items()
    )


def test_a_new_model_depends_on_the_seed_alone(nano_root: Path) -> None:
    config, state = layout.read_config(nano_root), torch.random.get_rng_state()
    first, again, other = (layout.new_star(config, seed=seed).image_head.weight for seed in (1, 1, 2))
    assert (
        torch.equal(first, again)
        and not torch.equal(first, other)
        and torch.equal(state, torch.random.get_rng_state())
    )


def test_ids_are_the_tokenizers_and_not_the_releases(nano_root: Path, nano_rows: Rows) -> None:
    config = layout.read_config(nano_root)
    for name, value in dataclasses.asdict(config.special).items():
        assert nano_rows.tokenizer.token_to_id(f"<|{name}|>") == value < config.vocab_size < 151_643
    assert config.special.im_end in config.eos_token_ids


def test_grammar_words_are_single_tokens_and_any_text_survives(nano_rows: Rows) -> None:
    for word in (" red", " circles", " background", " triangle", " three", " cinematic"):
        assert len(nano_rows.ids(word)) == 1, word
    assert all(nano_rows.text(nano_rows.ids(text)) == text for text in TEXTS)


@pytest.mark.parametrize("text", TEXTS)
def test_rows_are_the_runtimes(nano_rows: Rows, chat: Chat, text: str) -> None:
    row = nano_rows.draw(text)
    assert chat.generate_prompt(text, num_images=1).input_ids.tolist() == [row, nano_rows.unconditional(row)]
    assert chat.question_prompt(text).input_ids.tolist() == [nano_rows.question(text)]
    assert MAGIC_SUFFIX and chat.reason_prompt("a cat", text, num_images=1).input_ids[
        0
    ].tolist() == nano_rows.draw(text, magic=True)
    asked = chat.ask_prompt(text, grid_h=MERGED_SIDE, grid_w=MERGED_SIDE)
    assert asked.input_ids[0].tolist() == nano_rows.ask(text, merged_patches=16)
    assert asked.vision_tokens.stop - asked.vision_tokens.start == 16
    edited = chat.edit_prompt(text, grid_h=MERGED_SIDE, grid_w=MERGED_SIDE)
    row = nano_rows.edit(text, image_tokens=recipe.IMAGE_TOKENS, merged_patches=16)
    assert edited.input_ids.tolist() == [row, nano_rows.unconditional(row)]


@pytest.mark.parametrize("sharp", [False, True], ids=["ask", "edit"])
def test_images_are_prepared_as_the_runtime_does(chat: Chat, images: np.ndarray, sharp: bool) -> None:
    """Exactly by Pillow; in torch up to the rounding to bytes between two resizes, two levels of 255."""
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    config = vision_config(recipe.VISION)
    exact = patches(prepared(images, sharp=sharp), config).numpy()
    close = patches(seen(batch, sharp=torch.full((len(images),), sharp)), config).numpy()
    for index, image in enumerate(images):
        inputs = (
            runtime_image.edit_inputs(image, chat.model)[0]
            if sharp
            else runtime_image.ask_inputs(image, chat.model)
        )
        assert (inputs.grid_h, inputs.grid_w) == (MERGED_SIDE, MERGED_SIDE)
        np.testing.assert_allclose(exact[index], inputs.pixel_values, atol=1e-6)
        assert np.abs(close[index] - inputs.pixel_values).max() < 2.5 / 255 / min(layout.IMAGE_STD)
    square = runtime_image.edit_inputs(images[0], chat.model)[1]
    assert np.abs(square - batch[:1].numpy()).max() < 1e-6


def vision_config(values: dict):
    from reference.config import VisionConfig

    names = {
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "window_size",
        "out_hidden_size",
    }
    return VisionConfig(
        **{n: values[n] for n in names}, full_attention_blocks=tuple(values["fullatt_block_indexes"])
    )


def test_many_images_at_once_are_each_alone(nano_root: Path, images: np.ndarray) -> None:
    star = load_star(resolve_checkpoint(nano_root))
    image, sharp = (
        torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1,
        torch.tensor([True, False] * 3),
    )
    together, config = embeds_of(star.vision_encoder, seen(image, sharp=sharp)), star.config.vision
    cos, sin = vision.rotary_cos_sin(config, grid_h=8, grid_w=8)
    windows = vision.window_ids(config, grid_h=8, grid_w=8)
    assert len(windows.unique()) == 4
    for index, pixels in enumerate(patches(seen(image, sharp=sharp), config)):
        torch.testing.assert_close(
            together[index], star.vision_encoder(pixels, cos, sin, windows), rtol=1e-4, atol=1e-5
        )


def test_the_painter_draws_in_any_order_what_it_draws_alone(
    nano_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = Painter.from_checkpoint(nano_root, sampling=dict.fromkeys(SAMPLED, Sampling(2.0, 50, 0.9)))
    star = painter.star
    star.config = dataclasses.replace(star.config, vq=dataclasses.replace(star.config.vq, image_tokens=64))
    texts = ["a red circle", "three blue stars on a white background", "a green square"]
    together = painter.draw(texts, seed=40)
    alone = painter.draw(texts[1:2], seed=41)[0]
    assert np.abs(together[1].astype(int) - alone).max() <= 1  # truncation of a rounding error
    assert not np.array_equal(together[0], painter.draw(texts[:1], seed=99)[0])


def test_random_numbers_are_the_runtimes() -> None:
    from engines.runtime.gumbel import gumbel_noise as runtime_noise

    ours = gumbel_noise([100, 7], 63, 2048).numpy()
    for row, seed in zip(ours, (100, 7)):
        np.testing.assert_array_equal(row[None], runtime_noise(seed, image=0, steps=[63], size=2048))


def test_images_are_truncated_as_the_runtime_does() -> None:
    decoded = torch.linspace(-1.5, 1.5, 3 * 64 * 64).reshape(1, 3, 64, 64)
    np.testing.assert_array_equal(
        images_of(decoded)[0], runtime_image.images_from_decoded(decoded.numpy())[0]
    )


def test_an_over_long_prompt_is_refused_with_both_numbers(chat: Chat) -> None:
    from engines.inputs.prompt import check_length

    rows = chat.generate_prompt("circle " * 600, num_images=1).input_ids
    with pytest.raises(InputError, match=rf"at most {recipe.MAX_POSITIONS} tokens, got {rows.shape[1] + 63}"):
        check_length(
            text=rows.shape[1],
            image=0,
            new=chat.model.image_tokens - 1,
            limit_tokens=chat.model.max_positions,
        )


def test_a_sampling_file_that_is_wrong_is_refused(tmp_path: Path) -> None:
    from star_export.exporter.model_spec import sampling_specs

    path = tmp_path / "sampling.json"
    assert sampling_specs(path).edit.top_k == 1000
    path.write_text('{"edit": {"top_k": 1}}')
    assert sampling_specs(path).edit.top_k == 1 and sampling_specs(path).generate.top_k == 1000
    for text in (
        "{}x",
        '{"edit": {"guidance": "2"}}',
        '{"edit": {"guidance": NaN}}',
        '{"edit": {"cfg": 2.0}}',
        '{"guidance": 2.0}',
    ):
        path.write_text(text)
        with pytest.raises(InputError):
            sampling_specs(path)
