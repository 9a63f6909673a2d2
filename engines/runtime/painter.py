"""Painting with the diffusion decoder: from image ids and a caption to an image, step by step.

Rows whose captions are the same share a call of the transformer, so a step of an image with guidance takes
two: one for the rows without text, and one for those with it (docs/diffusion.md, "Rows and guidance").
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..bundle.bfloat16 import bf16_rounded
from ..bundle.manifest import DiffusionSpec
from ..inputs.caption import Captions
from ..inputs.latents import (
    FACTOR,
    Schedule,
    images_from_painted,
    latent_from_moments,
    map_from_patches,
    patches_from_map,
    rotary_cos_sin,
    schedule,
    source_from_image,
    time_features,
    vq_map,
)
from ..progress import Progress, silent
from ..sessions import Session, run
from .loaded import Loaded
from .normal import PAINT, SOURCE, normal_noise
from .painting import Brush, Painting, checked_painting


@dataclass(frozen=True)
class Row:
    """One condition: VQ map and source, in patches [N, T, 4, c]."""

    vq_map: np.ndarray
    source: np.ndarray


class Group:
    """The rows that share a caption, bound to the transformer once: `names` in the order of the batch."""

    def __init__(self, dit: Session, caption: np.ndarray, rows: dict[str, Row], spec: DiffusionSpec):
        self.names = list(rows)
        vq, source = (np.concatenate([getattr(r, x) for r in rows.values()]) for x in ("vq_map", "source"))
        length, side = caption.shape[1], int(source.shape[1] ** 0.5 + 0.5)
        cos, sin = rotary_cos_sin(spec.axes, caption_tokens=length, side=side)
        fixed = {
            "source": source,
            "vq_map": vq,
            "caption": caption,
            "caption_cos": cos[:length],
            "caption_sin": sin[:length],
            "image_cos": cos[length:],
            "image_sin": sin[length:],
        }
        self.latents = dit.buffer(source.shape, "float32")
        self.time = dit.buffer(time_features(0).shape, "float32")
        self.velocity = dit.buffer(source.shape, "float32")
        tensors = {"latents": self.latents, "time": self.time, "velocity": self.velocity}
        for name, array in fixed.items():
            tensors[name] = dit.buffer(array.shape, "float32")
            tensors[name].write(np.ascontiguousarray(array))
        self.step = dit.bind(tensors)

    def velocities(self, latents: np.ndarray, time: np.ndarray) -> dict[str, np.ndarray]:
        """Row -> its velocity [N, T, 4, c] at `latents` [N, T, 4, c]."""
        self.latents.write(np.concatenate([latents] * len(self.names)))
        self.time.write(time)
        self.step()
        return dict(zip(self.names, np.split(self.velocity.read().copy(), len(self.names))))


class Painter:
    """A painting whose settings and prompt are checked, before there are image ids.

    `image`, uint8 [H, W, 3], is that of an edit. `answer` is what the base model answered to `prompt`, if
    that is painted instead. `cut_tokens` counts the ids at the caption's end that the model cannot read.
    Raises UsageError and InputError as `checked_painting` does, and InputError for an invalid prompt.
    """

    def __init__(
        self,
        loaded: Loaded,
        captions: Captions | None,
        painting: Painting,
        prompt: str,
        *,
        seed: int,
        num_images: int = 1,
        image: np.ndarray | None = None,
        answer: str | None = None,
    ):
        model = loaded.bundle.manifest.model
        self.brush = checked_painting(painting, model, num_images=num_images, edit=image is not None)
        assert model.diffusion and captions
        self.loaded, self.spec, self.captions, self.seed = loaded, model.diffusion, captions, seed
        self.task = "paint" if image is None else "repaint"  # as `engines.fit.memory` knows it
        self.task += " with previews" if painting.preview else ""
        self.preview, self.rope_bf16, self.image = painting.preview, model.rope_bf16, image
        self.caption_ids, self.cut_tokens = captions.ids(prompt, answer=answer)

    def paint(self, image_ids: np.ndarray, progress: Progress = silent) -> np.ndarray:
        """Paint image ids [N, T]: images uint8 [N, R, R, 3]."""
        steps = self.brush.steps
        for done, (latents, clean) in enumerate(self.followed(image_ids), start=1):  # noqa: B007
            if self.preview and done < steps:
                self.preview(done, functools.partial(self._images, clean))
            progress("paint, in steps", done, steps)
        return self._images(latents)

    def followed(self, image_ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Paint image ids [N, T] step by step: the latents after each, and the clean ones to which they lead
        from there, both in patches [N, T, 4, c]."""
        brush, noise = self.brush, self.brush.noise
        if noise is None:
            noise = self._noise(len(image_ids), PAINT)
        groups = self.groups(image_ids)
        steps = schedule(brush.steps, shift=self.spec.time_shift, sigmas_bf16=self.rope_bf16)
        yield from followed(patches_from_map(noise), groups, steps, brush)

    def groups(self, image_ids: np.ndarray) -> list[Group]:
        """The rows of a painting of image ids [N, T], bound to the transformer, those of the prompt first."""
        by_caption = self._rows(image_ids)
        names = ("dit", "vae_decoder") if self.preview else ("dit",)
        dit = self.loaded.sessions(*names)[0]
        return [Group(dit, caption, rows, self.spec) for caption, rows in by_caption]

    def decoded(self, latents: np.ndarray) -> np.ndarray:
        """What the VAE makes of latents [N, c, q, q]: float32 [N, 3, R, R] around [-1, 1]."""
        (decoder,) = self.loaded.sessions("vae_decoder")
        return run(decoder, {"latents": latents})["image"]

    def _images(self, patches: np.ndarray) -> np.ndarray:
        return images_from_painted(self.decoded(map_from_patches(patches)))

    def encoded(self, ids: np.ndarray) -> np.ndarray:
        """What the text encoder makes of ids [1, L]: float32 [1, L, H]."""
        embedding, encoder = self.loaded.sessions("text_embedding", "text_encoder")
        embeds = run(embedding, {"input_ids": ids})["inputs_embeds"]
        positions = np.arange(ids.shape[1])[None]
        return run(encoder, {"inputs_embeds": embeds, "position_ids": positions})["hidden_states"]

    def _rows(self, image_ids: np.ndarray) -> list[tuple[np.ndarray, dict[str, Row]]]:
        """The captions, that of the prompt first, and the rows under each."""
        (codebook,) = self.loaded.sessions("codebook")
        embeds = run(codebook, {"image_ids": image_ids})["vq_embeds"]
        vq = patches_from_map(vq_map(embeds, side=self.brush.side))
        none = np.zeros_like(vq)
        no_source = np.zeros((*vq.shape[:3], self.spec.latent_channels), np.float32)
        seen = Row(vq, no_source) if self.image is None else Row(none, self._source(self.image))
        caption, with_text = self.encoded(self.caption_ids), {"t": seen}
        if self.brush.text <= 1:
            return [(caption, with_text)]
        if self.image is not None:
            with_text["x"] = Row(vq, no_source)
        without = {"u": Row(none, no_source), "i": seen}
        return [(caption, with_text), (self.encoded(self.captions.empty), without)]

    def _source(self, image: np.ndarray) -> np.ndarray:
        """The latent of an edit's image, in patches."""
        (encoder,) = self.loaded.sessions("vae_encoder")
        pixels = source_from_image(image, resolution=self.brush.side * FACTOR)
        moments = run(encoder, {"image": pixels})["moments"]
        noise = self.brush.source_noise
        if noise is None:
            noise = self._noise(1, SOURCE)
        return patches_from_map(latent_from_moments(moments, noise, self.spec))

    def _noise(self, images: int, what: int) -> np.ndarray:
        shape = (self.spec.latent_channels, self.brush.side, self.brush.side)
        return normal_noise(self.seed, images=images, shape=shape, what=what)


def followed(
    noise: np.ndarray, groups: list[Group], steps: Schedule, brush: Brush
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The latents after each step, and the clean ones to which they lead from there, in patches."""
    held = bf16_rounded if brush.latents_bf16 else np.asarray
    latents, count = held(noise), len(steps.times)
    for k in range(count):
        last, features = k == count - 1, time_features(float(steps.times[k]))
        found: dict[str, np.ndarray] = {}
        for group in groups if not last or "x" in groups[0].names else groups[:1]:
            found |= group.velocities(latents, features)
        v = guided(found, brush, last=last)
        latents = held(latents + (steps.sigmas[k] - steps.sigmas[k + 1]) * v)
        yield latents, latents + steps.sigmas[k + 1] * v


def guided(found: dict[str, np.ndarray], brush: Brush, *, last: bool) -> np.ndarray:
    """Combine the velocities of the rows; the last step has only the guidance of an edit's image tokens."""
    v = found["t"]
    if "i" in found and not last:
        text, image = np.float32(brush.text), np.float32(brush.image)
        v = found["u"] + text * (found["t"] - found["i"]) + image * (found["i"] - found["u"])
    return v + np.float32(brush.vq) * (found["x"] - found["u"]) if "x" in found else v
