"""Damaged safetensors: models of every kind, LoRAs and latents, through every way in."""

import random
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from tests.attack import Trial
from tests.attack.child import Child
from tests.attack.mutations import safetensors_mutations
from tests.loading import inventories as inv

MODELS = ("info", "load", "map", "convert", "state")
KINDS = {
    "dit_t2v": MODELS, "vae": MODELS, "umt5": MODELS, "clip": MODELS,
    "lora": ("lora", "convert lora", "info"), "latents": ("latents", "caches"),
}  # fmt: skip
"""What is damaged, and the ways by which it comes in."""

QUICK = 24
"""Trials of a quick run; most of its time is the start of the child."""


@cache
def whole(kind: str) -> bytes:
    """A sound file of that kind."""
    if kind == "lora":
        names = (f"diffusion_model.blocks.{n}.self_attn.{leaf}" for n in range(4) for leaf in "qkv")
        shapes = {"lora_A.weight": (4, 256), "lora_B.weight": (256, 4), "alpha": ()}
        return save({f"{name}.{role}": torch.ones(shape) for name in names for role, shape in shapes.items()})
    if kind == "latents":
        return save({"latent_tensor": torch.zeros(1, 16, 2, 4, 4), "latent_format_version_0": torch.zeros(0)})
    return save(inv.tiny(kind))


def attack(count: int, seed: int) -> Iterator[Trial]:
    """`count` damaged files, each through one way in."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, Child("tests.attack.ways_in") as child:
        for number in range(count):
            kind = draw.choice(list(KINDS))
            job = draw.choice(KINDS[kind])
            name, content = next(safetensors_mutations(whole(kind), 1, seed * count + number))
            file = Path(folder) / f"{kind}_damaged.safetensors"
            file.write_bytes(content)
            yield child.judge(f"{kind}, {name}", job, file)
