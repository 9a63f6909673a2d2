"""Calibration at a released width: seconds and memory of a layer and of all, and what each weight loses.

    python -m tests.bench_calibration [--source star-3b] [--precision int4] [--prompts 12] [--layers 2]

The layer has the released shapes, and noise for weights; its inputs are noise with the strong channels that
trained models have, and a small change as by layers before. Prompts are as long as the shipped ones, with all
tokens of their images and both rows of guidance. The minutes of the whole model are those of a layer times
their number, so they leave out the decode of the examples. This is a benchmark, not a test: it asserts
nothing.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from dataclasses import replace

import torch

from reference.decoder import Decoder
from star_export.calibration.examples import Example
from star_export.calibration.layers import calibrate_layer
from star_export.graph.precisions import PRECISIONS
from star_export.planner.source import find_source

PROMPT_TOKENS = 32
ROUNDING = 0.01  # what the layers before changed of their outputs, in standard deviations
STRONG, STRONG_TIMES = 0.01, 20.0  # share of channels with strong inputs, and how strong they are


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_calibration", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--source", default="star-3b", choices=("star-3b", "star-7b"))
    parser.add_argument("--precision", default="int4", choices=("int8", "int4"))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--layers", type=int, default=2)
    options = parser.parse_args()
    config = find_source(options.source).config
    layers = config.base_ar.num_layers + config.stacked_ar.num_layers
    decoder = Decoder(replace(config.base_ar, num_layers=1)).requires_grad_(False)
    hidden, length = config.base_ar.hidden_size, PROMPT_TOKENS + config.vq.image_tokens - 1
    generator = torch.Generator().manual_seed(0)
    strength = torch.ones(hidden)
    strength[torch.randperm(hidden, generator=generator)[: int(STRONG * hidden)]] = STRONG_TIMES
    took, worked, lost = [], [], []
    with torch.inference_mode():
        for _ in range(options.layers):
            for name, parameter in decoder.named_parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
                elif name.endswith("weight"):
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
            stream = []
            for _ in range(options.prompts):
                exact = torch.randn(2, length, hidden, generator=generator) * strength
                rounded = exact + torch.randn(exact.shape, generator=generator) * strength * ROUNDING
                positions = torch.arange(length).expand(3, 2, -1)
                stream.append(Example(rounded, positions, image=True, exact=exact))
            started, cpu = time.monotonic(), time.process_time()
            found, _ = calibrate_layer(
                decoder, 0, stream, prefix="base_ar.layers.0", precision=PRECISIONS[options.precision]
            )
            took.append(time.monotonic() - started)
            worked.append(time.process_time() - cpu)
            lost = [(name.removeprefix("base_ar.layers.0."), *pair) for name, pair in found.errors.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = statistics.median(took)
    print(f"{options.source}, {options.precision}, {options.prompts} prompts of {length} tokens in two rows")
    print(
        f"a layer: {', '.join(f'{s:.0f}' for s in took)} s; {layers} layers: {seconds * layers / 60:.0f} min"
    )
    print(f"peak memory of the process: {peak / 1e9:.2f} GB")
    print("weight                     lost, calibrated   rounded to nearest   ratio")
    for name, stored, nearest in lost:
        print(f"{name:<27}{stored:<19.2e}{nearest:<21.2e}{stored / nearest:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
