"""The tensors of a folder of safetensors: the shards of its index, or a single file.

Source: docs/star.md 2.2; transformers' `model.safetensors.index.json`.
"""

from __future__ import annotations

from pathlib import Path

from .containers import LazyTensor, tensors_from_safetensors
from .errors import CheckpointError
from .strict_json import Section, read_object


def tensors_from_folder(folder: Path) -> dict[str, LazyTensor]:
    """The tensors of a model of transformers: the shards of its index, or a single model.safetensors."""
    index_json, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index_json.exists():
        if not single.exists() and (pickles := sorted(folder.glob("*.bin"))):
            raise CheckpointError(
                "pickle files are not supported here",
                where=f"{pickles[0]}: expected model.safetensors or its index",
                fix="use the safetensors of the release, or convert it with safetensors.torch.save_file",
            )
        return tensors_from_safetensors(single)
    index = Section(read_object(index_json), source=index_json)
    weight_map = index.section("weight_map")
    index.finish(unused=frozenset({"metadata"}))
    shard_of = {name: weight_map.text(name) for name in weight_map.values}
    tensors: dict[str, LazyTensor] = {}
    for shard in sorted(set(shard_of.values())):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                "the index has an invalid shard name",
                where=f"{index_json}: expected a .safetensors beside the index, got {shard[:120]!r}",
                fix="use the unmodified index of the release",
            )
        for name, lazy in tensors_from_safetensors(folder / shard).items():
            if shard_of.get(name) != shard:
                raise CheckpointError(
                    "the index and the shards disagree",
                    where=f"{folder / shard}: {name[:120]}: the index says {shard_of.get(name, 'nothing')}",
                    fix="download the index and the shards of the same revision",
                )
            tensors[name] = lazy
    for name, shard in shard_of.items():
        if name not in tensors:
            raise CheckpointError(
                "the index and the shards disagree",
                where=f"{index_json}: {name[:120]}: expected in {shard}, but it is not there",
                fix="download the index and the shards of the same revision",
            )
    return tensors
