"""`python -m tools.family FOLDER`, from the pack's folder: train the bundled models and write them as checkpoints.

Each stage is skipped where its file is there already, so a stopped run continues with the stage that it was in.
`torchrun --nproc-per-node 2 -m tools.family FOLDER` shares the work of a step among processes.
`python -m tools.family pack FOLDER` stores what was trained in the pack, `judge` says how well it draws.
"""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

import pack

pack.register()

from tools.family import denoise, judge, store, text, vae, variants  # noqa: E402
from tools.family.muon import rank  # noqa: E402
from wan_core import bundled, catalog  # noqa: E402
from wan_core.conditioning.text import Tokenizer  # noqa: E402
from wan_core.models.text_encoder import UMT5Encoder  # noqa: E402
from wan_core.models.vae import WanVAE  # noqa: E402
from wan_core.runtime import log  # noqa: E402

STEPS = {"text": 3000, "vae": 1500}
"""Of training, by stage."""
T2V = (
    denoise.Stage(64, 48, clips=2400, steps=3050, shift=5.0),
    denoise.Stage(vae.WIDTH, vae.HEIGHT, clips=2800, steps=2250, shift=5.0),
    denoise.Stage(vae.WIDTH, vae.HEIGHT, clips=2800, steps=1050, shift=3.0),
)
"""What text to video learns from: first small clips, whose steps cost half as much."""


def main() -> None:
    """Run the stages whose files are missing, or the command that is named."""
    command = {"pack": store.main, "judge": judge.main}.get(sys.argv[1] if len(sys.argv) > 1 else "")
    if command is not None:
        return command(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m tools.family", description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    tokenizer_file = folder / catalog.TOKENIZER_PATTERN / bundled.TOKENIZER_FILE
    if not tokenizer_file.exists() and rank() == 0:
        tokenizer_file.parent.mkdir(parents=True, exist_ok=True)
        bundled.write_tokenizer(tokenizer_file, text.english_words(), text.chinese_pieces())
    _wait()
    tokenizer = Tokenizer.from_folder(tokenizer_file.parent)
    encoder = UMT5Encoder(bundled.TEXT_ENCODER)
    encoder.load_state_dict(
        _stage(folder / "text.safetensors", lambda: text.train(encoder.config, tokenizer, STEPS["text"]))
    )
    autoencoder = WanVAE(bundled.VAE)
    autoencoder.load_state_dict(_stage(folder / "vae.safetensors", lambda: vae.train(bundled.VAE, STEPS["vae"])))
    autoencoder.use_channels_last()

    def train_t2v() -> Mapping[str, Tensor]:
        stages = []
        drawn: dict[tuple[int, int], denoise.Data] = {}
        for stage in T2V:
            size = stage.width, stage.height
            if size not in drawn:
                first = 100_000 * len(drawn)
                drawn[size] = denoise.prepare(autoencoder, encoder, tokenizer, *size, stage.clips, first)
            stages.append((stage, drawn[size]))
        return denoise.train(bundled.DIT, stages, denoise.text_rows(encoder, tokenizer, [""]))

    _stage(folder / "dit_t2v.safetensors", train_t2v)
    if rank() == 0:
        for name in variants.TRAININGS:
            variants.train(name, folder)


def _stage(file: Path, work: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The weights in `file`, which `work` makes where it is missing; they are kept in bfloat16."""
    if not file.exists():
        log.info("%s ...", file.name)
        made = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in work().items()}
        if rank() == 0:
            save_file(made, file)
    _wait()
    return {name: tensor.float() for name, tensor in load_file(file).items()}


def _wait() -> None:
    """For the other processes."""
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
