"""The VQ model's stages: `vq`, `local` and `decoder`.

First an autoencoder is trained, then one with a codebook that follows the latents; then latents are made
local; then they get a new codebook, and the decoder learns to read it.

Gradients do not train the codebook. It starts as cluster centres of real latents and then, in stage `vq`,
each entry is the running mean of the latents assigned to it; unused entries restart at a latent. Images are
drawn on the device that trains.

Source: van den Oord et al. 2017, appendix A.1 (running means); the rest is common practice.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ...model import Star
from ..recipe import SEED, VQ_UNQUANTISED, Stage
from ..world.draw import arrays_from_scenes
from ..world.world import COLORS, Scene
from .cells import drawn, empty_cells, image_from_scenes, same_cells, scenes_of, with_fewer_things
from .loop import Job, Losses

DECAY, COMMITMENT, LOCALITY = 0.99, 0.25, 10.0
EMPTY_SHARE = 0.05  # share of the empty background's latents that count for the codebook of stage `decoder`
MISREAD = 0.2  # share of that stage's tokens that are replaced by another entry
NEIGHBOURS = 8  # the nearest entries among which that entry is chosen
DEAD = 0.1  # running count below which an entry restarts; the mean is 0.5
RESTART_EVERY = 20  # steps
KMEANS_BATCHES, LOCAL_KMEANS_BATCHES, KMEANS_ROUNDS = 8, 300, 25


@torch.no_grad()
def background_ids(star: Star) -> Tensor:
    """The id [8] of each colour's empty background: the entry nearest to the mean latent of a bare image."""
    things, backgrounds = (
        torch.from_numpy(array).to(star.codebook.weight.device)
        for array in arrays_from_scenes([Scene(color, ()) for color in COLORS])
    )
    image = image_from_scenes({"things": things, "backgrounds": backgrounds}, noise=None)
    with torch.autocast(things.device.type, enabled=False):
        latents = star.vq_encoder.latents(image)
    return nearest(latents.mean((2, 3)), star.codebook.weight)


def with_one_background(ids: Tensor, backgrounds: Tensor, batch: dict) -> Tensor:
    """The ids [B, T] of a batch's images, with the one of `backgrounds` (`background_ids`) wherever
    background is empty."""
    levels = torch.tensor(list(COLORS.values()), dtype=torch.float32, device=ids.device)
    colors = torch.cdist(batch["backgrounds"], levels).argmin(1)  # [B]
    return torch.where(empty_cells(batch).flatten(1) > 0, backgrounds[colors].unsqueeze(1), ids)


class Trainer:
    """Stage `vq`: the VQ part of a model and the running sums behind its codebook."""

    clustered = KMEANS_BATCHES  # batches of images whose latents start the codebook

    def __init__(self, star: Star, stage: Stage, device: torch.device):
        self.star, self.stage = star, stage
        self.starts = int(VQ_UNQUANTISED * stage.steps)
        weight = star.codebook.weight
        weight.requires_grad_(False)
        self.counts = torch.ones(weight.shape[0], device=device)
        self.sums = weight.detach().clone()

    def job(self) -> Job:
        return Job(
            self.stage,
            {"vq_encoder": self.star.vq_encoder, "vq_decoder": self.star.vq_decoder},
            partial(scenes_of, batch=self.stage.batch),
            self.losses,
            extra={"counts": self.counts, "sums": self.sums},
            finish=partial(scale_latents, self.star),
        )

    def losses(self, batch: dict, step: int) -> Losses:
        """Squared error of the image plus the distance of latents from their entries.

        The distance counts as a share of the latents' variance, times the image's error, so that neither term
        outgrows the other. Also returns `psnr` in dB and `used`, the share of entries in use.
        """
        image = drawn(batch, step)
        if step == self.starts:
            self.start_codebook(step, len(image))
        with torch.autocast(image.device.type, torch.bfloat16):
            latents = self.star.vq_encoder.latents(image).float()  # [B, d, h, w]
            z = latents.permute(0, 2, 3, 1).flatten(0, 2)  # [B*T, d]
            quantised, commitment, used = latents, *z.new_zeros(2)
            if step >= self.starts:
                entries = self.follow(z.detach(), step)
                commitment = F.mse_loss(z, entries)
                quantised = latents + (as_map(entries, latents) - latents).detach()
                used = (self.counts > DEAD).float().mean()
            error, psnr = compared(decoded(self.star, quantised), image)
        return {
            "loss": error + COMMITMENT * commitment / z.detach().var(0).mean() * error.detach(),
            "psnr": psnr,
            "used": used,
        }

    @torch.no_grad()
    def follow(self, z: Tensor, step: int) -> Tensor:
        """The nearest entries of z [n, d], as they were before they follow the running means: [n, d]."""
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
        """Restart unused entries at latents of this batch."""
        generator = torch.Generator().manual_seed(SEED * 7 + step)
        dead = (self.counts < DEAD).nonzero()[:, 0]
        chosen = torch.randperm(len(z), generator=generator)[: len(dead)].to(z.device)
        self.sums[dead[: len(chosen)]], self.counts[dead[: len(chosen)]] = z[chosen] * 10 * DEAD, 10 * DEAD

    @torch.no_grad()
    def start_codebook(self, step: int, batch: int) -> None:
        """Start the codebook as cluster centres of latents of images made for this."""
        device, latents = self.counts.device, []
        for number in range(self.clustered):
            scenes = {k: v.to(device) for k, v in scenes_of(-1 - number, batch=batch).items()}
            with torch.autocast(device.type, torch.bfloat16):
                found = self.star.vq_encoder.latents(drawn(scenes, step, stream=1 + number)).float()
            latents.append(self.counted(found.permute(0, 2, 3, 1).flatten(0, 2), scenes, number))
        centres, counts = clusters(torch.cat(latents), len(self.counts))
        self.counts.copy_(counts / self.clustered)
        self.sums.copy_(centres * self.counts[:, None])
        self.star.codebook.weight.copy_(centres)

    def counted(self, z: Tensor, scenes: dict, number: int) -> Tensor:
        """The latents of a batch z [n, d] that count for the codebook."""
        return z


