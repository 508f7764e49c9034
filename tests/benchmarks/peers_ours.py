"""This pack as a contestant."""

from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

import pack
from tests.benchmarks.peers import Job, Work, filled, training_step
from tests.reference import write_drawn

pack.register()

from wan_core import ModelConfig, WanVideoPipeline  # noqa: E402
from wan_core.catalog import DIT_FILE, TEXT_ENCODER_PATTERN, TINY, VAE_PATTERN  # noqa: E402
from wan_core.models.attention import load_backend  # noqa: E402
from wan_core.models.config import GEOMETRIES, DiTConfig, TextEncoderConfig, VAEConfig  # noqa: E402
from wan_core.models.dit import WanDiT  # noqa: E402
from wan_core.models.text_encoder import UMT5Encoder  # noqa: E402
from wan_core.models.vae import WanVAE  # noqa: E402
from wan_core.types import Conditioning  # noqa: E402

AnyConfig = TypeVar("AnyConfig", DiTConfig, VAEConfig)


def _built(cls: type[torch.nn.Module], config: object, job: Job, float32: tuple[str, ...] = ()) -> torch.nn.Module:
    with torch.device("meta"):
        module = cls(config)
    return filled(module, job.read_weights(), job.torch_dtype, float32)


def _sized(cls: type[AnyConfig], job: Job) -> AnyConfig:
    sizes = dict(job.config)
    return cls(geometry=GEOMETRIES[sizes.pop("latents")["channels"]], **sizes)


def _dit(job: Job) -> WanDiT:
    return _built(WanDiT, _sized(DiTConfig, job), job, WanDiT.FLOAT32_PARAMETERS)


def dit(job: Job) -> Work:
    model, given = _dit(job), job.read_inputs()
    model.attend = load_backend("auto", torch.device("cpu"), job.torch_dtype)
    cond, latents = Conditioning(text=given["text"]), given["latents"]
    if model.config.geometry.frame_times:
        cond = cond.with_clean_frames(latents[:, :, :1], latents.shape[2])
    return lambda: {"velocity": model(latents, given["timestep"], cond)}


def train(job: Job) -> Work:
    model, given = _dit(job), job.read_inputs()
    cond = Conditioning(text=given["text"])
    probes = {name: name for name in ("blocks.0.self_attn.q.weight", "blocks.0.ffn.2.weight")}
    return training_step(model, lambda: model(given["latents"], given["timestep"], cond), given["target"], probes)


def _vae(job: Job) -> WanVAE:
    return _built(WanVAE, _sized(VAEConfig, job), job).use_channels_last()


def decode(job: Job) -> Work:
    model, given = _vae(job), job.read_inputs()
    return lambda: {"pixels": model.decode(given["latents"])}


def encode(job: Job) -> Work:
    model, given = _vae(job), job.read_inputs()
    return lambda: {"latents": model.encode(given["video"])}


def text(job: Job) -> Work:
    model, given = _built(UMT5Encoder, TextEncoderConfig(**job.config), job), job.read_inputs()
    return lambda: {"embeddings": model(given["ids"], given["mask"])}


def run(job: Job) -> Work:
    """The bundled tiny model, its files read and called as a user does; prompts are encoded in every run."""
    root = Path(job.weights).parent / "models"
    write_drawn(root, TINY)
    patterns = (DIT_FILE, TEXT_ENCODER_PATTERN, VAE_PATTERN)
    pipe = WanVideoPipeline.from_pretrained(
        torch_dtype=job.torch_dtype,
        device="cpu",
        model_configs=[ModelConfig(model_id=TINY, origin_file_pattern=pattern) for pattern in patterns],
        local_model_path=root,
        skip_download=True,
    )

    pipe.models = replace(pipe.models, text=replace(pipe.models.text, cache=None))

    def work() -> dict[str, torch.Tensor]:
        frames = pipe(**job.config["call"], progress_bar_cmd=iter)
        return {"frames": torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).float()}

    return work


KINDS = {"dit": dit, "train": train, "decode": decode, "encode": encode, "text": text, "run": run}
