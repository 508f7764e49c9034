"""The text path of the bundled models: a small tokenizer, and a UMT5 whose every token says what its caption says."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.conditioning.text import Tokenizer
from wan_core.models.config import TextEncoderConfig
from wan_core.models.text_encoder import UMT5Encoder, relative_buckets
from wan_core.runtime import log
from wancore.trainer.data.synthetic import CAMERAS, COLOURS, GROUNDS, LANGUAGES, MOTIONS, PACES, SHAPES, Scene, Word

MAX_TOKENS = 512
BATCH = 96

ATTRIBUTES: Mapping[str, Sequence[str]] = {
    "colour": tuple(COLOURS),
    "shape": tuple(SHAPES),
    "ground": tuple(GROUNDS),
    "motion": tuple(MOTIONS),
    "pace": ("", *PACES),
    "camera": ("None", *CAMERAS),
}
"""What a caption says, with the values of each. One more class of each means that it is not said."""

OTHERS = (
    "a small town at sunset with lights and river dog is running while it dark camera moves house tree water mountain "
    "snow rain people city car bird cat big little slow very film video picture of that which there one two"
)
"""Words that a newcomer may type: known to the tokenizer, so that they become one token each, and ignored."""


def phrases(language: str) -> list[str]:
    """Every phrase that captions of a language are made of."""
    words: list[Word] = [row[1] for row in COLOURS.values()] + [row[1] for row in PACES.values()]
    words += [*SHAPES.values(), *MOTIONS.values(), *CAMERAS.values(), *(ground.words for ground in GROUNDS.values())]
    return [phrase for word in words for phrase in getattr(word, language)]


def english_words() -> list[str]:
    """The words of the tokenizer."""
    text = " ".join((*phrases("english"), OTHERS, "a the over on in front of camera , the"))
    return sorted(set(text.replace(",", " ").split()))


def chinese_pieces() -> list[str]:
    """Whole phrases and their single characters."""
    found = {*phrases("chinese"), "在", "上", "前", "，镜头"}
    return sorted(found | {character for phrase in found for character in phrase})


@dataclass(frozen=True)
class Caption:
    """A text, and what it says of each of `ATTRIBUTES`: the number of the value, or of the class "not said"."""

    text: str
    labels: tuple[int, ...]


def draw_caption(r: random.Random) -> Caption:
    """A caption of a random scene; some say only a part, some hold a word that means nothing."""
    seed = r.randrange(2**31)
    camera = r.choice(tuple(CAMERAS)) if r.random() < 0.25 else "None"
    still = {"motion": "still", "pace": None} if r.random() < 0.12 else {}
    scene = Scene.random(seed, camera=camera, **still)
    language = LANGUAGES[r.random() < 0.25]
    text = scene.caption(r.randrange(2**31), language)
    labels = {name: values.index(getattr(scene, name) or "") for name, values in ATTRIBUTES.items()}
    if language == "english" and r.random() < 0.3:
        text, hidden = _shortened(text, scene, r)
        labels.update({name: len(ATTRIBUTES[name]) for name in hidden})
    if language == "english" and r.random() < 0.2:
        words = text.split(" ")
        words.insert(r.randrange(len(words) + 1), r.choice(OTHERS.split()))
        text = " ".join(words)
    return Caption(text, tuple(labels.values()))


def _shortened(text: str, scene: Scene, r: random.Random) -> tuple[str, list[str]]:
    """The caption without one of its parts, and which attributes it no longer says."""
    name = r.choice(("colour", "ground", "motion"))
    if name == "colour":
        return text.replace(f"{scene.colour} ", "", 1), ["colour"]
    table = {"ground": GROUNDS[scene.ground].words, "motion": MOTIONS[scene.motion]}[name]
    for phrase in table.english:
        if phrase in text:
            for before in ("over ", "on ", "in front of ", ""):
                if before + phrase in text:
                    return " ".join(text.replace(before + phrase, "", 1).split()), [name]
    return text, []


def train(config: TextEncoderConfig, tokenizer: Tokenizer, steps: int, seed: int = 0) -> Mapping[str, Tensor]:
    """The weights of a text encoder from whose every token all attributes can be read."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    encoder = UMT5Encoder(config)
    _initialise(encoder)
    heads = nn.ModuleList(nn.Linear(config.dim, len(values) + 1) for values in ATTRIBUTES.values())
    weights = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(weights, 2e-3, weight_decay=1e-3)
    pool = _by_length(tokenizer, [draw_caption(r) for _ in range(20000)])
    sizes = {length: len(ids) for length, (ids, _) in pool.items()}
    for step in range(1, steps + 1):
        ids, labels = pool[r.choices(list(sizes), list(sizes.values()))[0]]
        pick = torch.randint(len(ids), (BATCH,))
        rows = encode(encoder, ids[pick])
        # Noise keeps the attributes apart, so that a denoiser can read them from any one token.
        rows = rows + 0.3 * torch.randn_like(rows)
        losses = [
            F.cross_entropy(head(rows).flatten(0, 1), labels[pick, i, None].expand(rows.shape[:2]).flatten())
            for i, head in enumerate(heads)
        ]
        loss = torch.stack(losses).sum()
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, step / 30) * max(0.03, 1 - step / steps)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        if step % 200 == 0:
            log.info("Text: step %d, loss %.3f", step, loss.item())
    log.info("Text: %s", accuracy(encoder, heads, pool))
    return encoder.state_dict()


@torch.no_grad()
def _initialise(encoder: UMT5Encoder) -> None:
    for name, weight in encoder.named_parameters():
        if weight.ndim == 1:
            weight.fill_(1.0)
        elif name.startswith("token_embedding"):
            nn.init.normal_(weight)
        else:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)


def encode(encoder: UMT5Encoder, ids: Tensor) -> Tensor:
    """Token ids (B, L) of texts of one length to rows (B, L, D), with gradients."""
    x = encoder.token_embedding(ids)
    buckets = relative_buckets(ids.shape[1], encoder.config.num_buckets, ids.device)
    for block in encoder.blocks:
        x = block(x, buckets)
    return encoder.norm(x)


def _by_length(tokenizer: Tokenizer, captions: Sequence[Caption]) -> dict[int, tuple[Tensor, Tensor]]:
    """Ids (N, L) and labels (N, attributes) of captions, by their number of tokens."""
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for caption in captions:
        ids = tokenizer.ids(caption.text, MAX_TOKENS)
        rows.setdefault(len(ids), []).append((ids, torch.tensor(caption.labels)))
    return {length: (torch.stack([a for a, _ in of]), torch.stack([b for _, b in of])) for length, of in rows.items()}


@torch.no_grad()
def accuracy(encoder: UMT5Encoder, heads: nn.ModuleList, pool: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The share of tokens from which each attribute is read right."""
    hits, count = torch.zeros(len(ATTRIBUTES)), 0
    for ids, labels in pool.values():
        rows = encode(encoder, ids[:200])
        for i, head in enumerate(heads):
            hits[i] += (head(rows).argmax(-1) == labels[:200, i, None]).float().mean() * len(ids[:200])
        count += len(ids[:200])
    return {name: round(float(hit) / count, 4) for name, hit in zip(ATTRIBUTES, hits, strict=True)}
