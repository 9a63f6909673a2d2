"""Stages 1 and 2: the VQ model. An autoencoder first, then with a codebook that follows the latents; stage 2 does that again, from
where stage 1 ended, with a term that makes latents local.

The codebook is not trained by gradients: it starts as cluster centres of real latents and then is the running mean of what is
assigned to each entry; entries that nothing uses start again at a latent. Pictures are drawn on the device that trains.

Source: van den Oord et al. 2017, appendix A.1 (running means); the rest is common practice.
"""
from __future__ import annotations

import math
from functools import partial
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model import Star
from .draw import arrays_from_scenes, draw
from .loop import Job, Losses
from .recipe import LOCALITY, SEED, TOKENS_SIDE, VQ_UNQUANTISED, Stage
from .world import SIDE_PIXELS, random_scene

DECAY, COMMITMENT = 0.99, 0.25
DEAD = 0.1  # running count below which an entry starts again; the mean is 2
RESTART_EVERY = 20  # steps
KMEANS_BATCHES, KMEANS_ROUNDS = 8, 10


def scenes_of(step: int, *, batch: int, seed: int = SEED) -> dict:
    """Scenes of a step as arrays for `draw`."""
    random = Random(f"{seed} vq {step}")
    things, backgrounds = arrays_from_scenes([random_scene(random) for _ in range(batch)])
    return {"things": torch.from_numpy(things), "backgrounds": torch.from_numpy(backgrounds)}


def drawn(batch: dict, step: int, *, stream: int = 0) -> Tensor:
    """Pictures of a batch with its noise, float32 [B, 3, 64, 64] in [-1, 1], on the batch's device."""
    device = batch["things"].device
    generator = torch.Generator(device).manual_seed(SEED * 1_000_003 + 7 * step + stream)
    noise = torch.randn(len(batch["things"]), 3, SIDE_PIXELS, SIDE_PIXELS, generator=generator, device=device)
    return image_from_scenes(batch, noise=noise)


def image_from_scenes(batch: dict, *, noise: Tensor | None) -> Tensor:
    """Pictures of a batch, float32 [B, 3, 64, 64] in [-1, 1], with noise [B, 3, 64, 64] or without."""
    return draw(batch["things"], batch["backgrounds"], noise=noise).float() / 127.5 - 1


