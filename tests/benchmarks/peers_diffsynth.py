"""DiffSynth-Studio as a contestant, in an environment of its own."""

from pathlib import Path

import numpy as np
import torch
from accelerate import init_empty_weights

from tests.benchmarks.peers import Job, Work, filled, training_step

# DiffSynth-Studio imports torchvision, whose published wheels need CUDA for their operators. Nothing of Wan calls them;
# the import only asks for the two that it describes.
for _name in ("nms", "qnms"):
    if not hasattr(torch.ops.torchvision, _name):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from diffsynth.models.wan_video_dit import WanModel  # noqa: E402
from diffsynth.models.wan_video_text_encoder import HuggingfaceTokenizer, WanTextEncoder  # noqa: E402
from diffsynth.models.wan_video_vae import VideoVAE_, WanVideoVAE  # noqa: E402
from diffsynth.pipelines.wan_video import WanVideoPipeline, model_fn_wan_video  # noqa: E402


def _dit(config: dict, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> WanModel:
    with init_empty_weights():
        model = WanModel(
            dim=config["dim"],
            in_dim=16,
            ffn_dim=config["ffn_dim"],
            out_dim=16,
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            eps=1e-6,
            patch_size=(1, 2, 2),
            num_heads=config["dim"] // 128,
            num_layers=config["num_layers"],
            has_image_input=False,
        )
    return filled(model, weights, dtype)


def dit(job: Job) -> Work:
    model, given = _dit(job.config, job.read_weights(), job.torch_dtype), job.read_inputs()
    latents, timestep, context = (given[name].to(job.torch_dtype) for name in ("latents", "timestep", "text"))
    return lambda: {"velocity": model_fn_wan_video(dit=model, latents=latents, timestep=timestep, context=context)}


def train(job: Job) -> Work:
    model, given = _dit(job.config, job.read_weights(), job.torch_dtype), job.read_inputs()
    latents, timestep, context = (given[name].to(job.torch_dtype) for name in ("latents", "timestep", "text"))
    probes = {name: name for name in ("blocks.0.self_attn.q.weight", "blocks.0.ffn.2.weight")}

    def forward() -> torch.Tensor:
        return model_fn_wan_video(dit=model, latents=latents, timestep=timestep, context=context)

    return training_step(model, forward, given["target"], probes)


def _vae(config: dict, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> WanVideoVAE:
    with init_empty_weights():
        model = WanVideoVAE()
        model.model = VideoVAE_(dim=config["base_dim"])
    filled(model.model, weights, dtype)
    return model


def decode(job: Job) -> Work:
    model, given = _vae(job.config, job.read_weights(), job.torch_dtype), job.read_inputs()
    latents = given["latents"].to(job.torch_dtype)
    return lambda: {"pixels": model.decode(latents, device="cpu")}


def encode(job: Job) -> Work:
    model, given = _vae(job.config, job.read_weights(), job.torch_dtype), job.read_inputs()
    video = given["video"].to(job.torch_dtype)
    return lambda: {"latents": model.encode(video, device="cpu")}


def _text_encoder(config: dict, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> WanTextEncoder:
    with init_empty_weights():
        model = WanTextEncoder(
            vocab=config["vocab_size"],
            dim=config["dim"],
            dim_attn=config["attention_dim"],
            dim_ffn=config["ffn_dim"],
            num_heads=config["num_heads"],
            num_layers=config["num_layers"],
            num_buckets=config["num_buckets"],
        )
    return filled(model, weights, dtype)


def text(job: Job) -> Work:
    """As its pipeline has it: padded texts, and zeros in place of what the padding became."""
    model, given = _text_encoder(job.config, job.read_weights(), job.torch_dtype), job.read_inputs()
    ids, mask = given["ids"], given["mask"]
    return lambda: {"embeddings": model(ids, mask) * mask[..., None]}


def run(job: Job) -> Work:
    """Its pipeline with the bundled tiny model's weights; the frames of its call."""
    dtype, config = job.torch_dtype, job.config
    pipe = WanVideoPipeline(device="cpu", torch_dtype=dtype)
    pipe.dit = _dit(config["dit"], job.read_weights("dit."), dtype)
    pipe.vae = _vae(config["vae"], job.read_weights("vae."), dtype)
    pipe.text_encoder = _text_encoder(config["text_encoder"], job.read_weights("text_encoder."), dtype)
    folder = Path(job.weights).parent / "tokenizer"
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(config["tokenizer"], encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}', encoding="utf-8"
    )
    pipe.tokenizer = HuggingfaceTokenizer(name=str(folder), seq_len=512, clean="whitespace")

    def work() -> dict[str, torch.Tensor]:
        frames = pipe(**config["call"], progress_bar_cmd=iter)
        return {"frames": torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).float()}

    return work


KINDS = {"dit": dit, "train": train, "decode": decode, "encode": encode, "text": text, "run": run}
