"""A decode step of an image on ONNX Runtime: both decoders and the image head, bound once to memory that
torch holds.

Bound as the runtime binds them: caches in place, the head's embedding fed back, nothing copied between
sessions. What is measured here is the step alone, at any width of rows and positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from reference.config import StarConfig

from .sizes import PARTS

PROVIDERS = {"cuda": "CUDAExecutionProvider", "cpu": "CPUExecutionProvider"}
ELEMENT_TYPES = {"float32": 1, "int64": 7, "float16": 10, "bfloat16": 16}  # onnx.TensorProto
NO_GRAPH = "-1"  # `gpu_graph_id` of a run that neither captures nor replays


def onnxruntime_with_libraries():
    """ONNX Runtime after torch, whose CUDA libraries its provider is linked to."""
    import onnxruntime
    import torch  # noqa: F401  first

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        onnxruntime.preload_dlls()
    return onnxruntime


def open_session(
    path: Path,
    *,
    device: str,
    cuda_graph: bool = False,
    sizes: Mapping[str, int] = {},
    record: bool = False,
    optimized: Path | None = None,
):
    """An InferenceSession that must run on `device`. `sizes` fixes symbolic axes (`B`: 2), `record` keeps
    which provider took which node, `optimized` is where the graph is written as it runs, copies between host
    and device included."""
    runtime = onnxruntime_with_libraries()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    for axis, size in sizes.items():
        options.add_free_dimension_override_by_name(axis, size)
    if record:
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if optimized:
        options.optimized_model_filepath = str(optimized)
    settings = {"use_tf32": "0", "enable_cuda_graph": str(int(cuda_graph))} if device == "cuda" else {}
    session = runtime.InferenceSession(str(path), options, providers=[(PROVIDERS[device], settings)])
    if PROVIDERS[device] not in session.get_providers():
        raise RuntimeError(
            f"ONNX Runtime could not start {PROVIDERS[device]}: it has {session.get_providers()}"
        )
    return session


class DecodeStep:
    """`step()` runs one decode step for `images` images (two rows each) and `positions` new positions on
    open sessions.

    The head takes one position of a row pair, so several positions are so many more pairs to it; which pairs
    with which does not change the time. `graph_id` names the captured CUDA graph of this step, in sessions
    that were opened for one.
    """

    def __init__(
        self,
        sessions: Mapping[str, object],
        config: StarConfig,
        *,
        images: int,
        positions: int,
        capacity_tokens: int,
        device: str,
        cache_dtype: str,
        graph_id: str = NO_GRAPH,
        seed: int = 0,
    ):
        import torch

        self.torch, self.device, self.graph_id = torch, device, graph_id
        self.rows, self.positions = 2 * images, positions
        self.sessions, self.tensors, hidden = sessions, {}, config.base_ar.hidden_size
        new, random = self._new, torch.Generator().manual_seed(seed)
        self.write_indices, self.position_ids = (
            new((self.rows,), "int64"),
            new((3, self.rows, positions), "int64"),
        )
        embeds, between, last = (new((self.rows, positions, hidden), "float32") for _ in range(3))
        embeds.copy_(torch.randn(embeds.shape, generator=random))
        drawn = (images, positions, config.vq.codebook_size)
        self.hidden_states, self.image_ids = last, new(drawn[:2], "int64")
        guidance, top_k, top_p, noise = (
            new((1,), "float32"),
            new((1,), "int64"),
            new((1,), "float32"),
            new(drawn, "float32"),
        )
        for tensor, value in ((guidance, 1.1), (top_k, 1000), (top_p, 0.8), (noise, 0.5)):
            tensor.fill_(value)
        where = {"position_ids": self.position_ids, "write_indices": self.write_indices}
        self.caches = {}
        self.bindings = {}
        for name, given, got in (("base_ar", embeds, between), ("stacked_ar", between, last)):
            caches = {}
            decoder = getattr(config, name)
            for i in range(decoder.num_layers):
                for part in ("key", "value"):
                    shape = (self.rows, decoder.num_kv_heads, capacity_tokens, decoder.head_dim)
                    caches[f"{i}.{part}"] = new(shape, cache_dtype)
            self.caches[name] = caches
            self.bindings[name] = self._bind(
                name,
                {"inputs_embeds": given} | where | {f"past_key_values.{k}": v for k, v in caches.items()},
                {"hidden_states": got} | {f"present.{k}": v for k, v in caches.items()},
            )
        logits = new(drawn, "float32")
        self.bindings["image_head"] = self._bind(
            "image_head",
            {
                "hidden_states": last,
                "guidance": guidance,
                "top_k": top_k,
                "top_p": top_p,
                "noise": noise,
            },
            {
                "image_ids": self.image_ids,
                "inputs_embeds": embeds,
                "logits": logits,
            },
        )
        self.options = {name: self._run_options() for name in PARTS}
        self.go_to(0)

    def go_to(self, index: int) -> None:
        """The next step writes from slot `index` on."""
        self.write_indices.copy_(self.torch.full((self.rows,), index))
        steps = self.torch.arange(index, index + self.positions)
        self.position_ids.copy_(steps.expand(3, self.rows, self.positions).contiguous())

    def run(self, name: str) -> None:
        """One component of the step; returns when its work is done, as ONNX Runtime does by default."""
        self.sessions[name].run_with_iobinding(self.bindings[name], self.options[name])

    def step(self, index: int) -> None:
        """The whole step at slot `index`, with the host's writes of where it goes."""
        self.go_to(index)
        for name in PARTS:
            self.run(name)

    def _new(self, shape: tuple[int, ...], dtype: str):
        return self.torch.zeros(shape, dtype=getattr(self.torch, dtype), device=self.device)

    def _bind(self, name: str, inputs: Mapping[str, object], outputs: Mapping[str, object]):
        binding = self.sessions[name].io_binding()
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for key, tensor in tensors.items():
                dtype = ELEMENT_TYPES[str(tensor.dtype).removeprefix("torch.")]
                bind(key, self.device, 0, dtype, list(tensor.shape), tensor.data_ptr())
        self.tensors[name] = (
            dict(inputs),
            dict(outputs),
        )  # ONNX Runtime holds addresses: keep the memory alive
        return binding

    def _run_options(self):
        import onnxruntime

        options = onnxruntime.RunOptions()
        if self.device == "cuda":
            options.add_run_config_entry("gpu_graph_id", self.graph_id)
        return options