def with_fewer_things(batch: dict, step: int) -> tuple[dict, Tensor]:
    """The scenes with about half of their things, and where they show what they showed: 1.0 for latents [B, h, w] in whose cell and the
    eight around it no pixel changed.

    The encoder's norms and attention see the whole picture, and unless told otherwise it says of all that is in it wherever there is
    room. Then ids of an empty background tell of things to come, and whoever paints row by row must know them all at the first.
    """
    things = batch["things"]
    generator = torch.Generator(things.device).manual_seed(SEED * 1_000_003 + 7 * step + 5)
    kept = torch.rand(things.shape[:2], generator=generator, device=things.device) < 0.5
    fewer = batch | {"things": torch.cat([things[..., :1] * kept.unsqueeze(-1), things[..., 1:]], dim=-1)}
    changed = (image_from_scenes(batch, noise=None) != image_from_scenes(fewer, noise=None)).any(1, keepdim=True).float()
    cells = F.max_pool2d(F.max_pool2d(changed, SIDE_PIXELS // TOKENS_SIDE), 3, stride=1, padding=1)  # [B, 1, h, w]
    return fewer, 1 - cells.squeeze(1)


class Trainer:
    """The VQ half of a model and the running sums behind its codebook."""

    def __init__(self, star: Star, stage: Stage, device: torch.device):
        self.star, self.stage, self.locality = star, stage, LOCALITY[stage.name]
        self.starts = int(VQ_UNQUANTISED[stage.name] * stage.steps)
        weight = star.codebook.weight
        weight.requires_grad_(False)
        self.counts = torch.ones(weight.shape[0], device=device)
        self.sums = weight.detach().clone()

    def job(self) -> Job:
        return Job(self.stage, {"vq_encoder": self.star.vq_encoder, "vq_decoder": self.star.vq_decoder},
                   partial(scenes_of, batch=self.stage.batch), self.losses, extra={"counts": self.counts, "sums": self.sums},
                   finish=partial(scale_latents, self.star))

    def losses(self, batch: dict, step: int) -> Losses:
        """Squared error of the picture, the distance of latents from their entries and of latents where nothing changed when things
        elsewhere went, weighed so that none outgrows the others: as shares of the latents' variance, times the picture's error.
        `psnr` in dB, `used`: share of entries, `moved`: the last of the shares."""
        image = drawn(batch, step)
        pictures = [image]
        if self.locality:
            fewer, same = with_fewer_things(batch, step)
            pictures.append(drawn(fewer, step, stream=2))
        if step == self.starts:
            self.start_codebook(step, len(image))
        with torch.autocast(image.device.type, torch.bfloat16):
            latents, *others = self.star.vq_encoder.latents(torch.cat(pictures)).float().split(len(image))  # [B, d, h, w] each
            z = latents.permute(0, 2, 3, 1).flatten(0, 2)  # [B*T, d]
            quantised, commitment, used, moved = z, *z.new_zeros(3)
            if step >= self.starts:
                entries = self.follow(z.detach(), step)
                commitment = F.mse_loss(z, entries)
                quantised = z + (entries - z).detach()
                used = (self.counts > DEAD).float().mean()
            made = decoded(self.star, quantised.view(len(image), *latents.shape[2:], -1).permute(0, 3, 1, 2)).float()
        error = F.mse_loss(made, image)
        psnr = -10 * (made.clamp(-1, 1) - image).square().mean(dim=(1, 2, 3)).div(4).log10().mean()
        if self.locality:
            moved = ((latents - others[0]).square().mean(1) * same).sum() / same.sum().clamp(min=1)
        variance = z.detach().var(0).mean()
        shares = (COMMITMENT * commitment + self.locality * moved) / variance
        return {"loss": error + shares * error.detach(), "psnr": psnr, "used": used, "moved": moved.detach() / variance}

    @torch.no_grad()
    def follow(self, z: Tensor, step: int) -> Tensor:
        """Nearest entries of z [n, d], which then move the running means. [n, d] as they were before."""
        weight = self.star.codebook.weight
        ids = nearest(z, weight)
        entries = weight[ids]
        self.counts.mul_(DECAY).add_(torch.bincount(ids, minlength=len(weight)).float(), alpha=1 - DECAY)
        self.sums.mul_(DECAY).index_add_(0, ids, z, alpha=1 - DECAY)
        if step % RESTART_EVERY == 0 and step < 0.8 * self.stage.steps:
            self.restart(z, step)
        weight.copy_(self.sums / self.counts.clamp(min=1e-6)[:, None])
        return entries

    def restart(self, z: Tensor, step: int) -> None:
        """Unused entries become latents of this batch."""
        generator = torch.Generator().manual_seed(SEED * 7 + step)
        dead = (self.counts < DEAD).nonzero()[:, 0]
        chosen = torch.randperm(len(z), generator=generator)[:len(dead)].to(z.device)
        self.sums[dead[:len(chosen)]], self.counts[dead[:len(chosen)]] = z[chosen] * 10 * DEAD, 10 * DEAD

    @torch.no_grad()
    def start_codebook(self, step: int, batch: int) -> None:
        """Cluster centres of latents of pictures made for this."""
        device, latents = self.counts.device, []
        for number in range(KMEANS_BATCHES):
            scenes = {k: v.to(device) for k, v in scenes_of(-1 - number, batch=batch).items()}
            z = self.star.vq_encoder.latents(drawn(scenes, step, stream=1 + number))
            latents.append(z.permute(0, 2, 3, 1).flatten(0, 2))
        centres, counts = clusters(torch.cat(latents), len(self.counts))
        self.counts.copy_(counts / KMEANS_BATCHES)
        self.sums.copy_(centres * self.counts[:, None])
        self.star.codebook.weight.copy_(centres)


@torch.no_grad()
def scale_latents(star: Star) -> None:
    """Make entries about 1 in size, by a power of two, which changes no picture and no id.

    Nothing in training keeps latents small (those here came out near 500), and the pixel adapter is fed with entries: embeddings of
    that size drown whatever the base's layers add to them, so that its hidden states tell neither a token's place nor its prompt.
    """
    encoder, decoder, entries = star.vq_encoder, star.vq_decoder, star.codebook.weight
    scale = 2.0 ** -round(math.log2(float(entries.square().mean().sqrt())))
    for tensor in (entries, encoder.quant_conv.weight, encoder.quant_conv.bias):
        tensor.mul_(scale)
    decoder.post_quant_conv.weight.div_(scale)


def decoded(star: Star, latents: Tensor) -> Tensor:
    """The VQ decoder from latents [N, d, h, w] instead of ids -> [N, 3, 64, 64]."""
    decoder = star.vq_decoder
    x = decoder.mid(decoder.conv_in(decoder.post_quant_conv(latents)))
    for level in decoder.conv_blocks:
        x = level(x)
    return decoder.conv_out(F.silu(decoder.norm_out(x)))


def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """Ids [n] of the entries [K, d] nearest to z [n, d]; the arithmetic of `VQEncoder.forward`."""
    with torch.autocast(z.device.type, enabled=False):
        return (entries.square().sum(-1) - 2 * (z @ entries.T)).argmin(-1)


def clusters(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from points drawn at random: centres [count, d] and how many points each has [count]."""
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(SEED)).to(z.device)
    centres = z[order[:count]].clone()
    for turn in range(KMEANS_ROUNDS):
        ids = nearest(z, centres)
        counts = torch.bincount(ids, minlength=count).float()
        sums = torch.zeros_like(centres).index_add_(0, ids, z)
        empty = counts == 0
        centres = torch.where(empty[:, None], z[order[(turn + 1) * count % len(z):][:count]] if (turn + 2) * count <= len(z)
                              else centres, sums / counts.clamp(min=1)[:, None])
    return centres, counts.clamp(min=1)
