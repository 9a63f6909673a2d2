"""The reference's diffusion decoder computes what the official code computed, in every array and rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from reference.diffusion import mini, tasks
from reference.diffusion.config import DiffusionConfig, diffusion_from_folder
from reference.diffusion.dit import (
    DiT,
    map_from_patches,
    patches_from_map,
    rotary_cos_sin,
    time_features,
)
from reference.diffusion.names import DIT
from reference.mini_tensors import tensor
from reference.model import Star
from reference.weights import load_star, resolve_checkpoint
from tests.helpers.official_diffusion import (
    CASES,
    LIMIT,
    SYSTEM_PROMPT,
    arrays,
    check_image,
    error,
    golden,
)

VARIANTS = ("", "bf16_sigmas.", "bf16_tables.")  # what is rounded: nothing, the sigmas, the frequencies too
STEPWISE = [name for name in CASES if f"{name}.latents" in arrays()]
TRACED = [name for name in CASES if f"{name}.trace.input" in arrays()]
MAX_TOKENS = 256


@dataclass
class Decoder:
    """A model with the official arrays' weights: the text encoder's frequencies rounded, or not."""

    star: Star
    config: DiffusionConfig
    dit: DiT
    codebook: nn.Embedding


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[DiT, nn.Embedding]:
    """The transformer for the release's codebook of 512 channels, and that codebook."""
    folder = tmp_path_factory.mktemp("wide")
    tensors = mini.write_folder(folder, vq_channels=512)
    config = diffusion_from_folder(folder / mini.FOLDER, vq_channels=512)
    with torch.device("meta"):
        dit = DiT(config.dit)
    dit.load_state_dict({n.removeprefix(DIT): t.float() for n, t in tensors.items()}, assign=True)
    codebook = torch.from_numpy(tensor("pixel_encoder.quantize.embedding.weight", (1024, 512)))
    return dit.eval().requires_grad_(False), nn.Embedding.from_pretrained(codebook)


@pytest.fixture(scope="module")
def decoder_of(diffusion_checkpoint: Path, wide: tuple[DiT, nn.Embedding]) -> Callable[[str, str], Decoder]:
    """(case, variant) -> the model that the case was computed with."""
    files = resolve_checkpoint(diffusion_checkpoint)
    stars = {rope_bf16: load_star(files, rope_bf16=rope_bf16) for rope_bf16 in (False, True)}

    def decoder(case: str, variant: str = "") -> Decoder:
        star = stars[variant == "bf16_tables."]
        own = (star.dit, star.codebook) if CASES[case]["vq_dim"] == 16 else wide
        return Decoder(star, star.config.diffusion, *own)

    return decoder


def side_of(case: str) -> int:
    return CASES[case]["resolution"] // 8


def captions(decoder: Decoder, case: str) -> tuple[Tensor, Tensor]:
    """The case's caption and the empty one, as the text encoder makes them."""
    star = decoder.star
    ids = golden(f"{case}.prompt_ids"), torch.tensor([2])
    return tuple(tasks.encode_text(star.text_embedding, star.text_encoder, i[None]) for i in ids)


def rows_of(decoder: Decoder, case: str) -> dict[str, tasks.Row]:
    caption, empty = captions(decoder, case)
    vq = tasks.vq_map(decoder.codebook, golden(f"{case}.codes"), side=side_of(case))
    if CASES[case]["task"] == "t2i":
        return tasks.generate_rows(caption, empty, vq, latent_channels=16)
    moments = decoder.star.vae_encoder(source_of(case))
    source = tasks.source_latent(moments, golden(f"{case}.source_noise"), decoder.config.vae)
    return tasks.edit_rows(caption, empty, vq, source)


def source_of(case: str) -> Tensor:
    from PIL import Image

    side = tasks.SOURCE_SIDE
    image = Image.fromarray(arrays()[f"{case}.image"]).resize((side, side), Image.Resampling.BILINEAR)
    square = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(side, side, 3)
    return tasks.source_from_square(square, side=CASES[case]["resolution"])


def guidance_of(case: str) -> tasks.Guidance:
    c = CASES[case]
    return tasks.Guidance(text=c["g_txt"], image=c["g_img"], vq=c.get("g_vq", 0.0))


