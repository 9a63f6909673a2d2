"""The oracle of an export: the reference with its weights rounded as the bundle stores them.

A released model whole in float32 takes 25 GB and more, so the weights stay in the memory-mapped checkpoint:
those of a module are read and rounded just before it runs, and dropped after it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from reference.config import StarConfig
from reference.containers import LazyTensor
from reference.model import pixel_adapter

from ..graph.precisions import Precision
from ..graph.quantize import StoredTensor
from ..graph.wrappers import TABLE, FoldedStar
from .activations import round_activations

ROWS = 1 << 12  # of the image table that are computed at a time
KEPT = 1 << 12  # numbers; a weight of so few, such as that of a norm, is read once and kept


def streamed_star(
    config: StarConfig,
    tensors: Mapping[str, LazyTensor],
    precision: Precision,
    *,
    rope_bf16: bool,
    narrow: bool = False,
) -> FoldedStar:
    """The reference on the CPU, with every weight of `tensors` rounded as `precision` stores it.

    It computes in float32, or if `narrow` in the types that `precision` has for its components. Activations
    are rounded too before products with nvfp4 weights.

    Its large weights are on the meta device except while the module that they belong to runs, or while it is
    `resident`. Running it raises CheckpointError for weights that are not finite.
    """
    with torch.device("meta"):
        star = FoldedStar(config, rope_bf16=rope_bf16)
    star = star.eval().requires_grad_(False)
    types = {
        name: precision.within(name).torch_dtype if narrow else torch.float32
        for name, _ in star.named_children()
    }
    for component, dtype in types.items():
        star.get_submodule(component).to(dtype)
    for name, value in star.constants().items():
        module, _, buffer = name.rpartition(".")
        setattr(star.get_submodule(module), buffer, value)

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        stored = isinstance(tensor, StoredTensor)
        weight = tensor.load() if stored else precision.rounded(name, tensor.load())
        return weight.to(types[name.partition(".")[0]])

    for prefix, module in star.named_modules():
        names = {key: f"{prefix}.{key}" for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, nn.Embedding):
            _read_rows(module, names["weight"], tensors, precision, types[prefix])
            continue
        for key, name in names.items():
            if getattr(module, key).numel() <= KEPT:
                setattr(module, key, nn.Parameter(read(name), requires_grad=False))
        large = {key: name for key, name in names.items() if getattr(module, key).is_meta}
        if large:
            _Streamed(module, module, large, read)
    round_activations(star, precision)
    _Streamed(
        star.vq_encoder, star.codebook, {"weight": "codebook.weight"}, read
    )  # it compares with all rows
    return star


def image_table(config: StarConfig, tensors: Mapping[str, LazyTensor]) -> Tensor:
    """adapter(codebook) [codebook_size, H] in float32, computed from the checkpoint's `tensors`."""
    adapter = pixel_adapter(config.vq.codebook_dim, config.base_ar.hidden_size, depth=config.adapter_depth)
    adapter.load_state_dict(
        {name: tensors[f"pixel_adapter.{name}"].load().float() for name in adapter.state_dict()}
    )
    codebook = tensors["codebook.weight"].load()
    with torch.inference_mode():
        return torch.cat([adapter(rows.float()) for rows in codebook.split(ROWS)])


def lazy_image_table(config: StarConfig, tensors: Mapping[str, LazyTensor]) -> LazyTensor:
    """The table of image embeddings, computed anew whenever it is loaded."""
    codebook = tensors["codebook.weight"]
    shape = (config.vq.codebook_size, config.base_ar.hidden_size)
    return LazyTensor(TABLE, shape, torch.float32, codebook.source, lambda: image_table(config, tensors))


@contextlib.contextmanager
def resident(*modules: nn.Module) -> Iterator[None]:
    """Keep the weights of `modules` of a streamed Star in memory during the block, to run them repeatedly."""
    within = [inner for module in modules for inner in module.modules()]
    held = [s for inner in within if isinstance(s := getattr(inner, "streamed", None), _Streamed)]
    try:
        for streamed in held:
            streamed.load()
            streamed.held = True
        yield
    finally:
        for streamed in held:
            streamed.held = False
            streamed.drop()


class _Streamed:
    """Loads parameters of `owner` (key -> weight's name) before `module` runs, and drops them after it."""

    def __init__(
        self, module: nn.Module, owner: nn.Module, names: Mapping[str, str], read: Callable[[str], Tensor]
    ):
        self.owner, self.names, self.read, self.held = owner, names, read, False
        self.empty = {key: getattr(owner, key) for key in names}
        module.streamed = self  # type: ignore[assignment]
        module.register_forward_pre_hook(lambda *_: None if self.held else self.load())
        module.register_forward_hook(lambda *_: None if self.held else self.drop(), always_call=True)

    def load(self) -> None:
        for key, name in self.names.items():
            setattr(self.owner, key, nn.Parameter(self.read(name), requires_grad=False))

    def drop(self) -> None:
        for key, parameter in self.empty.items():
            setattr(self.owner, key, parameter)


def _read_rows(
    module: nn.Embedding,
    name: str,
    tensors: Mapping[str, LazyTensor],
    precision: Precision,
    dtype: torch.dtype,
) -> None:
    """Let an embedding read only the rows that it is asked for: rounding is row by row."""

    def forward(input: Tensor) -> Tensor:
        rows = precision.rounded(name, tensors[name].load()[input.reshape(-1)])
        return rows.to(dtype).unflatten(0, input.shape)

    module.forward = forward  # type: ignore[method-assign]
