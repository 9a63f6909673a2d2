"""What a diffusion decoder for STAR-Nano could draw at best, were it to fit beside STAR-Nano's other weights.

    python -m tests.bench_nano_vae [--minutes 40] [--threads 2]

All weights that the project carries may have 20 MB together. What is left of them, in 16 bits a number, holds
a VAE of FLUX's kind with 8 and 16 channels and hardly anything else: no transformer and no text encoder. This
trains that VAE alone on images of 128 pixels and then lets it encode and decode held-out ones. No decoder
that paints in its latents can be better than that, so the result stands beside the VQ model's: PSNR, and the
share of images in which STAR-Nano's scorer reads what it reads in the original. The table is Markdown.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F

from reference.diffusion.config import VAEConfig
from reference.diffusion.vae import VAEDecoder, VAEEncoder
from reference.nano.benchmark.painter import Painter
from reference.nano.world.draw import images_from_scenes
from reference.nano.world.scorer import Reading, read
from reference.nano.world.world import random_scene

WEIGHTS = Path(__file__).parents[1] / "reference/nano/weights"
ALLOWED_BYTES, BYTES_PER_NUMBER = 20_000_000, 2
CONFIG = VAEConfig(
    channels=(8, 16, 16, 16), blocks_per_level=1, norm_groups=4, latent_channels=16, scale=1.0, shift=0.0
)
BATCH, PEAK_RATE, WARM_SHARE, HELD_OUT = 4, 3e-3, 0.02, 300


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench_nano_vae", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)  # they would slow the convolutions down many times
    torch.manual_seed(2026)
    encoder, decoder = VAEEncoder(CONFIG), VAEDecoder(CONFIG)
    used = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.suffix in (".pt", ".safetensors"))
    left = (ALLOWED_BYTES - used) // BYTES_PER_NUMBER
    numbers = sum(p.numel() for part in (encoder, decoder) for p in part.parameters())
    print(f"STAR-Nano's weights: {used} bytes; room for {left} numbers; this VAE has {numbers}.", flush=True)
    steps = train(encoder, decoder, seconds=options.minutes * 60)
    originals = scenes(Random("held out"), HELD_OUT, seed=1)
    with torch.no_grad():
        rebuilt = [
            smaller(decoder(encoder(larger(originals[i : i + 50]))[:, : CONFIG.latent_channels]))
            for i in range(0, HELD_OUT, 50)
        ]
    by_vq = np.stack(Painter.from_checkpoint(WEIGHTS).rebuild(list(originals)))
    print(f"{steps} steps of {BATCH} images in {options.minutes:g} minutes\n")
    print("| held-out images, encoded and decoded | PSNR | read as the original |\n|---|---|---|")
    for name, images in (("the VAE, at 128 pixels", np.concatenate(rebuilt)), ("the VQ model", by_vq)):
        print(
            f"| {name} | {psnr(images, originals):.1f} dB | {read_alike(images, originals)} of {HELD_OUT} |"
        )


def train(encoder: VAEEncoder, decoder: VAEDecoder, *, seconds: float) -> int:
    """Train both for so many seconds on new images, mean for latent, and return the number of steps."""
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=0.0, betas=(0.9, 0.99))
    random, started, step = Random("train"), time.monotonic(), 0
    while (share := (time.monotonic() - started) / seconds) < 1:
        for group in optimizer.param_groups:  # linear to the peak, then a cosine to nothing
            group["lr"] = PEAK_RATE * min(share / WARM_SHARE, 0.5 * (1 + np.cos(np.pi * share)))
        image = larger(scenes(random, BATCH, seed=step + 2))
        got = decoder(encoder(image)[:, : CONFIG.latent_channels])
        loss = F.mse_loss(got, image) + 0.1 * F.l1_loss(got, image)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step}, {share:.0%}: loss {loss.item():.5f}", flush=True)
    return step


def scenes(random: Random, count: int, *, seed: int) -> np.ndarray:
    """Images uint8 [count, 64, 64, 3] of random scenes."""
    return images_from_scenes([random_scene(random) for _ in range(count)], seed=seed)


def larger(images: np.ndarray) -> torch.Tensor:
    """Images uint8 [n, 64, 64, 3] -> float32 [n, 3, 128, 128] in [-1, 1]."""
    small = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(small, scale_factor=2.0, mode="bilinear")


def smaller(images: torch.Tensor) -> np.ndarray:
    """The way back: pixels of twice the side are averaged."""
    small = F.avg_pool2d(images, 2).clamp(-1, 1)
    return ((small + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def psnr(images: np.ndarray, originals: np.ndarray) -> float:
    """Mean PSNR in dB."""
    errors = ((images.astype(np.float64) - originals) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / errors)))


def read_alike(images: np.ndarray, originals: np.ndarray) -> int:
    """In how many images the scorer reads the things, colours and background of the original."""
    return sum(seen(read(image)) == seen(read(original)) for image, original in zip(images, originals))


def seen(reading: Reading) -> tuple:
    """What a reading says of an image, without where exactly."""
    return reading.background, sorted((f"{t.shape}", f"{t.color}", f"{t.size}") for t in reading.things)


if __name__ == "__main__":
    main()
