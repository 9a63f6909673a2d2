"""The diffusion decoder's files are loaded strictly, in every layout in which the release may hold them."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reference.config import config_from_files
from reference.diffusion import mini
from reference.diffusion.config import diffusion_from_folder
from reference.diffusion.names import DIT, stored_shapes
from reference.errors import CheckpointError
from reference.weights import load_star, named_tensors, resolve_checkpoint

TSV = Path(__file__).parents[2] / "golden" / "star_keys_STAR-3B.tsv"
DIGESTS = {
    16: "ed61e5545d3fc563952a9d24f024a488261d60f7a717ae8130e05044028821fe",
    512: "22ec2f1ed665453cabdb599530d31046743ab0166590acb4454f47626e15d080",
}


@pytest.fixture
def folder(diffusion_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the miniature checkpoint, whose base model and VQ model are links."""
    root = tmp_path / "checkpoint"
    shutil.copytree(diffusion_checkpoint / mini.FOLDER, root / mini.FOLDER)
    for path in diffusion_checkpoint.iterdir():
        if path.name != mini.FOLDER:
            (root / path.name).symlink_to(path)
    return root


def change(path: Path, **values: object) -> None:
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def refusal(root: Path, **parts: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        files = resolve_checkpoint(root, **parts)
        named_tensors(files, files.config(), headers_only=True)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and caught.value.exit_code == 3
    return " ".join(lines)


@pytest.mark.parametrize("channels", DIGESTS)
def test_the_miniatures_names_and_numbers_are_those_of_the_official_arrays(
    tmp_path: Path, channels: int
) -> None:
    mini.write_folder(tmp_path, vq_channels=channels)
    config = diffusion_from_folder(tmp_path / mini.FOLDER, vq_channels=channels)
    sha = hashlib.sha256()
    for tensors in mini.state_dicts(config).values():
        for name in sorted(tensors):
            sha.update(name.encode() + np.ascontiguousarray(tensors[name]).tobytes())
    assert sha.hexdigest() == DIGESTS[channels]


def test_at_release_size_names_shapes_and_counts_are_the_releases(tmp_path: Path) -> None:
    for name, values in mini.SETTINGS.items():
        mini.write_json(tmp_path / name, values | mini.RELEASE.get(name, {}))
    shapes = stored_shapes(diffusion_from_folder(tmp_path, vq_channels=512))
    lines = [line.split("\t") for line in TSV.read_text().splitlines() if line.startswith(DIT)]
    expected = {name: tuple(map(int, shape.split("x"))) for name, shape in lines}
    assert shapes["dit"] == expected and len(expected) == 462
    counts = {part: sum(map(math.prod, found.values())) for part, found in shapes.items()}
    assert counts == {"dit": 2_625_106_880, "vae": 83_819_683, "text_encoder": 2_614_341_888}


def test_without_the_folder_the_decoder_is_set_aside(folder: Path) -> None:
    shutil.rmtree(folder / mini.FOLDER)
    files = resolve_checkpoint(folder)
    assert files.lumina_folder is None and files.config().diffusion is None
    assert not any(name.startswith("dit.") for name in named_tensors(files, files.config()))


def test_both_spellings_of_the_text_encoder_load_alike(folder: Path, diffusion_checkpoint: Path) -> None:
    """`model.` before all names, in one file, and transformers 5's `rope_parameters`."""
    text = folder / mini.FOLDER / "text_encoder"
    tensors = {f"model.{n}": t for path in text.glob("*.safetensors") for n, t in load_file(path).items()}
    for path in text.glob("model*"):
        path.unlink()
    save_file(tensors, text / "model.safetensors")
    theta = {"rope_theta": 10000.0, "rope_type": "default"}
    change(text / "config.json", rope_parameters=theta, rope_theta="absent", dtype="float32")
    expected = load_star(resolve_checkpoint(diffusion_checkpoint)).state_dict()
    found = load_star(resolve_checkpoint(folder)).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("file", "values", "told"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "Lumina2Pipeline"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "Gemma2Model"),
        ("model_index.json", {"vae": "absent"}, "vae"),
        ("model_index.json", {"safety_checker": [None, None]}, "unknown key"),
        ("transformer/config.json", {"hidden_size": 96}, "axes_dim_rope"),
        ("transformer/config.json", {"cap_feat_dim": 64}, "48 (the text encoder's hidden_size)"),
        ("transformer/config.json", {"num_layers": 4}, "layers.3"),
        ("transformer/config.json", {"patch_size": 1}, "patch_size"),
        ("vae/config.json", {"use_quant_conv": True}, "use_quant_conv"),
        ("vae/config.json", {"latent_channels": 4}, "in_channels"),
        ("vae/config.json", {"block_out_channels": [16, 32, 32]}, "down_block_types"),
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
        ("scheduler/scheduler_config.json", {"shift": float("nan")}, "finite"),
        ("text_encoder/config.json", {"model_type": "llama"}, "gemma2"),
        ("text_encoder/config.json", {"vocab_size": 1000}, "embed_tokens.weight: expected shape [1000, 48]"),
    ],
)
def test_the_folder_of_another_model_is_refused_by_name(
    folder: Path, file: str, values: dict, told: str
) -> None:
    change(folder / mini.FOLDER / file, **values)
    assert told in refusal(folder)


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("vae", "lacks a part"),
        ("tokenizer", "lacks a part"),
        ("model_index.json", "expected model_index.json"),
        ("text_encoder/config.json", "does not exist"),
        ("vae/diffusion_pytorch_model.safetensors", "does not exist"),
        ("text_encoder/model-00002-of-00002.safetensors", "does not exist"),
    ],
)
def test_a_missing_part_is_named(folder: Path, gone: str, told: str) -> None:
    path = folder / mini.FOLDER / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert told in refusal(folder)


def test_a_star_file_without_diffusion_tensors_is_told(folder: Path, mini_checkpoint: Path) -> None:
    told = refusal(folder, checkpoint=mini_checkpoint / "STAR-mini.pt")
    assert "tensors differ" in told and "holds no diffusion decoder" in told


def test_a_transformer_for_another_codebook_is_told(folder: Path) -> None:
    tensors = torch.load(folder / "STAR-mini.pt", weights_only=True)["state_dict"]
    tensors |= mini.write_folder(folder, vq_channels=512)
    (folder / "STAR-mini.pt").unlink()
    torch.save({"state_dict": tensors}, folder / "STAR-mini.pt")
    assert "x_embedder.weight: expected shape [64, 128], got [64, 2112]" in refusal(folder)


def test_a_checkpoint_without_a_folder_is_as_it_was(mini_checkpoint: Path) -> None:
    files = resolve_checkpoint(mini_checkpoint)
    assert files.config() == config_from_files(files.config_json, files.qwen_folder)
    assert files.config().diffusion is None