class LocalTrainer(Trainer):
    """Stage `local`: the autoencoder continues without a codebook, until a latent tells only of what is near
    it."""

    def job(self) -> Job:
        return replace(super().job(), extra=None)

    def losses(self, batch: dict, step: int) -> Losses:
        """Squared error of the image, plus `moved` (on a quarter of the batch) and `apart`.

        These two count as shares of the latents' variance, times the image's error.
        """
        image = drawn(batch, step)
        part = {name: tensor[: max(1, len(image) // 4)] for name, tensor in batch.items()}
        fewer = with_fewer_things(part, step)
        with torch.autocast(image.device.type, torch.bfloat16):
            found = self.star.vq_encoder.latents(torch.cat([image, drawn(fewer, step, stream=2)])).float()
            latents, others = found.split([len(image), len(found) - len(image)])
            error, psnr = compared(decoded(self.star, latents), image)
        variance = latents.detach().var((0, 2, 3)).mean()
        terms = {
            "moved": moved(latents[: len(others)], others, same_cells(part, fewer)) / variance,
            "apart": apart(latents, empty_cells(batch)) / variance,
        }
        return {"loss": error + LOCALITY * sum(terms.values()) * error.detach(), "psnr": psnr, **terms}


class DecoderTrainer(Trainer):
    """Stage `decoder`: cluster a codebook once, then train the decoder with encoder and codebook frozen.

    Every other image has the background that the generating parts paint, and in half of the images some ids
    are misread as near ones, as those parts will misread them.

    Source: Qiu et al. 2025 (arXiv 2503.08354), their latent perturbation.
    """

    clustered = LOCAL_KMEANS_BATCHES
    backgrounds: Tensor | None = None
    near: Tensor | None = None  # [K, NEIGHBOURS] ids of the entries nearest to each

    def job(self) -> Job:
        self.star.vq_encoder.requires_grad_(False)
        return replace(super().job(), extra=None)

    def losses(self, batch: dict, step: int) -> Losses:
        """Squared error of the image, and its PSNR."""
        image, entries = drawn(batch, step), self.star.codebook.weight
        if step == 0:
            self.start_codebook(step, len(image))
        with torch.autocast(image.device.type, torch.bfloat16):
            with torch.no_grad():
                latents = self.star.vq_encoder.latents(image).float()
                ids = self.misread(self.read_ids(latents, batch), batch, step)
                found = as_map(entries[ids.flatten()], latents)
            error, psnr = compared(decoded(self.star, found), image)
        return {"loss": error, "psnr": psnr}

    def read_ids(self, latents: Tensor, batch: dict) -> Tensor:
        """The ids [B, T] that the decoder gets for latents [B, d, h, w]; rows 0, 2, ... have one background
        id."""
        if self.backgrounds is None:
            self.backgrounds = background_ids(self.star)
        ids = nearest(latents.permute(0, 2, 3, 1).flatten(0, 2), self.star.codebook.weight)
        ids = ids.view(len(latents), -1)
        ids[::2] = with_one_background(ids, self.backgrounds, batch)[::2]
        return ids

    def misread(self, ids: Tensor, batch: dict, step: int) -> Tensor:
        """The ids [B, T] where, in rows 2, 3, 6, 7, ..., MISREAD of the tokens that show things become near
        entries."""
        if self.near is None:
            entries = self.star.codebook.weight
            self.near = torch.cdist(entries, entries).topk(NEIGHBOURS + 1, largest=False).indices[:, 1:]
        generator = torch.Generator(ids.device).manual_seed(SEED * 13 + step)
        chosen = torch.randint(NEIGHBOURS, (*ids.shape, 1), generator=generator, device=ids.device)
        others = self.near[ids].gather(-1, chosen)[..., 0]
        exchanged = torch.rand(ids.shape, generator=generator, device=ids.device) < MISREAD
        rows = torch.arange(len(ids), device=ids.device) // 2 % 2 == 1
        showing = empty_cells(batch).flatten(1) == 0
        return torch.where(exchanged & rows.unsqueeze(1) & showing, others, ids)

    def counted(self, z: Tensor, scenes: dict, number: int) -> Tensor:
        """All latents of things and a small share of those of empty background.

        Entries go where latents are. Otherwise dozens of entries would differ by a tenth of a level of one
        colour, and nobody could tell which of them comes next.
        """
        generator = torch.Generator().manual_seed(SEED * 11 + number)
        chance = torch.rand(len(z), generator=generator).to(z.device)
        return z[chance < 1 - (1 - EMPTY_SHARE) * empty_cells(scenes).flatten()]


VQ_TRAINERS = {"vq": Trainer, "local": LocalTrainer, "decoder": DecoderTrainer}


def compared(made: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of images [B, 3, H, W] in [-1, 1], and their mean PSNR in dB."""
    made = made.float()
    errors = (made.clamp(-1, 1) - image).square().mean(dim=(1, 2, 3))
    return F.mse_loss(made, image), -10 * errors.div(4).log10().mean()


def as_map(rows: Tensor, like: Tensor) -> Tensor:
    """Rows [B*h*w, d] as a map [B, d, h, w], the shape of `like`."""
    return rows.view(len(like), *like.shape[2:], -1).permute(0, 3, 1, 2)


def moved(latents: Tensor, others: Tensor, same: Tensor) -> Tensor:
    """How far the latents [B, d, h, w] of the `same` cells [B, h, w] are from those of another image.

    The encoder's norms and attention see the whole image. Unless trained otherwise, its latents tell of
    everything in the image wherever there is room. Ids of empty background would then tell of things to come,
    and a model that paints row by row would have to know all of them in the first row.
    """
    return ((latents - others).square().mean(1) * same).sum() / same.sum().clamp(min=1)


def apart(latents: Tensor, empty: Tensor) -> Tensor:
    """How far the latents [B, d, h, w] of `empty` cells [B, h, w] are from their mean in each image: one
    background, one id."""
    weights = (empty / empty.sum((1, 2), keepdim=True).clamp(min=1)).unsqueeze(1)
    mean = (latents * weights).sum((2, 3), keepdim=True)
    return ((latents - mean).square().mean(1, keepdim=True) * weights).sum((1, 2, 3)).mean()


@torch.no_grad()
def scale_latents(star: Star) -> None:
    """Scale the entries to a size of about 1 by a power of two, which changes no image and no id.

    Nothing in training keeps latents small (these came out near 500), and the pixel adapter is fed with
    entries. Embeddings of that size drown whatever the base's layers add to them, so that its hidden states
    tell neither a token's place nor its prompt.
    """
    encoder, decoder, entries = star.vq_encoder, star.vq_decoder, star.codebook.weight
    scale = 2.0 ** -round(math.log2(float(entries.square().mean().sqrt())))
    for tensor in (entries, encoder.quant_conv.weight, encoder.quant_conv.bias):
        tensor.mul_(scale)
    decoder.post_quant_conv.weight.div_(scale)


def decoded(star: Star, latents: Tensor) -> Tensor:
    """The VQ decoder applied to latents [N, d, h, w] instead of ids -> [N, 3, 64, 64]."""
    decoder = star.vq_decoder
    x = decoder.mid(decoder.conv_in(decoder.post_quant_conv(latents)))
    for level in decoder.conv_blocks:
        x = level(x)
    return decoder.conv_out(F.silu(decoder.norm_out(x)))


def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """Ids [n] of the entries [K, d] nearest to z [n, d], with the arithmetic of `VQEncoder.forward`."""
    with torch.autocast(z.device.type, enabled=False):
        return (entries.square().sum(-1) - 2 * (z @ entries.T)).argmin(-1)


def clusters(z: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from randomly drawn points: centres [count, d] and the number of points of each
    [count]."""
    order = torch.randperm(len(z), generator=torch.Generator().manual_seed(SEED)).to(z.device)
    centres = z[order[:count]].clone()
    for turn in range(KMEANS_ROUNDS):
        ids = nearest(z, centres)
        counts = torch.bincount(ids, minlength=count).float()
        sums = torch.zeros_like(centres).index_add_(0, ids, z)
        enough = (turn + 2) * count <= len(z)
        fresh = z[order[(turn + 1) * count % len(z) :][:count]] if enough else centres
        centres = torch.where((counts == 0)[:, None], fresh, sums / counts.clamp(min=1)[:, None])
    return centres, counts.clamp(min=1)
