"""The miniature checkpoint is the one the golden arrays were computed on, and is published whole."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from reference import mini

SHA256 = "c22ccdc37d3fa412dd831ac6c36f7b29cbfaa9dd720806cab7e16ab1afae467b"


def test_tensors_are_the_golden_ones() -> None:
    digest = hashlib.sha256()
    for tensors in mini.state_dicts():
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].tobytes())
    assert digest.hexdigest() == SHA256


def test_files_hold_these_tensors(mini_checkpoint: Path) -> None:
    star, vq = mini.state_dicts()
    qwen = mini_checkpoint / "Qwen2.5-VL-mini"
    stored = {
        "llm." + name: tensor
        for shard in qwen.glob("*.safetensors")
        for name, tensor in load_file(shard).items()
    }
    stored |= torch.load(mini_checkpoint / "STAR-mini.pt", weights_only=True)["state_dict"]
    stored_vq = torch.load(mini_checkpoint / "VQ-Model.pt", weights_only=True, mmap=True)
    for expected, got in ((star, stored), (vq, stored_vq)):
        assert expected.keys() == got.keys()
        assert all(torch.equal(torch.from_numpy(array), got[name]) for name, array in expected.items())
    index = json.loads((qwen / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        array.nbytes for name, array in star.items() if name.startswith("llm.")
    )


def test_the_tokenizer_has_the_release_ids(mini_checkpoint: Path) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(mini_checkpoint / "Qwen2.5-VL-mini" / "tokenizer.json"))
    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|fim_pad|>")
    assert [tokenizer.token_to_id(token) for token in tokens] == [151643, 151644, 151645, 151655, 151662]
    assert tokenizer.decode(tokenizer.encode("a blue star, ünïcode").ids) == "a blue star, ünïcode"


def test_writing_again_leaves_the_same_files_and_nothing_else(mini_checkpoint: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "reference.mini", str(tmp_path / "again")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*"))
        for root in (mini_checkpoint, tmp_path / "again")
    ]
    assert names[0] == names[1]
    for path in mini_checkpoint.rglob("*"):
        if path.suffix in (".json", ".safetensors"):
            assert (
                path.read_bytes() == (tmp_path / "again" / path.relative_to(mini_checkpoint)).read_bytes()
            ), path.name


def test_an_interrupted_write_leaves_no_file_under_a_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mini, "write_shards", lambda *_: 1 / 0)
    monkeypatch.setattr(mini, "write_tokenizer", lambda *_: None)
    with pytest.raises(ZeroDivisionError):
        mini.write_checkpoint(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_configuration_gets_its_name_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it a folder is no checkpoint, so an interrupted move is noticed."""

    def write_files(root: Path, *, diffusion: bool) -> None:
        for name in ("A.pt", "STAR-mini.json", "VQ-Model.pt", "Qwen/config.json"):
            (root / name).parent.mkdir(exist_ok=True)
            (root / name).touch()

    moved: list[str] = []
    monkeypatch.setattr(mini, "write_files", write_files)
    monkeypatch.setattr(mini.os, "replace", lambda source, target: moved.append(target.name))
    mini.write_checkpoint(tmp_path / "new")
    assert len(moved) == 4 and moved[-1] == "STAR-mini.json"
