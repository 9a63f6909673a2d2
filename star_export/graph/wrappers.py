"""The components as modules with flat boundaries: float32 in and out, one tensor per cache.

Each wrapper holds modules of one `reference.model.Star` and computes in the type of their weights. Wrappers
add no arithmetic of their own, with two exceptions: the adapter and the codebook are folded into one table
(one gather instead of an MLP), and `ImageHead` samples inside the graph.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from reference.config import StarConfig
from reference.model import Star

from ..components import COMPONENTS, TOP_K_LIMIT, Part

TABLE = "image_table.weight"


class FoldedStar(Star):
    """Star with the table adapter(codebook) [codebook_size, H] as `image_table`, in place of the two."""

    def __init__(self, config: StarConfig, **options):
        super().__init__(config, **options)
        self.image_table = nn.Embedding(config.vq.codebook_size, config.base_ar.hidden_size)

    def image_embedding(self, image_ids: torch.Tensor) -> torch.Tensor:
        return self.image_table(image_ids)


class TokenEmbedding(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.embedding = star.token_embedding

    def forward(self, input_ids):  # [B,S] -> [B,S,H]
        return self.embedding(input_ids).float()


class ImageEmbedding(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.table = star.image_table

    def forward(self, image_ids):  # [N,T] -> [N,T,H]
        return self.table(image_ids).float()


class VisionEncoder(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.encoder = star.vision_encoder

    # [P,1176], [P,D/2], [P,D/2], [P] -> [P/4,H]
    def forward(self, pixel_values, rotary_cos, rotary_sin, window_ids):
        dtype = next(self.encoder.parameters()).dtype
        return self.encoder(pixel_values.to(dtype), rotary_cos, rotary_sin, window_ids).float()


class VQEncoder(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.encoder = star.vq_encoder

    def forward(self, image):  # [N,3,R,R] -> [N,T]
        return self.encoder(image.to(next(self.encoder.parameters()).dtype))


class VQDecoder(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.decoder = star.vq_decoder

    def forward(self, image_ids):  # [N,T] -> [N,3,R,R]
        return self.decoder(image_ids).float()


class _Decoder(nn.Module):
    """A decoder, or consecutive `layers` of it, with one argument and one result per cache.

    inputs_embeds [B,S,H], position_ids [3,B,S], write_indices [B], then each layer's key and value [B,KV,C,D]
    -> hidden_states [B,S,H], then each layer's updated key and value.
    """

    def __init__(self, decoder: nn.Module, layers: range):
        super().__init__()
        self.decoder, self.layers = decoder, layers

    def forward(self, inputs_embeds, position_ids, write_indices, *past):
        dtype = next(self.decoder.parameters()).dtype
        pairs = list(zip(past[::2], past[1::2]))
        hidden_states, present = self.decoder(
            inputs_embeds.to(dtype), position_ids, write_indices, pairs, self.layers
        )
        return hidden_states.float(), *(tensor for pair in present for tensor in pair)


class BaseAR(_Decoder):
    def __init__(self, star: FoldedStar, layers: range):
        super().__init__(star.base_ar, layers)


class StackedAR(_Decoder):
    def __init__(self, star: FoldedStar, layers: range):
        super().__init__(star.stacked_ar, layers)


class TextHead(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.head = star.text_head

    def forward(self, hidden_states):  # [B,1,H] -> [B,V]
        return self.head(hidden_states[:, -1].to(self.head.weight.dtype)).float()


class ImageHead(nn.Module):
    """Guidance, top-k, top-p and the draw (docs/star.md 3.4), in float32 from the logits on.

    The drawn id is the arg-max of logit + noise over the kept ids, and the lowest of equal ones. The filters
    give the lowest logit that is kept, so nothing depends on the order in which an executor ranks equal
    logits. At most TOP_K_LIMIT candidates are ranked.
    """

    def __init__(self, star: FoldedStar):
        super().__init__()
        self.head, self.table = star.image_head, star.image_table
        self.candidates = min(TOP_K_LIMIT, star.config.vq.codebook_size)

    def forward(self, hidden_states, guidance, top_k, top_p, noise):
        logits = self.head(hidden_states.to(self.head.weight.dtype)).float()
        cond, uncond = logits.unflatten(0, (-1, 2)).unbind(1)  # [N,S,V] each
        logits = uncond + guidance * (cond - uncond)
        ranked, _ = torch.topk(logits.flatten(0, 1), self.candidates)  # [N*S,K], descending
        threshold = ranked.index_select(1, top_k - 1)
        probabilities = torch.softmax(torch.where(ranked >= threshold, ranked, float("-inf")), -1)
        cumulative = torch.cumsum(probabilities, -1)
        before = torch.cat([torch.zeros_like(cumulative[:, :1]), cumulative[:, :-1]], -1)
        kept = (ranked >= threshold) & ((before <= top_p) | (top_p >= 1))  # the one that crosses top_p stays
        lowest = torch.where(kept, ranked, float("inf")).amin(-1).reshape(*logits.shape[:2], 1)
        scores = torch.where(logits >= lowest, logits + noise, float("-inf"))
        largest = scores >= scores.amax(-1, keepdim=True)
        image_ids = self._first(largest).to(torch.int64)  # [N,S]
        inputs_embeds = self.table(image_ids).float()  # [N,S,H]
        return image_ids, inputs_embeds.repeat_interleave(2, 0), logits

    def _first(self, found):
        """The first id of each row that is `found`: [N,S,V] bool -> [N,S] float32, exact.

        Within blocks, then among blocks, because the graph would store as many numbers as it counts.
        """
        size = math.gcd(found.shape[-1], 256)
        places, blocks = (
            torch.arange(count, dtype=torch.float32, device=found.device)
            for count in (size, found.shape[-1] // size)
        )
        within = torch.where(found.unflatten(-1, (-1, size)), places, float("inf")).amin(-1)
        return (within + blocks * size).amin(-1)


class Codebook(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.codebook = star.codebook

    def forward(self, image_ids):  # [N,T] -> [N,T,c]
        return self.codebook(image_ids).float()


class TextEmbedding(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.embedding = star.text_embedding

    def forward(self, input_ids):  # [B,S] -> [B,S,H]
        return self.embedding(input_ids).float()


class TextEncoder(nn.Module):
    def __init__(self, star: FoldedStar, layers: range):
        super().__init__()
        self.encoder, self.layers = star.text_encoder, layers

    def forward(self, inputs_embeds, position_ids):  # [1,L,H], [1,L] -> [1,L,H]
        dtype = next(self.encoder.parameters()).dtype
        return self.encoder(inputs_embeds.to(dtype), position_ids, self.layers).float()


class DiT(nn.Module):
    """The diffusion transformer, or consecutive `layers` of it.

    The first layers take latents and source [N,T,4,c], VQ map [N,T,4,C], caption [1,L,H] and time [1,256];
    later ones caption [N,L,H], both halves of the image [N,2T,H] and the embedding of the time. All take the
    rotary tables [L,D/2] twice and [2T,D/2] twice. The last ones give the velocity [N,T,4,c], and others what
    later ones take.
    """

    def __init__(self, star: FoldedStar, layers: range):
        super().__init__()
        self.dit, self.layers = star.dit, layers

    def forward(self, *inputs):
        dtype = next(self.dit.parameters()).dtype
        *given, caption_cos, caption_sin, image_cos, image_sin = (x.to(dtype) for x in inputs)
        angles = (caption_cos, caption_sin), (image_cos, image_sin)
        made = () if self.layers.start else self.dit.refined(*given, *angles)
        text, image, time_embed = made or given
        text, image = self.dit.through(self.layers, text, image, time_embed, *angles)
        if self.layers.stop == len(self.dit.layers):
            return self.dit.velocity(image, time_embed).float()
        return (text.float(), image.float(), *(x.float() for x in made[2:]))


class VAEEncoder(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.encoder = star.vae_encoder

    def forward(self, image):  # [N,3,8Q,8Q] -> [N,2c,Q,Q]
        return self.encoder(image.to(next(self.encoder.parameters()).dtype)).float()


class VAEDecoder(nn.Module):
    def __init__(self, star: FoldedStar):
        super().__init__()
        self.decoder = star.vae_decoder

    def forward(self, latents):  # [N,c,Q,Q] -> [N,3,8Q,8Q]
        return self.decoder(latents).float()


def wrapper_of(part: Part, star: FoldedStar) -> nn.Module:
    """The module of one graph or table, with modules of `star`."""
    wrapper = globals()[COMPONENTS[part.component].wrapper]
    return (wrapper(star, part.layers) if part.layers else wrapper(star)).eval()
