"""Our calibration beside nvidia-modelopt's and llm-compressor's: the same weights, inputs and blocks.

    python -m tests.bench_oracles [--formats int4 int8] [--cases NAME ...]

The cases are layers of STAR-Nano, with the inputs that its calibration gives them, and a made-up one of
STAR-3B's width with correlated inputs and strong channels. Printed is the share of the products' mean square
that is lost, on the inputs that a method was given and on others. Both libraries compute in float32 and keep
their scales so; ours are in bf16, as a bundle stores them. Neither is needed by anything else: install them
where this is run, or one of them; the other is named and left out.
This is a benchmark, not a test: it asserts nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from engines.inputs.prompt import Chat
from engines.progress import silent
from reference.config import config_from_files
from reference.weights import named_tensors, resolve_checkpoint
from star_export.calibration.decodes import Decodes
from star_export.calibration.examples import Example, decoded, read_material
from star_export.calibration.folding import channel_exponents
from star_export.calibration.gptq import feedback_of, quantised
from star_export.calibration.layers import moments_of, rows_of
from star_export.exporter.export import shipped_prompts
from star_export.exporter.model_spec import model_spec_from_checkpoint, tokenizer_files
from star_export.exporter.tables import stored_image_table, write_image_table
from star_export.golden.oracle import resident
from star_export.graph.formats import FORMATS, Format
from star_export.graph.wrappers import TABLE

PROMPTS = 80  # of STAR-Nano: every other example is held out
NANO = {"base_ar": 1, "stacked_ar": 1}  # decoder -> layer
GROUPS = {  # linear layers with one input; whether scales of channels can be folded into what comes before
    "q, k, v": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), True),
    "o": (("self_attn.o_proj",), False),
    "gate, up": (("mlp.gate_proj", "mlp.up_proj"), True),
    "down": (("mlp.down_proj",), True),  # into up; a calibration does not, since it gains nothing
}
WIDE = "3B, q, k, v, made up"
FEATURES, ROWS = 2048, (256, 64, 64)  # of STAR-3B; an eighth of q's rows, and a quarter of k's and v's
INPUTS = 8192  # of a made-up layer, and as many that are held out


@dataclass(frozen=True)
class Case:
    """Linear weights [rows, K] that share inputs [batches, length, K]; `folds` into what makes the inputs."""

    name: str
    weights: list[Tensor]
    inputs: list[Tensor]
    held_out: list[Tensor]
    folds: bool


Method = Callable[[Case, Format], list[Tensor]]  # -> what each weight became, for the inputs as they are


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench_oracles", description=__doc__.split("\n")[0])
    parser.add_argument("--formats", nargs="+", default=["int4", "int8"], choices=["int4", "int8"])
    parser.add_argument("--cases", nargs="+", default=["nano", "3B"], help="the beginnings of their names")
    options = parser.parse_args()
    methods = dict(OURS)
    for library, module, theirs in (
        ("nvidia-modelopt", "modelopt", MODELOPT),
        ("llmcompressor", "llmcompressor", LLM_COMPRESSOR),
    ):
        if importlib.util.find_spec(module):
            methods |= theirs
        else:
            print(f"{library} is not installed, and is left out")
    for case in cases(tuple(options.cases)):
        moments, others = (moments_of(rows_of(found)) for found in (case.inputs, case.held_out))
        for format in (FORMATS[name] for name in options.formats):
            block = format.block(case.weights[0].shape[1])
            print(f"\n{case.name}: {format.name} in blocks of {block}")
            print(f"{'method':<44}{'lost':<12}{'held out':<12}seconds")
            for name, (method, formats) in methods.items():
                if format.name not in formats or ("AWQ" in name and not case.folds):
                    continue
                started = time.monotonic()
                with quiet(), torch.no_grad():
                    stored = method(case, format)
                took = time.monotonic() - started
                lost, unseen = (lost_by(case.weights, stored, found) for found in (moments, others))
                print(f"{name:<44}{lost:<12.3e}{unseen:<12.3e}{took:.1f}", flush=True)
    return 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries that report their progress do so elsewhere."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def lost_by(weights: list[Tensor], stored: list[Tensor], moments: Tensor) -> float:
    """The mean square of the change of all products, over that of the products."""
    change = sum(float(((w - s) @ moments * (w - s)).sum()) for w, s in zip(weights, stored, strict=True))
    return change / sum(float((w @ moments * w).sum()) for w in weights)


def cases(names: tuple[str, ...]) -> Iterator[Case]:
    if any(name.startswith("nano") for name in names):
        yield from (case for case in nano_cases() if case.name.startswith(names))
    if WIDE.startswith(names):
        yield made_up_case()


def nano_cases() -> Iterator[Case]:
    files = resolve_checkpoint("nano")
    config = config_from_files(files.config_json, files.qwen_folder)
    model = model_spec_from_checkpoint(files, config, rope_bf16=True)
    host, material = tokenizer_files(files, model), read_material(None, shipped_prompts(files), PROMPTS)
    chat = Chat(*(host[name].decode() for name in ("tokenizer.json", "chat_template.jinja")), model)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        table, tensors = Path(folder) / "table.safetensors", named_tensors(files, config)
        write_image_table(config, tensors, table)
        tensors = dict(tensors) | {TABLE: stored_image_table(config, table)}
        star = Decodes(Path(folder), config, tensors, True, chat, model, material, silent).star()
        stream = decoded(star, chat, model, material, model.sampling.generate)
        for name, wanted in NANO.items():
            decoder = getattr(star, name)
            stream = [example for example in stream if example.image or name == "base_ar"]
            for layer, block in enumerate(decoder.layers):
                with resident(block):
                    seen: dict[str, list[Tensor]] = {}
                    hooks = [
                        block.get_submodule(linears[0]).register_forward_pre_hook(
                            lambda _, given, group=group: seen.setdefault(group, []).append(given[0].clone())
                        )
                        for group, (linears, _) in GROUPS.items()
                    ]
                    stream = [through(decoder, layer, example) for example in stream]
                    for hook in hooks:
                        hook.remove()
                    if layer != wanted:
                        continue
                    for group, (linears, folds) in GROUPS.items():
                        weights = [block.get_submodule(linear).weight.clone() for linear in linears]
                        inputs = seen[group]
                        title = f"nano, {name} layer {layer}, {group}"
                        yield Case(title, weights, inputs[::2], inputs[1::2], folds)


def through(decoder: nn.Module, layer: int, example: Example) -> Example:
    rows, length, _ = example.embeds.shape
    cache = decoder.new_cache(rows, capacity_tokens=length)[:1]
    start = torch.zeros(rows, dtype=torch.int64)
    hidden, _ = decoder(example.embeds, example.positions, start, cache, range(layer, layer + 1))
    return Example(hidden, example.positions, example.image)


def made_up_case() -> Case:
    """Inputs with some strong directions, and with channels of which one in a hundred is far stronger."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    directions, features = FEATURES // 16, FEATURES
    mixed = random(directions, features) / directions**0.5
    strength = (0.5 * random(features)).exp()
    strength[torch.randperm(features, generator=generator)[: features // 100]] *= 20
    falling = torch.arange(1, directions + 1).pow(-0.5)[:, None] * mixed * directions**0.5 / 2

    def inputs() -> list[Tensor]:
        found = (random(INPUTS, directions) @ falling + 0.5 * random(INPUTS, features)) * strength
        return list(found.unflatten(0, (-1, 1, 512)))

    weights = [random(count, features) * 0.02 * (0.3 * random(count, features)).exp() for count in ROWS]
    return Case(WIDE, weights, inputs(), inputs(), folds=True)


def nearest(case: Case, format: Format) -> list[Tensor]:
    return [format.rounded(weight, torch.bfloat16) for weight in case.weights]


def gptq(case: Case, format: Format) -> list[Tensor]:
    feedback = feedback_of(moments_of(rows_of(case.inputs)))
    return [quantised(weight, feedback, format, torch.bfloat16).decode() for weight in case.weights]


def awq_gptq(case: Case, format: Format) -> list[Tensor]:
    feedback = feedback_of(moments_of(rows_of(case.inputs)))
    factors = channel_exponents(case.weights, feedback.power, format, torch.bfloat16).float().exp2()
    scaled = feedback.scaled(factors)
    return [quantised(w * factors, scaled, format, torch.bfloat16).decode() / factors for w in case.weights]


BOTH = ("int4", "int8")
OURS: dict[str, tuple[Method, tuple[str, ...]]] = {
    "ours: rounded to nearest": (nearest, BOTH),
    "ours: GPTQ": (gptq, BOTH),
    "ours: AWQ and GPTQ": (awq_gptq, BOTH),
}


class Diagonal(nn.Module):
    """What stands for a norm: scales of channels can be folded into it."""

    def __init__(self, features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Group(nn.Module):
    """A case as a model: inputs x [..., K] to the products of all its weights, one after the other."""

    def __init__(self, weights: list[Tensor]):
        super().__init__()
        self.norm, self.count = Diagonal(weights[0].shape[1]), len(weights)
        for i, weight in enumerate(weights):
            linear = nn.Linear(*reversed(weight.shape), bias=False)
            linear.weight = nn.Parameter(weight.float().clone())
            self.add_module(f"linear{i}", linear)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([getattr(self, f"linear{i}")(x) for i in range(self.count)], -1)

    def stored(self, weights: list[Tensor]) -> list[Tensor]:
        """What the weights became: the products of the unit vectors."""
        return list(self(torch.eye(weights[0].shape[1])).T.split([len(weight) for weight in weights]))


def modelopt(algorithm: dict | str, *, inputs: bool = False) -> Method:
    """`inputs` lets it round the inputs too while it calibrates."""

    def method(case: Case, format: Format) -> list[Tensor]:
        import modelopt.torch.quantization as mtq

        shape: dict = {"num_bits": format.bits, "axis": 0}
        if format.blocks:
            shape = {
                "num_bits": format.bits,
                "block_sizes": {-1: format.block(case.weights[0].shape[1]), "type": "static"},
            }
        rounded = {"cfg": {"num_bits": 8, "axis": None}} if inputs else {"enable": False}
        config = {
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": shape},
                {"quantizer_name": "*input_quantizer", **rounded},
            ],
            "algorithm": algorithm,
        }
        group = Group(case.weights)
        group = mtq.quantize(group, config, lambda model: [model(x) for x in case.inputs])
        if inputs:
            for name, module in group.named_modules():
                if name.endswith("input_quantizer"):
                    module.disable()
        return group.stored(case.weights)

    return method


def llm_compressor(*, awq: bool, gptq: bool, observer: str = "memoryless_minmax") -> Method:
    """With both, AWQ goes first: GPTQ begins with the weights and inputs that it leaves."""

    def method(case: Case, format: Format) -> list[Tensor]:
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier
        from llmcompressor.modifiers.transform.awq import AWQMapping, AWQModifier

        group = Group(case.weights)
        linears = [f"linear{i}" for i in range(group.count)]
        scheme = {"config_groups": scheme_from_format(format, case.weights[0].shape[1], observer)}
        if awq:
            smooth = AWQModifier(mappings=[AWQMapping("norm", linears)])
            calibrate(group, [smooth, QuantizationModifier(**scheme)], case.inputs)
        if awq and gptq:
            smoothed = Group([getattr(group, name).weight for name in linears])
            smoothed.norm = group.norm
            group = smoothed
        if gptq:
            calibrate(group, [GPTQModifier(**scheme)], case.inputs)
        return group.stored(case.weights)

    return method


def scheme_from_format(format: Format, features: int, observer: str) -> dict:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    block = {"strategy": "group", "group_size": format.block(features)} if format.blocks else {}
    weights = QuantizationArgs(
        num_bits=format.bits, symmetric=True, observer=observer, **({"strategy": "channel"} | block)
    )
    return {"all": QuantizationScheme(targets=["Linear"], weights=weights)}


def calibrate(group: Group, recipe: list, inputs: list[Tensor]) -> None:
    """As llm-compressor's sequential pipeline does, for a model of one step."""
    from llmcompressor.core import LifecycleCallbacks, create_session
    from llmcompressor.utils.helpers import DisableQuantization

    unpinned = contextlib.nullcontext()
    if not torch.cuda.is_available():  # there is no memory to pin, which AWQ does unasked
        unpinned = mock.patch.object(Tensor, "pin_memory", lambda self: self)
    with create_session() as session, unpinned:
        session.initialize(model=group, recipe=recipe)
        LifecycleCallbacks.calibration_start()
        with DisableQuantization(group):
            for x in inputs:
                group(x=x)
            LifecycleCallbacks.sequential_epoch_end(list(group.modules()))
        LifecycleCallbacks.calibration_end()
        session.finalize()


MODELOPT: dict[str, tuple[Method, tuple[str, ...]]] = {
    "nvidia-modelopt: max": (modelopt("max"), BOTH),
    "nvidia-modelopt: SmoothQuant, weights only": (modelopt("smoothquant", inputs=True), ("int8",)),
    "nvidia-modelopt: AWQ lite": (modelopt("awq_lite"), BOTH),
    "nvidia-modelopt: AWQ full": (modelopt("awq_full"), ("int4",)),
    "nvidia-modelopt: GPTQ": (modelopt("gptq"), BOTH),
}
LLM_COMPRESSOR: dict[str, tuple[Method, tuple[str, ...]]] = {
    "llm-compressor: AWQ": (llm_compressor(awq=True, gptq=False), BOTH),
    "llm-compressor: GPTQ": (llm_compressor(awq=False, gptq=True), BOTH),
    "llm-compressor: GPTQ, searched scales": (
        llm_compressor(awq=False, gptq=True, observer="memoryless_mse"),
        BOTH,
    ),
    "llm-compressor: AWQ and GPTQ": (llm_compressor(awq=True, gptq=True), BOTH),
}


if __name__ == "__main__":
    raise SystemExit(main())
