"""The same decode step in PyTorch: the reference's own modules with static caches, eager, compiled, and
captured in a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable

from reference.config import StarConfig


class TorchStep:
    """`step(index)` runs base_ar, stacked_ar and the image head on weights of noise, for `images` images
    (two rows each) and `positions` new positions; everything it touches has a fixed address, so it can be
    captured.
    """

    def __init__(
        self, modules: dict, config: StarConfig, *, images: int, positions: int, capacity_tokens: int
    ):
        import torch

        self.torch, self.modules = torch, modules
        weight = modules["base_ar"].norm.weight
        self.rows, self.positions, self.dtype, self.device = (
            2 * images,
            positions,
            weight.dtype,
            weight.device,
        )
        with torch.device(self.device):
            self.write_indices = torch.zeros(self.rows, dtype=torch.int64)
            self.position_ids = torch.zeros(3, self.rows, positions, dtype=torch.int64)
            self.embeds = torch.randn(self.rows, positions, config.base_ar.hidden_size)
            self.image_ids = torch.zeros(images, positions, dtype=torch.int64)
            self.settings = (
                torch.tensor([1.1]),
                torch.tensor([1000]),
                torch.tensor([0.8]),
                torch.full((images, positions, config.vq.codebook_size), 0.5),
            )
        self.caches = {
            name: modules[name].new_cache(self.rows, capacity_tokens=capacity_tokens)
            for name in ("base_ar", "stacked_ar")
        }
        self.graph = None

    def go_to(self, index: int) -> None:
        """The next step writes from slot `index` on."""
        self.write_indices.copy_(self.torch.full((self.rows,), index))
        self.position_ids.copy_(
            self.torch.arange(index, index + self.positions).expand(3, self.rows, self.positions).contiguous()
        )

    def forward(self) -> None:
        """The step's work on the device, at the slot that `go_to` said."""
        hidden = self.embeds.to(self.dtype)
        for name in ("base_ar", "stacked_ar"):
            hidden, _ = self.modules[name](hidden, self.position_ids, self.write_indices, self.caches[name])
        image_ids, embeds, _ = self.modules["image_head"](hidden.float(), *self.settings)
        self.image_ids.copy_(image_ids)
        self.embeds.copy_(embeds)

    def step(self, index: int) -> None:
        """The whole step, by replaying the graph where one is captured."""
        self.go_to(index)
        self.graph.replay() if self.graph else self.forward()

    def capture(self) -> None:
        """Put the step into one CUDA graph, after a warm-up on another stream as capturing asks for."""
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):
                self.forward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.inference_mode():
            self.forward()
        self.graph = graph


def modules_of(config: StarConfig, *, device: str, dtype: str) -> dict:
    """base_ar, stacked_ar and the image head with weights of noise, made where they stay."""
    import torch

    from reference.decoder import Decoder
    from star_export.graph.wrappers import ImageHead

    torch.manual_seed(0)
    kind, hidden = getattr(torch, dtype), config.base_ar.hidden_size
    modules = {
        name: _materialized(functools.partial(Decoder, getattr(config, name)), device, kind)
        for name in ("base_ar", "stacked_ar")
    }

    class HeadParts(torch.nn.Module):
        """What `ImageHead` takes of a Star."""

        def __init__(self):
            super().__init__()
            self.config, self.image_head = config, torch.nn.Linear(hidden, config.vq.codebook_size)
            self.image_table = torch.nn.Embedding(config.vq.codebook_size, hidden)

    return modules | {"image_head": ImageHead(_materialized(HeadParts, device, kind)).eval()}


def _materialized(make: Callable, device: str, dtype):
    """A module built without memory, then filled with noise on `device`."""
    import torch

    with torch.device("meta"):
        module = make()
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)
    module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, parameter.shape[-1] ** -0.5)
        else:
            parameter.data.normal_(0 if name.endswith("bias") else 1, 0.02)
        parameter.requires_grad_(False)
    return module.eval()


def compile_layers(modules: dict) -> None:
    """Compile the decoders' layers one by one: equal layers share the code, so the time is that of one
    layer."""
    for name in ("base_ar", "stacked_ar"):
        for layer in modules[name].layers:
            layer.compile(dynamic=False)


def uncompile_layers(modules: dict) -> None:
    for name in ("base_ar", "stacked_ar"):
        for layer in modules[name].layers:
            layer._compiled_call_impl = None


def hugging_face_model(config: StarConfig, *, device: str, dtype: str):
    """Qwen2.5's text model with as many layers as both decoders and the image codes as its vocabulary: the
    same bytes per token."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    decoder = config.base_ar
    size = Qwen2Config(
        hidden_size=decoder.hidden_size,
        num_hidden_layers=decoder.num_layers + config.stacked_ar.num_layers,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        intermediate_size=decoder.intermediate_size,
        vocab_size=config.vq.codebook_size,
        tie_word_embeddings=False,
        rms_norm_eps=decoder.rms_norm_eps,
        max_position_embeddings=4096,
        use_sliding_window=False,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            size, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).eval()


def generated(model, *, rows: int, prompt_tokens: int, new_tokens: int, static: bool):
    """Greedy `generate` of exactly `new_tokens` after a prompt; `static` takes the static cache, without
    compiling the model."""
    import torch

    ids = torch.randint(0, model.config.vocab_size, (rows, prompt_tokens), device=model.device)
    options = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with torch.inference_mode():
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
            **options,
        )