def painted(decoder: Decoder, case: str, variant: str) -> list[tasks.Step]:
    steps = tasks.schedule(CASES[case]["steps"], shift=decoder.config.time_shift, sigmas_bf16=bool(variant))
    return list(
        tasks.paint(decoder.dit, rows_of(decoder, case), golden(f"{case}.noise"), steps, guidance_of(case))
    )


def test_the_prompts_ids_are_the_official_ones(diffusion_checkpoint: Path) -> None:
    tokenizer = Tokenizer.from_file(str(diffusion_checkpoint / mini.FOLDER / "tokenizer" / "tokenizer.json"))
    for name, case in CASES.items():
        ids = tokenizer.encode(SYSTEM_PROMPT + case["prompt"]).ids[:MAX_TOKENS]
        assert ids == arrays()[f"{name}.prompt_ids"].tolist(), name
    assert tokenizer.encode("").ids == arrays()["t2i0.empty_ids"].tolist()


@pytest.mark.parametrize("case", STEPWISE)
def test_encodes_text_and_codes(decoder_of, case: str) -> None:
    decoder = decoder_of(case)
    caption, empty = captions(decoder, case)
    assert error(caption[0], f"{case}.prompt_embeds") <= LIMIT
    if f"{case}.empty_embeds" in arrays():
        assert error(empty[0], f"{case}.empty_embeds") <= LIMIT
    if f"{case}.vq_map" in arrays():
        vq = tasks.vq_map(decoder.codebook, golden(f"{case}.codes"), side=side_of(case))
        assert error(vq, f"{case}.vq_map") <= LIMIT
    rounded, _ = captions(decoder_of(case, "bf16_tables."), case)
    assert error(rounded[0], f"{case}.bf16_tables.prompt_embeds") <= LIMIT


def test_soft_capping_is_not_applied(decoder_of) -> None:
    caption, _ = captions(decoder_of("t2i0"), "t2i0")
    assert error(caption[0], "t2i0.prompt_embeds_softcapped") > 1e3 * LIMIT


@pytest.mark.parametrize("name", [*CASES, "schedule40", "schedule50"])
def test_schedules(name: str) -> None:
    count = len(arrays()[f"{name}.times"])
    exact, rounded = (tasks.schedule(count, shift=6.0, sigmas_bf16=bf16) for bf16 in (False, True))
    assert error(exact.sigmas, f"{name}.sigmas") <= 1e-7
    assert torch.equal(rounded.sigmas, golden(f"{name}.sigmas_bf16"))
    assert error(exact.sigmas[:-1] * 1000, f"{name}.timesteps") <= 1e-7
    for found in (exact, rounded):
        assert error(found.times, f"{name}.times") <= 1e-7


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["task"] == "edit"])
def test_encodes_the_source(decoder_of, case: str) -> None:
    decoder, source = decoder_of(case), source_of(case)
    assert error(source, f"{case}.source") <= LIMIT
    moments = decoder.star.vae_encoder(source)
    assert error(moments, f"{case}.source_moments") <= LIMIT
    latent = tasks.source_latent(moments, golden(f"{case}.source_noise"), decoder.config.vae)
    assert error(latent, f"{case}.source_latent") <= LIMIT


@pytest.mark.parametrize("variant", VARIANTS, ids=["exact", "bf16_sigmas", "bf16_tables"])
@pytest.mark.parametrize("case", STEPWISE)
def test_paints_step_by_step(decoder_of, case: str, variant: str) -> None:
    decoder = decoder_of(case, variant)
    steps = painted(decoder, case, variant)
    for name in ("guided", "latents"):
        if f"{case}.{variant}{name}" in arrays():
            found = torch.stack([getattr(step, name) for step in steps])
            assert error(found, f"{case}.{variant}{name}") <= LIMIT, name
    decoded = decoder.star.vae_decoder(steps[-1].latents)
    if f"{case}.{variant}decoded" in arrays():
        assert error(decoded, f"{case}.{variant}decoded") <= LIMIT
    check_image(tasks.images_from_decoded(decoded), f"{case}.{variant}result")


@pytest.mark.parametrize("variant", VARIANTS, ids=["exact", "bf16_sigmas", "bf16_tables"])
@pytest.mark.parametrize("case", ["t2i40", "edit50"])
def test_paints_with_the_releases_numbers_of_steps(decoder_of, case: str, variant: str) -> None:
    decoder = decoder_of(case, variant)
    latents = painted(decoder, case, variant)[-1].latents
    assert error(latents, f"{case}.{variant}final_latents") <= LIMIT
    image = tasks.images_from_decoded(decoder.star.vae_decoder(latents))
    check_image(image, f"{case}.{variant}result")


