"""Weights and configuration must fit exactly;
all differences are reported at once, before any read (docs/bad_inputs.md 6, 10)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from reference import mini_tensors
from reference.config import config_from_files
from reference.containers import LazyTensor
from reference.errors import CheckpointError
from reference.model import Star
from reference.weights import CheckpointFiles, load_star, named_tensors, resolve_checkpoint
from tests.helpers.refusals import refused
from tests.helpers.released import qwen_json, star_json

QWEN = "Qwen2.5-VL-mini"
SHARDS = [f"{QWEN}/model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
Put = Callable[[str, bytes | str], Path]


def tensors_of(files: CheckpointFiles) -> dict[str, LazyTensor]:
    return named_tensors(files, config_from_files(files.config_json, files.qwen_folder))


def trained(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "STAR-mini.pt", weights_only=True)["state_dict"]


def save_trained(folder: Path, tensors: object) -> None:
    (folder / "STAR-mini.pt").unlink()
    torch.save(tensors, folder / "STAR-mini.pt")


def save_base(folder: Path, shards: list[dict[str, Tensor]]) -> None:
    for name, shard in zip(SHARDS, shards, strict=True):
        (folder / name).unlink()
        save_file(shard, folder / name)
    index = folder / QWEN / "model.safetensors.index.json"
    index.unlink()
    index.write_text(
        json.dumps(
            {"metadata": {}, "weight_map": {k: Path(n).name for n, s in zip(SHARDS, shards) for k in s}}
        )
    )


def same_numbers(star: Star, other: Star) -> bool:
    state, expected = star.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(
        torch.equal(state[name], expected[name]) for name in expected
    )


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: LazyTensor) -> Tensor:
        raise AssertionError(f"{self.name} was read before the comparison was over")

    monkeypatch.setattr(LazyTensor, "load", load)


def test_all_kinds_of_difference_are_told_at_once(folder: Path, nothing_is_read: None) -> None:
    tensors = trained(folder)
    del tensors["pixel_adapter.layers.0.bias"]
    tensors["pixel_adapter.layers.4.weight"] = torch.zeros(2)
    tensors["stacked_ar.model.norm.weight"] = torch.zeros(65)
    tensors["pixel_output_head.bias"] = torch.zeros(1024, dtype=torch.int64)
    save_trained(folder, {"state_dict": tensors})
    with refused(
        "4 tensors differ",
        "STAR-mini.pt: pixel_adapter.layers.0.bias: missing",
        "pixel_adapter.layers.4.weight: unexpected",
        "stacked_ar.model.norm.weight: expected shape [64], got [65]",
        "pixel_output_head.bias: expected a float of 16, 32 or 64 bits, got int64",
    ):
        load_star(resolve_checkpoint(folder))


def test_ten_are_named_and_all_are_counted(folder: Path, nothing_is_read: None) -> None:
    tensors = {name + ".old": tensor for name, tensor in trained(folder).items()}
    save_trained(folder, tensors)
    with pytest.raises(CheckpointError) as caught:
        load_star(resolve_checkpoint(folder))
    assert f"{2 * len(tensors)} tensors differ" in caught.value.what
    *named, more = caught.value.where.split("; ")
    assert len(named) == 10 and more == f"and {2 * len(tensors) - 10} more"


def test_differences_of_all_three_files_come_together(folder: Path, nothing_is_read: None) -> None:
    save_trained(
        folder, {"state_dict": {k: v for k, v in trained(folder).items() if k != "pixel_output_head.bias"}}
    )
    shards = [load_file(folder / name) for name in SHARDS]
    shards[0]["visual.merger.ln_q.weight"] = torch.zeros(3)
    save_base(folder, shards)
    vq = torch.load(folder / "VQ-Model.pt", weights_only=True, mmap=True)
    del vq["decoder.conv_blocks.4.res.2.conv1.bias"]
    (folder / "VQ-Model.pt").unlink()
    torch.save(vq, folder / "VQ-Model.pt")
    with refused(
        "3 tensors differ",
        "pixel_output_head.bias: missing",
        "visual.merger.ln_q.weight: expected shape [64], got [3]",
        "VQ-Model.pt: decoder.conv_blocks.4.res.2.conv1.bias: missing",
    ):
        load_star(resolve_checkpoint(folder))


@pytest.mark.parametrize("size", ["3B", "7B"])
def test_the_configuration_of_another_model_is_refused_before_anything_is_read(
    folder: Path, put: Put, size: str, nothing_is_read: None
) -> None:
    put("STAR-mini.json", json.dumps(star_json(size)))
    put(f"{QWEN}/config.json", json.dumps(qwen_json(size)))
    files = resolve_checkpoint(folder, base=folder / QWEN, vq=folder / "VQ-Model.pt")
    with refused("tensors differ", "missing", "and ", f"STAR-mini.json describes STAR_Qwen2.5-{size}_VQGAN"):
        load_star(files)


def test_one_changed_size_in_the_configuration_is_refused(
    folder: Path, put: Put, nothing_is_read: None
) -> None:
    config = (folder / QWEN / "config.json").read_text()
    put(f"{QWEN}/config.json", config.replace('"intermediate_size": 160', '"intermediate_size": 320'))
    with refused("18 tensors differ", "mlp.gate_proj.weight: expected shape [320, 64], got [160, 64]"):
        load_star(resolve_checkpoint(folder))


def test_newer_names_are_read(folder: Path, stars: dict[bool, Star]) -> None:
    def newer(name: str) -> str:
        if name.startswith("visual."):
            return "model." + name
        return name.replace("model.", "model.language_model.", 1) if not name.startswith("lm_head.") else name

    save_base(
        folder,
        [{newer(name): tensor for name, tensor in load_file(folder / shard).items()} for shard in SHARDS],
    )
    save_trained(
        folder,
        {
            name.replace("stacked_ar.model.", "stacked_ar.model.language_model."): tensor
            for name, tensor in trained(folder).items()
        },
    )
    assert same_numbers(load_star(resolve_checkpoint(folder)), stars[True])


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_what_a_wrapper_put_before_all_names_is_taken_off(
    folder: Path, wrapper: str, stars: dict[bool, Star]
) -> None:
    vq = torch.load(folder / "VQ-Model.pt", weights_only=True)
    (folder / "VQ-Model.pt").unlink()
    torch.save({wrapper + name: tensor for name, tensor in vq.items()}, folder / "VQ-Model.pt")
    save_trained(folder, {"model": {wrapper + name: tensor for name, tensor in trained(folder).items()}})
    assert same_numbers(load_star(resolve_checkpoint(folder)), stars[True])


def test_a_difference_has_the_files_own_name_too(folder: Path, nothing_is_read: None) -> None:
    tensors = {"module." + name: tensor for name, tensor in trained(folder).items()}
    tensors["module.stacked_ar.model.language_model.norm.weight"] = torch.zeros(65)
    del tensors["module.stacked_ar.model.norm.weight"]
    save_trained(folder, tensors)
    with refused(
        "stacked_ar.model.norm.weight (in the file: module.stacked_ar.model.language_model.norm.weight): "
        "expected shape [64], got [65]"
    ):
        load_star(resolve_checkpoint(folder))
    save_trained(folder, {"ema." + name.removeprefix("module."): tensor for name, tensor in tensors.items()})
    with refused("STAR-mini.pt: ema.", ": unexpected", ": missing"):  # a prefix that no wrapper is known for
        load_star(resolve_checkpoint(folder))


def test_one_tensor_under_both_names_is_refused(folder: Path, nothing_is_read: None) -> None:
    tensors = trained(folder)
    tensors["stacked_ar.model.language_model.norm.weight"] = tensors["stacked_ar.model.norm.weight"]
    save_trained(folder, tensors)
    with refused("stacked_ar.model.language_model.norm.weight: also present as stacked_ar.model.norm.weight"):
        load_star(resolve_checkpoint(folder))


def test_diffusion_and_usage_tensors_are_set_aside(folder: Path, stars: dict[bool, Star]) -> None:
    tensors = trained(folder) | {
        "diffusion_decoder.transformer.x_embedder.weight": torch.full((4, 4), torch.nan),
        "diffusion_decoder.vae.encoder.bias": torch.zeros(2, dtype=torch.int64),
    }
    save_trained(folder, tensors)  # a bare dictionary
    assert same_numbers(load_star(resolve_checkpoint(folder)), stars[True])


def test_tied_embeddings_are_one_parameter(folder: Path, put: Put) -> None:
    config = (folder / QWEN / "config.json").read_text()
    put(f"{QWEN}/config.json", config.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with refused("text head is not its token embedding", "lm_head.weight", "tie_word_embeddings"):
        load_star(resolve_checkpoint(folder))
    files = resolve_checkpoint(folder)
    named_tensors(files, config_from_files(files.config_json, files.qwen_folder), headers_only=True)
    shards = [load_file(folder / name) for name in SHARDS]
    shards[1]["lm_head.weight"] = shards[1]["model.embed_tokens.weight"].clone()  # as some versions save it
    save_base(folder, shards)
    load_star(resolve_checkpoint(folder))
    del shards[1]["lm_head.weight"]
    save_base(folder, shards)
    files = resolve_checkpoint(folder)
    star = load_star(files)
    assert star.text_head.weight is star.token_embedding.weight
    assert torch.equal(star.text_head.weight, shards[1]["model.embed_tokens.weight"])
    assert tensors_of(files).keys() == star.state_dict().keys()


def test_index_and_shards_must_agree(folder: Path, put: Put) -> None:
    name = f"{QWEN}/model.safetensors.index.json"
    index = json.loads((folder / name).read_text())
    for change, told in [
        ({"visual.merger.ln_q.weight": "model-00002-of-00002.safetensors"}, "visual.merger.ln_q.weight"),
        ({"visual.more": "model-00001-of-00002.safetensors"}, "visual.more"),
        ({"lm_head.weight": "../../outside.safetensors"}, "invalid shard name"),
        ({"lm_head.weight": "/dev/zero"}, "invalid shard name"),
        ({"lm_head.weight": 3}, "weight_map.lm_head.weight"),
    ]:
        put(name, json.dumps(index | {"weight_map": index["weight_map"] | change}))
        with refused(told):
            load_star(resolve_checkpoint(folder))
    put(
        name,
        json.dumps(
            index | {"weight_map": {k: v for k, v in index["weight_map"].items() if k != "lm_head.weight"}}
        ),
    )
    with refused("lm_head.weight", "the index says nothing"):
        load_star(resolve_checkpoint(folder))


def test_a_single_file_needs_no_index(folder: Path, stars: dict[bool, Star]) -> None:
    both = load_file(folder / SHARDS[0]) | load_file(folder / SHARDS[1])
    for path in (folder / QWEN).glob("model*"):
        path.unlink()
    save_file(both, folder / QWEN / "model.safetensors")
    assert same_numbers(load_star(resolve_checkpoint(folder)), stars[True])


def test_weights_that_are_not_finite_stop_the_loading(folder: Path) -> None:
    tensors = trained(folder)
    tensors["pixel_output_head.bias"][7] = torch.nan
    save_trained(folder, tensors)
    with refused("not finite", "STAR-mini.pt: pixel_output_head.bias: 1 of 1024 numbers"):
        load_star(resolve_checkpoint(folder))


def test_names_shapes_and_dtypes_are_the_models(mini_files: CheckpointFiles, star: Star) -> None:
    lazy = tensors_of(mini_files)
    expected = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in star.state_dict().items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in lazy.items()} == expected
    patch = lazy["vision_encoder.patch_embed.weight"].load()
    stored = mini_tensors.tensor("llm.visual.patch_embed.proj.weight", (64, 3, 2, 14, 14))
    assert torch.equal(patch, torch.from_numpy(stored).float().reshape(64, 1176))


@pytest.mark.parametrize("name", ["token_embedding.weight", "image_head.bias", "codebook.weight"])
def test_stored_numbers_stay_memory_mapped(mini_files: CheckpointFiles, star: Star, name: str) -> None:
    """What is stored in the wanted dtype is not copied: its address lies in a mapping of its file."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list its mappings")
    address, source = star.get_parameter(name).data_ptr(), tensors_of(mini_files)[name].source
    spans = [line.split() for line in maps.read_text().splitlines() if line.endswith(str(source.resolve()))]
    assert any(
        int(start, 16) <= address < int(end, 16) for start, end in (span[0].split("-") for span in spans)
    )


def test_another_dtype_can_be_asked_for(mini_files: CheckpointFiles) -> None:
    star = load_star(mini_files, dtype=torch.bfloat16)
    assert {p.dtype for p in star.parameters()} == {
        torch.bfloat16
    } and star.base_ar.rotary.inv_freq.dtype == torch.float32
    assert not star.training and not any(p.requires_grad for p in star.parameters())
