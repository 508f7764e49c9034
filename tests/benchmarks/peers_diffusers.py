"""Hugging Face diffusers, and the UMT5 of transformers that it uses, as a contestant."""

import re

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from transformers import UMT5Config, UMT5EncoderModel

from tests.benchmarks.peers import Job, Work, filled, training_step


def _dit(job: Job) -> WanTransformer3DModel:
    config = job.config
    with init_empty_weights():
        model = WanTransformer3DModel(
            num_attention_heads=config["dim"] // 128,
            ffn_dim=config["ffn_dim"],
            num_layers=config["num_layers"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            in_channels=config["in_channels"],
            out_channels=config["latents"]["channels"],
        )
    weights = convert_wan_transformer_to_diffusers(job.read_weights())
    return filled(model, weights, job.torch_dtype, WanTransformer3DModel._keep_in_fp32_modules)


def dit(job: Job) -> Work:
    model, given = _dit(job), job.read_inputs()
    latents, context = given["latents"].to(job.torch_dtype), given["text"].to(job.torch_dtype)
    time = given["timestep"]
    if job.config["latents"]["frame_times"]:
        # A timestep for each token, 0 for those of the first frame.
        frames, height, width = latents.shape[2:]
        time = time.repeat(frames, 1).index_fill(0, torch.tensor([0]), 0).expand(-1, height * width // 4).reshape(1, -1)
    return lambda: {"velocity": model(latents, time, context, return_dict=False)[0]}


def train(job: Job) -> Work:
    model, given = _dit(job), job.read_inputs()
    latents, context = given["latents"].to(job.torch_dtype), given["text"].to(job.torch_dtype)
    probes = {
        "blocks.0.self_attn.q.weight": "blocks.0.attn1.to_q.weight",
        "blocks.0.ffn.2.weight": "blocks.0.ffn.net.2.weight",
    }

    def forward() -> torch.Tensor:
        return model(latents, given["timestep"], context, return_dict=False)[0]

    return training_step(model, forward, given["target"], probes)


def _residual(config: dict) -> dict:
    """The arguments of the class for a VAE of Wan 2.2; none for one of 2.1."""
    if not config["shortcuts"]:
        return {}
    latents, pixels = config["latents"], 3 * config["patch"] ** 2
    return dict(
        decoder_base_dim=config["decoder_dim"], z_dim=latents["channels"], is_residual=True, in_channels=pixels,
        out_channels=pixels, patch_size=config["patch"], scale_factor_spatial=latents["stride"],
        latents_mean=latents["mean"], latents_std=latents["std"],
    )  # fmt: skip


# Published names of the Wan 2.2 VAE to those of diffusers, for which the library has no converter.
_VAE_NAMES = {
    r"downsamples\.(\d)\.downsamples\.2\.": r"down_blocks.\1.downsampler.",
    r"downsamples\.(\d)\.downsamples\.": r"down_blocks.\1.resnets.",
    r"upsamples\.(\d)\.upsamples\.3\.": r"up_blocks.\1.upsampler.",
    r"upsamples\.(\d)\.upsamples\.": r"up_blocks.\1.resnets.",
    r"middle\.0\.": "mid_block.resnets.0.", r"middle\.1\.": "mid_block.attentions.0.",
    r"middle\.2\.": "mid_block.resnets.1.",
    r"residual\.0\.": "norm1.", r"residual\.2\.": "conv1.", r"residual\.3\.": "norm2.", r"residual\.6\.": "conv2.",
    r"\.shortcut\.": ".conv_shortcut.",
    r"^(encoder|decoder)\.conv1\.": r"\1.conv_in.", r"head\.0\.": "norm_out.", r"head\.2\.": "conv_out.",
    r"^conv1\.": "quant_conv.", r"^conv2\.": "post_quant_conv.",
}  # fmt: skip


def _renamed(name: str) -> str:
    for pattern, replacement in _VAE_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _vae(job: Job) -> tuple[AutoencoderKLWan, torch.Tensor, torch.Tensor]:
    """The model, and the mean and deviation of latents."""
    with init_empty_weights():
        model = AutoencoderKLWan(base_dim=job.config["base_dim"], **_residual(job.config))
    weights = job.read_weights()
    if job.config["shortcuts"]:
        weights = {_renamed(name): tensor for name, tensor in weights.items()}
    else:
        weights = convert_wan_vae_to_diffusers(weights)
    filled(model, weights, job.torch_dtype)
    statistics = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    return model, *statistics


def decode(job: Job) -> Work:
    (model, mean, std), given = _vae(job), job.read_inputs()

    def work() -> dict[str, torch.Tensor]:
        raw = (given["latents"] * std + mean).to(job.torch_dtype)
        return {"pixels": model.decode(raw, return_dict=False)[0]}

    return work


def encode(job: Job) -> Work:
    (model, mean, std), given = _vae(job), job.read_inputs()

    def work() -> dict[str, torch.Tensor]:
        raw = model.encode(given["video"].to(job.torch_dtype), return_dict=False)[0].mode()
        return {"latents": (raw.float() - mean) / std}

    return work


# Ours to those of transformers' UMT5, inside of a block.
_TEXT_NAMES = {
    "norm1.": "layer.0.layer_norm.",
    "norm2.": "layer.1.layer_norm.",
    "attn.": "layer.0.SelfAttention.",
    "pos_embedding.embedding.": "layer.0.SelfAttention.relative_attention_bias.",
    "ffn.gate.0.": "layer.1.DenseReluDense.wi_0.",
    "ffn.fc1.": "layer.1.DenseReluDense.wi_1.",
    "ffn.fc2.": "layer.1.DenseReluDense.wo.",
}


def _text_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {
        "shared.weight": weights["token_embedding.weight"],
        "encoder.embed_tokens.weight": weights["token_embedding.weight"],
        "encoder.final_layer_norm.weight": weights["norm.weight"],
    }
    for name, tensor in weights.items():
        if name.startswith("blocks."):
            _, index, rest = name.split(".", 2)
            ours = next(prefix for prefix in _TEXT_NAMES if rest.startswith(prefix))
            renamed[f"encoder.block.{index}.{_TEXT_NAMES[ours]}{rest.removeprefix(ours)}"] = tensor
    return renamed


def text(job: Job) -> Work:
    """As the pipeline has it: padded texts, and zeros in place of what the padding became."""
    config, given = job.config, job.read_inputs()
    with init_empty_weights():
        model = UMT5EncoderModel(
            UMT5Config(
                vocab_size=config["vocab_size"],
                d_model=config["dim"],
                d_kv=config["attention_dim"] // config["num_heads"],
                d_ff=config["ffn_dim"],
                num_layers=config["num_layers"],
                num_heads=config["num_heads"],
                feed_forward_proj="gated-gelu",
            )
        )
    filled(model, _text_weights(job.read_weights()), job.torch_dtype)
    ids, mask = given["ids"], given["mask"]
    return lambda: {"embeddings": model(ids, mask).last_hidden_state * mask[..., None]}


KINDS = {"dit": dit, "train": train, "decode": decode, "encode": encode, "text": text}
