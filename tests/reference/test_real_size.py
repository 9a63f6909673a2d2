"""The checkpoint of real size has the release's files, names and shapes, and is written in bounded memory."""

from __future__ import annotations

import errno
import hashlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reference import noise, real_size
from reference.config import config_from_files
from reference.containers import tensors_from_pt, tensors_from_safetensors
from reference.errors import CheckpointError
from reference.names import SET_ASIDE
from reference.weights import named_tensors, resolve_checkpoint
from tests.helpers.released import SIZES, listed, qwen_json, star_json, without_set_aside, write_configs

SHAPES = {"a.weight": (300, 400), "a.bias": (7,), "norm.weight": (70_001,), "embed_tokens.weight": (9, 5)}


@pytest.fixture
def unfilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are laid out and not filled, so that a model of any size takes no disk and no time."""
    monkeypatch.setattr(real_size, "fill", lambda *_: None)
    monkeypatch.setattr(real_size.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 40))


@pytest.mark.parametrize("size", SIZES)
def test_names_shapes_and_files_are_the_releases(size: str, tmp_path: Path, unfilled: None) -> None:
    root = real_size.write_checkpoint(tmp_path / size, size)
    files = resolve_checkpoint(str(root))
    for path, keys in (
        (files.star_pt, f"star_keys_STAR-{size}.tsv"),
        (files.vq_pt, "star_keys_VQ-Model.tsv"),
    ):
        stored = {name: lazy.shape for name, lazy in tensors_from_pt(path).items()}
        # only the diffusion decoder is left out
        assert without_set_aside(stored) == without_set_aside(listed(keys))
        assert {n: s for n, s in stored.items() if n.startswith(SET_ASIDE)} == {
            n: s for n, s in listed(keys).items() if n.startswith(SET_ASIDE[1])
        }
    config = config_from_files(files.config_json, files.qwen_folder)
    assert config == write_configs(tmp_path / "facts", star_json(size), qwen_json(size))
    assert {lazy.dtype for lazy in named_tensors(files, config).values()} == {torch.bfloat16}
    shards = sorted(files.qwen_folder.glob("*.safetensors"))
    assert [path.stat().st_size <= 4.001e9 for path in shards] == [True] * {"3B": 2, "7B": 5}[size]
    assert sum(path.stat().st_blocks for path in root.rglob("*")) * 512 < 20e6, "laying out takes no disk"


def test_fewer_layers_leave_the_width(tmp_path: Path, unfilled: None) -> None:
    root = real_size.write_checkpoint(
        tmp_path / "small", "7B", layers=2, stacked_layers=1, vision_layers=1, vq_channels=32
    )
    files = resolve_checkpoint(str(root))
    config = config_from_files(files.config_json, files.qwen_folder)
    assert (config.base_ar.num_layers, config.stacked_ar.num_layers, config.vision.depth) == (2, 1, 1)
    assert (config.base_ar.hidden_size, config.vq.ch, config.vq.image_size) == (3584, 32, 384)
    named_tensors(files, config)


@pytest.mark.parametrize("key", [None, "state_dict"])
def test_files_hold_the_noise_at_the_stated_places(key: str | None, tmp_path: Path) -> None:
    told: list[int] = []
    pt, safetensors = tmp_path / "a.pt", tmp_path / "a.safetensors"
    noise.fill(pt, "pt", SHAPES, noise.laid_out_pt(pt, SHAPES, key=key), lambda _, count: told.append(count))
    noise.fill(safetensors, "st", SHAPES, noise.laid_out_safetensors(safetensors, SHAPES), lambda *_: None)
    assert sum(told) == noise.bytes_of(SHAPES)
    from_pt, from_safetensors = tensors_from_pt(pt), tensors_from_safetensors(safetensors)
    for name, shape in SHAPES.items():
        first, second = from_pt[name].load(), from_safetensors[name].load()
        assert first.shape == shape and torch.equal(first, second)
    weight, norm = from_pt["a.weight"].load().float(), from_pt["norm.weight"].load().float()
    assert abs(weight.std() * 400**0.5 - 1) < 0.01 and abs(weight.mean()) < 1e-3
    assert abs(norm.mean() - 1) < 1e-3 and abs(norm.std() / 0.05 - 1) < 0.05
    assert torch.load(pt, weights_only=True).keys() == ({key} if key else SHAPES.keys())


def test_the_noise_is_always_the_same() -> None:
    digest = hashlib.sha256(b"".join(piece.tobytes() for piece in noise.noise("a.weight", (300, 400))))
    assert digest.hexdigest() == "cb2d68447bee359c1eedcc63419ecd1f6efe9e4a1306e74e57baa58197e53828"


def test_no_piece_is_large() -> None:
    assert max(piece.nbytes for piece in noise.noise("embed_tokens.weight", (1000, 1000))) <= 1 << 17


def test_a_place_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    with pytest.raises(CheckpointError, match="the checkpoint's place is taken"):
        real_size.write_checkpoint(tmp_path, "3B")
    with pytest.raises(CheckpointError, match="got a file"):
        real_size.write_checkpoint(tmp_path / "mine", "3B")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_size.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(CheckpointError, match=r"expected 124\d{8} bytes free, got 1000000000"):
        real_size.write_checkpoint(tmp_path / "new", "3B")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_fills_up_leaves_whole_files_and_no_checkpoint(
    tmp_path: Path, unfilled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(path: Path, name: str, *_) -> None:
        if name == "STAR-3B.pt":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(real_size, "fill", fill)
    with pytest.raises(CheckpointError, match="STAR-3B.pt.partial: No space left on device"):
        real_size.write_checkpoint(tmp_path / "new", "3B")
    left = {path.name for path in (tmp_path / "new").rglob("*") if path.is_file()}
    assert left == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_an_impossible_size_is_refused_by_its_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert real_size.main(["3B", str(tmp_path / "new"), "--layers", "0"]) == 3
    assert "num_hidden_layers" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_the_diffusion_decoder_has_the_releases_size(tmp_path: Path, unfilled: None) -> None:
    few = {"layers": 1, "stacked_layers": 1, "vision_layers": 1, "vq_channels": 32}
    files = resolve_checkpoint(str(real_size.write_checkpoint(tmp_path / "3B", "3B", **few, diffusion=True)))
    config = files.config()
    assert config.diffusion and (config.diffusion.dit.num_layers, config.diffusion.dit.head_dim) == (26, 96)
    tensors = named_tensors(files, config)
    numbers = dict.fromkeys(("dit", "vae_encoder", "vae_decoder", "text_embedding", "text_encoder"), 0)
    for name, lazy in tensors.items():
        if (part := name.partition(".")[0]) in numbers:
            numbers[part] += math.prod(lazy.shape)
    assert numbers["dit"] == 2_625_106_880
    assert numbers["vae_encoder"] + numbers["vae_decoder"] == 83_819_683
    last_layer_and_norm = 77_865_984 + 2304  # which nothing uses
    assert numbers["text_embedding"] + numbers["text_encoder"] == 2_614_341_888 - last_layer_and_norm