@pytest.mark.parametrize("case", STEPWISE)
def test_each_row_has_the_official_velocity(decoder_of, case: str) -> None:
    decoder, rows = decoder_of(case), rows_of(decoder_of(case), case)
    names = "t" if CASES[case]["g_txt"] <= 1 else rows
    found = []
    for step in arrays()[f"{case}.dit_steps"].tolist():
        latents = golden(f"{case}.latents")[step - 1] if step else golden(f"{case}.noise")
        time = float(golden(f"{case}.times")[step])
        found.append(torch.stack([tasks.velocity(decoder.dit, rows[name], latents, time) for name in names]))
    assert error(torch.stack(found), f"{case}.dit_rows") <= LIMIT


@pytest.mark.parametrize("case", TRACED)
def test_every_stage_inside_the_transformer(decoder_of, case: str) -> None:
    """The rows one by one, without padding; past a row's end the official arrays hold zeros."""
    dit, rows = decoder_of(case).dit, rows_of(decoder_of(case), case)
    time, latents = time_features(float(golden(f"{case}.times")[1])), golden(f"{case}.latents")[0]
    names, side = ("u", "i", "t"), side_of(case) // 2
    lengths = [rows[name].caption.shape[1] for name in names]
    assert lengths == arrays()[f"{case}.trace.caption_lengths"].tolist()
    longest, tokens = max(lengths), 2 * side * side
    found: dict[str, list[Tensor]] = {}
    seen: dict[str, Tensor] = {}

    def watch(module: nn.Module, name: str):
        def keep(module, given, output):
            seen[name] = output[0]

        return module.register_forward_hook(keep)

    block = dit.layers[0]
    hooks = [
        watch(dit.x_embedder, "x_embedder"),
        watch(dit.time_caption_embed.timestep_embedder, "time_embed"),
        watch(dit.time_caption_embed.caption_embedder, "caption_embed"),
        watch(dit.context_refiner[-1], "context_refiner"),
        watch(dit.noise_refiner[-1], "noise_refiner"),
        watch(dit.ori_inp_refiner, "ori_inp_refiner"),
        watch(block.attn, "layer0_attn"),
        watch(block, "layer0"),
        watch(dit.layers[-1], "layer_last"),
    ]
    for name in names:
        row = rows[name]
        upper, lower = (torch.cat([x, row.vq_map], dim=1) for x in (latents, row.source))
        stacked = torch.cat([upper, lower], dim=2)
        velocity = tasks.velocity(dit, row, latents, float(golden(f"{case}.times")[1]))
        length = row.caption.shape[1]
        cos, sin = rotary_cos_sin(dit.config, caption_tokens=length, side=side)
        time_embed = dit.time_caption_embed.timestep_embedder(time)
        whole = dit.norm_out(seen["layer_last"][None], time_embed)
        halves = whole[:, length:].unflatten(2, (4, -1)).chunk(2, dim=1)
        both = torch.cat([map_from_patches(half) for half in halves], dim=2)
        assert torch.equal(both[:, :, : 2 * side], velocity)
        seen |= {
            "input": stacked[0],
            "patches": patches_from_map(stacked)[0].flatten(1),
            "norm_out": whole[0],
        }
        seen |= {"output": both[0], "rope": torch.stack([cos, sin], dim=-1)}
        for stage, value in seen.items():
            if value.shape[0] == length + tokens:
                filling = value.new_zeros(longest - length, *value.shape[1:])
                value = torch.cat([value, filling])
            found.setdefault(stage, []).append(value)
    for hook in hooks:
        hook.remove()
    captioned = {"time_embed": -1, "caption_embed": -1, "context_refiner": -1}
    for stage, values in found.items():
        value = values[captioned[stage]] if stage in captioned else torch.stack(values)
        assert error(value, f"{case}.trace.{stage}") <= LIMIT, stage
    for empty in found["context_refiner"][:2]:
        assert error(empty, f"{case}.trace.empty_context_refiner") <= LIMIT
    checked = {*found, "empty_context_refiner", "caption_lengths"}
    assert checked == {n.rpartition(".")[2] for n in arrays() if n.startswith(f"{case}.trace.")}
