"""Train the bundled text-to-video model on latents of the drawn world."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.conditioning.text import Tokenizer
from wan_core.models.attention import rotary_table
from wan_core.models.config import HEAD_DIM, DiTConfig
from wan_core.models.dit import Prepared, WanDiT
from wan_core.models.layers import Context
from wan_core.models.text_encoder import UMT5Encoder
from wan_core.models.vae import WanVAE
from wan_core.runtime import log
from wancore.trainer.data.synthetic import LANGUAGES, Scene
from wancore.trainer.objective import Objective, errors, noisy, weighted

from .muon import Both, rank, world
from .text import MAX_TOKENS, encode
from .vae import NUM_FRAMES, pixels_of, training_scene

BATCH = 24
LR = 2e-3
CAPTIONS = 4
"""Sentences per clip."""
DROPPED = 0.12
"""The share of captions that are replaced by the empty one, for guidance."""


HARD = {"box": 1.8, "triangle": 1.1, "ball": 0.8, "spins": 2.2}
"""How often clips with these are drawn, beside others: what a small model is slow to learn."""


@dataclass(frozen=True)
class Data:
    """Normalised latents (N, z, F, h, w), text rows (N, captions, L, D), how many of these count (N, captions), and how
    often each clip is drawn (N,).
    """

    latents: Tensor
    text: Tensor
    lengths: Tensor
    shares: Tensor


@dataclass(frozen=True)
class Stage:
    """So many steps on so many clips of a size, with timesteps by `shift`: a low one says more of edges, a high one of
    places and ways.
    """

    width: int
    height: int
    clips: int
    steps: int
    shift: float


@torch.no_grad()
def prepare(
    vae: WanVAE, encoder: UMT5Encoder, tokenizer: Tokenizer, width: int, height: int, count: int, first: int = 0
) -> Data:
    """Latents and captions of `count` training clips of a size, from scene number `first` on.

    Of several processes each prepares a share of them.
    """
    scenes = [training_scene(number) for number in range(first + rank(), first + count, world())]
    latents = []
    for start in range(0, len(scenes), 8):
        clips = [scene.drawn(width, height, NUM_FRAMES).video for scene in scenes[start : start + 8]]
        latents.append(vae.encode(pixels_of(clips)))
    r = random.Random(first + rank())
    texts = [captions(scene, r) for scene in scenes]
    rows, lengths = text_rows(encoder, tokenizer, [text for several in texts for text in several])
    shape = (len(scenes), CAPTIONS)
    shares = torch.tensor([HARD[scene.shape] * HARD.get(scene.motion, 1.0) for scene in scenes])
    return Data(torch.cat(latents), rows.unflatten(0, shape), lengths.view(shape), shares / shares.sum())


def captions(scene: Scene, r: random.Random) -> list[str]:
    """What one clip is called in training: mostly in English."""
    return [scene.caption(r.randrange(2**31), LANGUAGES[i == CAPTIONS - 1]) for i in range(CAPTIONS)]


@torch.no_grad()
def text_rows(encoder: UMT5Encoder, tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Rows (N, L + 1, D) of texts, zero behind each text, and the number of rows (N,) of each."""
    ids = [tokenizer.ids(text, MAX_TOKENS) for text in texts]
    lengths = torch.tensor([len(row) for row in ids])
    out = torch.zeros(len(texts), int(lengths.max()) + 1, encoder.config.dim)
    for length in lengths.unique().tolist():
        (same,) = (lengths == length).nonzero(as_tuple=True)
        for part in same.split(512):
            out[part, :length] = encode(encoder, torch.stack([ids[i] for i in part.tolist()]))
    return out, lengths


@torch.no_grad()
def initialise(dit: WanDiT) -> None:
    """Blocks that add little at first, and a head that predicts nothing."""
    for name, weight in dit.named_parameters():
        if name.endswith(".bias"):
            weight.zero_()
        elif weight.ndim == 1:
            weight.fill_(1.0)
        elif name.endswith("modulation"):
            nn.init.normal_(weight, std=0.02)
        else:
            nn.init.xavier_uniform_(weight.view(len(weight), -1))
        if name.startswith(("head.head.weight", "time_projection")):
            weight.mul_(0.05)
        if name.endswith(("attn.o.weight", "ffn.2.weight")):
            weight.mul_(0.3)
    for block in dit.blocks:
        block.modulation[:, 2] += 1  # the gates
        block.modulation[:, 5] += 1


def velocity(dit: WanDiT, x: Tensor, timesteps: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    """As the model's own forward with 512 rows of text, of which all but `lengths` are zero.

    One zero row stands for all of them: with a bias of the logarithm of their number it has their share of attention.
    """
    count = int(lengths.max()) + 1
    is_zero = torch.arange(count) >= lengths[:, None]
    share = torch.log((MAX_TOKENS - lengths) / (count - lengths))[:, None]
    bias = torch.where(is_zero, share, 0.0)[:, None, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = bias if k.shape[1] == count and q.shape[1] != count else None
        heads = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=mask).transpose(1, 2)

    size = (x.shape[2], x.shape[3], x.shape[4])
    frames, height, width = (n // p for n, p in zip(size, dit.config.patch_size, strict=True))
    assert frames * height * width != count, "self-attention and cross-attention are told apart by these numbers"
    rope = rotary_table((frames, height, width), HEAD_DIM, x.device)
    prepared = Prepared(Context(dit.text_embedding(text[:, :count]), None, rope, attend), size)
    state = dit.embed(x, dit.embed_time(timesteps), prepared)
    dit.run_blocks([state])
    return dit.unembed(state)


def train(
    config: DiTConfig,
    stages: Sequence[tuple[Stage, Data]],
    empty: tuple[Tensor, Tensor],
    seed: int = 0,
) -> Mapping[str, Tensor]:
    """The weights of a text-to-video model that learns from the data of each of `stages` in turn.

    Small pictures come first: a step on them costs half as much. `empty` are the rows and length of the empty caption.
    """
    torch.manual_seed(seed)
    dit = WanDiT(config)
    initialise(dit)
    torch.manual_seed(seed + rank())
    r = np.random.default_rng([seed, rank()])
    optimizer = Both(dit, LR, by_adam=("text_embedding", "time_", "patch_embedding", "head"))
    steps, step, total = sum(stage.steps for stage, _ in stages), 0, 0.0
    for stage, data in stages:
        # Where a shape is and how it moves is decided in the most noise, which the reference's weights leave out.
        objective = Objective(weighting="none", shift=stage.shift)
        for _ in range(stage.steps):
            step += 1
            pick = data.shares.multinomial(BATCH, replacement=True)
            which = torch.from_numpy(r.integers(CAPTIONS, size=BATCH))
            text, lengths = data.text[pick, which].clone(), data.lengths[pick, which].clone()
            dropped = torch.from_numpy(r.random(BATCH) < DROPPED)
            text[dropped] = 0
            text[dropped, : empty[0].shape[1]] = empty[0][0]
            lengths[dropped] = empty[1][0]
            latents = data.latents[pick]
            noising = objective.at(torch.randn_like(latents), torch.from_numpy(r.integers(1000, size=BATCH)))
            predicted = velocity(dit, noisy(latents, noising), noising.timesteps, text, lengths)
            loss = weighted(errors(predicted, latents, noising), noising).mean()
            optimizer.step(loss, step / steps)
            total += loss.item()
            if step % 100 == 0 and rank() == 0:
                log.info("Text to video: step %d of %d, loss %.4f", step, steps, total / 100)
                total = 0.0
    return optimizer.averaged(dit)
