"""The bundled tiny models: real key names and structure, small sizes, weights that follow from the key alone.

They draw abstract patterns, not films. They exist so that every workflow can run on any machine without a download."""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import catalog
from .atomic import replacing
from .loading.tensor_files import write_safetensors
from .models.config import (
    WAN_22,
    DiTConfig,
    ImageEncoderConfig,
    MotionControllerConfig,
    TextEncoderConfig,
    VAEConfig,
)
from .models.dit import WanDiT
from .models.image_encoder import ImageEncoder
from .models.layers import MotionController
from .models.ops import on_meta
from .models.text_encoder import UMT5Encoder
from .models.vae import WanVAE


def draw(key: str, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """The float32 weight called `key`: norm gains near 1, biases near 0, matrices scaled by one over root fan-in."""
    generator = np.random.default_rng([seed, zlib.crc32(key.encode())])
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

TOKENIZER_FILE = "tokenizer.json"
LETTERS = "\u2581abcdefghijklmnopqrstuvwxyz0123456789,.!?-'"

TEXT_ENCODER = TextEncoderConfig(vocab_size=320, dim=64, attention_dim=128, ffn_dim=160, num_heads=2, num_layers=3)
VAE = VAEConfig(base_dim=8)
VAE_22 = VAEConfig(base_dim=8, decoder_dim=12, geometry=WAN_22, patch=2, shortcuts=True)
IMAGE_ENCODER = ImageEncoderConfig(dim=160, mlp_dim=640, num_layers=4, out_dim=64)
MOTION_CONTROLLER = MotionControllerConfig(dim=256, freq_dim=64)
DIT = DiTConfig(dim=256, ffn_dim=512, num_layers=4, text_dim=64, freq_dim=64, image_dim=IMAGE_ENCODER.dim)
DIT_5B = replace(DIT, geometry=WAN_22, in_channels=48)
DITS: dict[str, DiTConfig] = {
    "t2v": DIT,
    "i2v": replace(DIT, in_channels=36, has_image_input=True),
    "flf2v": replace(DIT, in_channels=36, has_image_input=True, image_positions=514),
    "fun_control": replace(DIT, in_channels=48, has_image_input=True),
    "fun_v1_1_control": replace(DIT, in_channels=48, has_image_input=True, has_reference=True),
    "fun_camera": replace(DIT, in_channels=32, has_image_input=True, camera_channels=24),
    "vace": replace(DIT, vace_layers=(0, 2), vace_channels=96),
    "i2v_a14b": replace(DIT, in_channels=36),
    "fun_a14b_control": replace(DIT, in_channels=52, has_reference=True),
    "fun_a14b_camera": replace(DIT, in_channels=36, camera_channels=24),
    "ti2v_5b": DIT_5B,
    "fun_5b_inp": replace(DIT_5B, in_channels=100),
    "fun_5b_control": replace(DIT_5B, in_channels=148, has_reference=True),
    "fun_5b_camera": replace(DIT_5B, in_channels=100, camera_channels=24),
}
"""One structure of each kind, by the name of its variant."""

EXPERT_SEEDS = (1, 2)
"""Of the weights of a pair, the transformer for high noise first."""


def state_dict(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Weights by the recipe for a module built on the meta device."""
    return {key: draw(key, tuple(tensor.shape), seed) for key, tensor in module.state_dict().items()}


def widened(base: Mapping[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """The float32 weights of a model of structure `config` that begins as the text-to-video model `base`: it draws what
    `base` draws, whatever its further inputs hold.

    Further input channels and image tokens begin without effect, VACE's blocks as copies of the base's. What no weight
    of the base stands for is drawn by `draw`.
    """
    with on_meta():
        shapes = {key: tuple(tensor.shape) for key, tensor in WanDiT(config).state_dict().items()}
    out = {}
    for key, shape in shapes.items():
        part, _, rest = key.partition(".")
        source = key
        if part == "vace_blocks":
            index, _, name = rest.partition(".")
            source = f"blocks.{config.vace_layers[int(index)]}.{name}"
        elif part in ("ref_conv", "vace_patch_embedding"):
            source = f"patch_embedding.{rest}"
        elif "_img." in key:
            source = key.replace("_img.", ".")
        begin = base.get(source)
        silent = key.endswith(("v_img.weight", "v_img.bias", "after_proj.weight", "after_proj.bias"))
        silent |= key.startswith(("control_adapter.conv.", "ref_conv.")) or key.endswith("emb_pos")
        if silent:
            out[key] = torch.zeros(shape)
        elif key.endswith("before_proj.weight"):
            out[key] = torch.eye(shape[0])
        elif begin is None:
            out[key] = draw(key, shape)
        elif begin.shape != shape:
            out[key] = torch.zeros(shape)
            out[key][:, : begin.shape[1]] = begin.float()
        else:
            out[key] = begin.float().clone()
    return out


def write_tokenizer(path: Path, words: Iterable[str] = WORDS.split(), others: Iterable[str] = ()) -> None:
    """A tokenizer over a list of words and single letters, in the format of google/umt5-xxl's tokenizer.json; `others`
    are pieces of languages that are written without spaces.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("\u2581" + word, -2.0 - 0.01 * i) for i, word in enumerate(sorted(set(words)))]
    pieces += [(letter, -8.0) for letter in LETTERS]
    pieces += [(piece, -2.0 if len(piece) > 1 else -8.0) for piece in others]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


def write_model(root: Path, model_id: str) -> Path:
    """Write the missing files of the bundled model `model_id` below the models folder `root`, in the original layout.

    The text-to-video model brings the encoders and the speed-control adapter that all of them share, TI2V-5B the VAE
    of its kind.
    """
    folder = root / model_id
    for name, (cls, config, seed) in _files(model_id).items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with on_meta():
                module = cls(config)
            with replacing(folder / name) as partial:
                if name.endswith(".safetensors"):
                    write_safetensors(partial, state_dict(module, seed))
                else:
                    torch.save(dict(state_dict(module, seed)), partial)
    if model_id == catalog.TINY and not (folder / catalog.TOKENIZER_PATTERN / TOKENIZER_FILE).exists():
        with replacing(folder / catalog.TOKENIZER_PATTERN / TOKENIZER_FILE) as partial:
            write_tokenizer(partial)
    return folder


def _files(model_id: str) -> dict[str, tuple[type[nn.Module], Any, int]]:
    """The class, the sizes and the seed of the model in each file of a bundled model, by name."""
    row = catalog.find_row(model_id)
    assert row is not None, f"{model_id} is not in the catalog"
    seeds = EXPERT_SEEDS if row.is_pair else (0,)
    files: dict[str, tuple[type[nn.Module], Any, int]] = {
        pattern.replace("*", ""): (WanDiT, DITS[row.variant], seed)
        for pattern, seed in zip(row.files, seeds, strict=True)
    }
    if model_id == catalog.TINY:
        files[catalog.TEXT_ENCODER_PATTERN] = (UMT5Encoder, TEXT_ENCODER, 0)
        files[catalog.VAE_PATTERN] = (WanVAE, VAE, 0)
        files[catalog.IMAGE_ENCODER_PATTERN] = (ImageEncoder, IMAGE_ENCODER, 0)
        files[catalog.MOTION_CONTROLLER_PATTERN] = (MotionController, MOTION_CONTROLLER, 0)
    if row.variant == "ti2v_5b":
        files[catalog.VAE_22_PATTERN] = (WanVAE, VAE_22, 0)
    return files
