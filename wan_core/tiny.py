"""The bundled tiny models: real key names and structure, small sizes, weights that follow from the key alone.

They draw abstract patterns, not films. They exist so that every workflow can run on any machine without a download.
"""

import contextlib
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from . import catalog
from .models.config import DiTConfig, TextEncoderConfig, VAEConfig
from .models.dit import WanDiT
from .models.text_encoder import UMT5Encoder
from .models.vae import WanVAE


def draw(key: str, shape: tuple[int, ...]) -> Tensor:
    """The float32 weight called `key`: norm gains near 1, biases near 0, matrices scaled by one over root fan-in."""
    generator = np.random.default_rng([0, zlib.crc32(key.encode())])
    x = generator.standard_normal(tuple(shape), dtype=np.float32)
    if key.endswith((".gamma", "norm.weight")) or (key.endswith(".weight") and len(shape) == 1):
        x = 1 + 0.1 * x
    elif key.endswith(".bias"):
        x = 0.1 * x
    elif key.endswith("modulation"):
        x = 0.3 * x
    elif "embedding.weight" in key and len(shape) == 2:
        x = 0.5 * x
    elif len(shape) >= 2:
        x = x / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


WORDS = (
    "a small town at sunset with lights and a river a dog is running over the green field while the sky is dark and "
    "the camera moves left and right up and down fast slow house tree water mountain snow rain people city car bird cat"
)
"""The whole vocabulary besides single letters."""

LETTERS = "\u2581abcdefghijklmnopqrstuvwxyz0123456789,.!?-'"

TEXT_ENCODER = TextEncoderConfig(vocab_size=320, dim=64, attention_dim=128, ffn_dim=160, num_heads=2, num_layers=3)
VAE = VAEConfig(base_dim=8)
DIT = DiTConfig(dim=256, ffn_dim=512, num_layers=4, text_dim=64, freq_dim=64)
VARIANT_DITS: dict[str, DiTConfig] = {"t2v": DIT}


def state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Weights by the recipe for a module built on the meta device."""
    return {key: draw(key, tuple(tensor.shape)) for key, tensor in module.state_dict().items()}


def write_tokenizer(folder: Path) -> None:
    """A tokenizer over a fixed word list, in the layout of google/umt5-xxl."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -2.0 - 0.01 * i) for i, word in enumerate(sorted(set(WORDS.split())))]
    pieces += [(letter, -8.0) for letter in LETTERS]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder: Path, variant: str = "t2v") -> Path:
    """Make the tiny model of `variant` in `folder`, in the original file layout, unless it is already there.

    The files are written beside the folder first and appear under it all at once.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with torch.device("meta"):
        dit, text_encoder, vae = WanDiT(VARIANT_DITS[variant]), UMT5Encoder(TEXT_ENCODER), WanVAE(VAE)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        draft = Path(temporary) / "model"
        draft.mkdir()
        save_file(state_dict(dit), draft / "diffusion_pytorch_model.safetensors")
        torch.save(state_dict(text_encoder), draft / catalog.TEXT_ENCODER_PATTERN)
        torch.save(state_dict(vae), draft / catalog.VAE_PATTERN)
        write_tokenizer(draft / catalog.TOKENIZER_PATTERN)
        with contextlib.suppress(OSError):  # another process was faster; its files are the same
            draft.rename(folder)
    return folder
