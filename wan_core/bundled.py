"""The bundled tiny models: real key names and structure, small sizes.

Every workflow runs on them on any machine, without a download. Those of which the folder `trained` has weights draw
films of the world that `tools.family` trained them on, `trainer.data.synthetic`. Weights that nobody trained follow
from the key alone.
"""

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import catalog
from .atomic import replacing
from .loading.tensor_files import read_whole, write_safetensors
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

EXPERTS = {"high": 1, "low": 2}
"""The transformers of a pair, that for high noise first: the name of their trained weights, the seed of drawn ones."""

NEAR = {"fun_control": "fun_v1_1_control", "flf2v": "i2v", "i2v_a14b": "i2v"}
"""Structures whose weights stand for those of another one as well: it has some inputs more or less."""

TRAINED = Path(__file__).with_name("trained")
"""The weights that `python -m tools.family pack` has stored."""

STAMP = "made_of"
"""Beside the files of a bundled model: the `version` of the weights that they were made of."""


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
    """Write the missing files of the bundled model `model_id` below the models folder `root`, in the original layout,
    and all of them where they were made of other trained weights than this pack's.

    The text-to-video model brings the encoders and the speed-control adapter that all of them share, TI2V-5B the VAE
    of its kind.
    """
    folder = root / model_id
    stamp = folder / STAMP
    is_current = stamp.is_file() and stamp.read_text(encoding="utf-8") == version()
    for name, part in parts(model_id).items():
        if is_current and (folder / name).exists():
            continue
        with replacing(folder / name) as partial:
            if name.endswith(".safetensors"):
                write_safetensors(partial, part.weights())
            else:
                torch.save(part.weights(), partial)
    tokenizer = folder / catalog.TOKENIZER_PATTERN / TOKENIZER_FILE
    if model_id == catalog.TINY and not (is_current and tokenizer.exists()):
        with replacing(tokenizer) as partial:
            if (trained := TRAINED / TOKENIZER_FILE).exists():
                partial.write_bytes(trained.read_bytes())
            else:
                write_tokenizer(partial)
    if not is_current:
        with replacing(stamp) as partial:
            partial.write_text(version(), encoding="utf-8")
    return folder


@cache
def version() -> str:
    """A number that changes with any of the trained weights."""
    number = 0
    for file in sorted(Path(__file__).parent.glob("trained/*")):
        number = zlib.crc32(file.read_bytes(), zlib.crc32(file.name.encode(), number))
    return f"{number:08x}"


LEVELS, SCALE = ":levels", ":scale"
"""Ends of the names of what is stored of a weight's difference from that of the base: see `unpack`."""


def unpack(levels: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor from levels (rows, bytes) of 2, 4 or 8 bits, the first in the lowest bits of a byte.

    The middle of the levels means zero, and the distance of two of them is the row's `scale` (rows,).
    """
    columns = prod(shape[1:])
    bits = 8 * levels.shape[1] // columns
    numbers = levels[..., None] >> torch.arange(0, 8, bits, dtype=torch.uint8) & (2**bits - 1)
    values = (numbers.flatten(1) - (2**bits - 1) / 2) * scale.float()[:, None]
    return values.reshape(shape)


@dataclass(frozen=True)
class Part:
    """The model in one file: its class, its sizes, the names of its trained weights, of which the first that is stored
    counts, and the seed of drawn ones.
    """

    cls: type[nn.Module]
    config: Any
    names: tuple[str, ...] = ()
    seed: int = 0

    @property
    def base(self) -> str | None:
        """The name of the transformer that this one was trained from; None of what was trained from nothing."""
        if not issubclass(self.cls, WanDiT):
            return None
        name = "dit_ti2v_5b" if self.config.geometry == WAN_22 else "dit_t2v"
        return None if self.names == (name,) else name

    def weights(self) -> dict[str, Tensor]:
        """Trained weights in float32; where nobody trained any, drawn ones."""
        stored = next((_stored(name) for name in self.names if _is_stored(name)), {})
        if not stored:
            with on_meta():
                return state_dict(self.cls(self.config), self.seed)
        if self.base is None:
            return {key: tensor.float() for key, tensor in stored.items()}
        weights = widened(_stored(self.base), self.config)
        for key, weight in weights.items():
            if key + LEVELS in stored:
                weight += unpack(stored[key + LEVELS], stored[key + SCALE], weight.shape)
            elif key in stored and stored[key].shape == weight.shape:
                weight.copy_(stored[key])
        return weights


def _is_stored(name: str) -> bool:
    return (TRAINED / f"{name}.safetensors").exists()


def _stored(name: str) -> dict[str, Tensor]:
    return read_whole(TRAINED / f"{name}.safetensors")[0]


def parts(model_id: str) -> dict[str, Part]:
    """What each file of a bundled model holds, by name."""
    row = catalog.find_row(model_id)
    assert row is not None, f"{model_id} is not in the catalog"
    config, name = DITS[row.variant], f"dit_{row.variant}"
    names = (name, f"dit_{NEAR[row.variant]}") if row.variant in NEAR else (name,)
    if row.is_pair:
        experts = [Part(WanDiT, config, (f"{name}_{side}", *names), seed) for side, seed in EXPERTS.items()]
    else:
        experts = [Part(WanDiT, config, names)]
    found = {pattern.replace("*", ""): part for pattern, part in zip(row.files, experts, strict=True)}
    if model_id == catalog.TINY:
        found[catalog.TEXT_ENCODER_PATTERN] = Part(UMT5Encoder, TEXT_ENCODER, ("text",))
        found[catalog.VAE_PATTERN] = Part(WanVAE, VAE, ("vae",))
        found[catalog.IMAGE_ENCODER_PATTERN] = Part(ImageEncoder, IMAGE_ENCODER)
        found[catalog.MOTION_CONTROLLER_PATTERN] = Part(MotionController, MOTION_CONTROLLER, ("speed",))
    if row.variant == "ti2v_5b":
        found[catalog.VAE_22_PATTERN] = Part(WanVAE, VAE_22, ("vae_22",))
    return found
