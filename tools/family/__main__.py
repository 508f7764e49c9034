"""`python -m tools.family FOLDER`, from the pack's folder: train the bundled models and write them as checkpoints.

Each stage is skipped where its file is there already, so a stopped run continues with the stage that it was in.
"""

import argparse
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import pack

pack.register()

from tools.family import denoise, text, vae  # noqa: E402
from wan_core import bundled, catalog  # noqa: E402
from wan_core.conditioning.text import Tokenizer  # noqa: E402
from wan_core.models.dit import WanDiT  # noqa: E402
from wan_core.models.text_encoder import UMT5Encoder  # noqa: E402
from wan_core.models.vae import WanVAE  # noqa: E402
from wan_core.runtime import log  # noqa: E402

SHARES = {"text": 0.02, "vae": 0.35, "t2v": 0.63}
"""Of the minutes that training takes."""


def main() -> None:
    """Run the stages whose files are missing."""
    parser = argparse.ArgumentParser(prog="python -m tools.family", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=110.0, help="of training, on all cores (default: 110)")
    parser.add_argument("--clips", type=int, default=6000, help="that the denoiser is trained on (default: 6000)")
    words = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    folder: Path = words.folder
    minutes = {name: share * words.minutes for name, share in SHARES.items()}
    tokenizer_file = folder / catalog.TOKENIZER_PATTERN / bundled.TOKENIZER_FILE
    if not tokenizer_file.exists():
        tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
        bundled.write_tokenizer(tokenizer_file, text.english_words(), text.chinese_pieces())
    tokenizer = Tokenizer.from_folder(tokenizer_file.parent)
    encoder = UMT5Encoder(bundled.TEXT_ENCODER)
    weights = _stage(folder / "text.safetensors", lambda: text.train(encoder.config, tokenizer, minutes["text"]))
    encoder.load_state_dict(weights)
    autoencoder = WanVAE(bundled.VAE)
    autoencoder.load_state_dict(_stage(folder / "vae.safetensors", lambda: vae.train(bundled.VAE, minutes["vae"])))
    autoencoder.use_channels_last()

    def train_t2v() -> Mapping[str, Tensor]:
        data = denoise.prepare(autoencoder, encoder, tokenizer, words.clips)
        empty = denoise.text_rows(encoder, tokenizer, [""])
        return denoise.train(bundled.DIT, data, empty, minutes["t2v"])

    WanDiT(bundled.DIT).load_state_dict(_stage(folder / catalog.DIT_FILE, train_t2v))
    torch.save(encoder.state_dict(), folder / catalog.TEXT_ENCODER_PATTERN)
    torch.save(autoencoder.state_dict(), folder / catalog.VAE_PATTERN)


def _stage(file: Path, work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights in `file`, which `work` makes where it is missing; they are kept in bfloat16."""
    if not file.exists():
        log.info("%s ...", file.name)
        made = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in work().items()}
        save_file(made, file)
    return {name: tensor.float() for name, tensor in load_file(file).items()}


if __name__ == "__main__":
    main()
