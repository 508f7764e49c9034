"""Train a bundled VAE on the drawn world."""

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from wan_core.models.config import VAEConfig
from wan_core.models.vae import WanVAE
from wan_core.models.vae_blocks import CausalConv3d, FeatureCache, ResidualBlock, SpatialAttention
from wan_core.runtime import log
from wancore.trainer.data.judge import psnr
from wancore.trainer.data.synthetic import CAMERAS, Scene

from .muon import Both, rank

CLIPS = 512
"""How many clips are drawn; crops, flips and exchanged colours make many more of them."""
WIDTH, HEIGHT, NUM_FRAMES = 96, 64, 17
CROP = 48
LR = 2e-3


def training_scene(number: int, dotted: float = 0.0) -> Scene:
    """Any scene but those that are kept to test with: a tenth with a camera that moves, a share of `dotted` with a
    dot.
    """
    r = np.random.default_rng([5, number])
    while True:
        seed = int(r.integers(2**31))
        changes: dict[str, object] = {"dotted": bool(r.random() < dotted)}
        if r.random() < 0.1:
            changes["camera"] = list(CAMERAS)[r.integers(len(CAMERAS))]
            if r.random() < 0.6:
                changes["motion"] = "still"
        scene = Scene.random(seed, **changes)
        if not scene.is_held_out:
            return scene


def pixels_of(clips: list[np.ndarray]) -> Tensor:
    """uint8 clips (T, H, W, 3) as (B, 3, T, H, W) in [-1, 1], channels-last."""
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last_3d)


def encode(vae: WanVAE, pixels: Tensor) -> Tensor:
    """Raw latents, before mean and standard deviation, with gradients: the first frame, then all others at once."""
    cache = FeatureCache()
    moments = [vae.conv1(vae.encoder(part, cache), cache) for part in _parts(pixels)]
    return torch.cat(moments, 2)[:, : vae.config.latent_channels]


def decode(vae: WanVAE, latents: Tensor) -> Tensor:
    """Pixels of raw latents, with gradients, not clamped."""
    cache = FeatureCache()
    return torch.cat([vae.decoder(vae.conv2(part, cache), cache) for part in _parts(latents)], 2)


def _parts(x: Tensor) -> Iterator[Tensor]:
    yield x[:, :, :1]
    if x.shape[2] > 1:
        yield x[:, :, 1:]


@torch.no_grad()
def initialise(vae: WanVAE) -> None:
    """Weights that keep the size of a signal, without biases; at first each frame stands for itself.

    With PyTorch's own initialisation the biases hide the picture from the decoder for thousands of steps.
    """
    for name, module in vae.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            assert module.bias is not None
            module.bias.zero_()
            if name.endswith("time_conv"):
                _copy_in_time(module.weight)
            elif isinstance(module, CausalConv3d) and module.kernel_size[0] == 3:
                module.weight.zero_()
                nn.init.normal_(module.weight[:, :, -1], std=(9 * module.in_channels) ** -0.5)
            else:
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    for module in vae.modules():
        if isinstance(module, ResidualBlock):
            module.residual[6].weight.mul_(0.2)
        elif isinstance(module, SpatialAttention):
            module.proj.weight.zero_()
    vae.decoder.head[2].weight.mul_(0.3)
    for conv in (vae.conv1, vae.conv2):
        conv.weight.zero_()
        conv.weight[:, :, 0, 0, 0] = torch.eye(len(conv.weight))
    vae.use_channels_last()


def _copy_in_time(weight: Tensor) -> None:
    """A time convolution that halves by the mean of two frames, or doubles by giving a frame twice."""
    weight.zero_()
    outputs, inputs = weight.shape[:2]
    identity = torch.eye(inputs)
    if outputs == inputs:
        weight[:, :, 1, 0, 0] = weight[:, :, 2, 0, 0] = 0.5 * identity
    else:
        weight[:inputs, :, 2, 0, 0] = weight[inputs:, :, 2, 0, 0] = identity


def train(config: VAEConfig, steps: int, seed: int = 0) -> Mapping[str, Tensor]:
    """The weights of a VAE of that configuration after so many steps."""
    torch.manual_seed(seed)
    r = np.random.default_rng([seed, rank()])
    clips = [training_scene(number, dotted=0.1).drawn(WIDTH, HEIGHT, NUM_FRAMES).video for number in range(CLIPS)]
    test = [Scene.random(2**31 + i).drawn(WIDTH, HEIGHT, NUM_FRAMES).video for i in range(8)]
    vae = WanVAE(config)
    initialise(vae)
    optimizer = Both(vae, LR)
    torch.manual_seed(seed + rank())
    for step in range(1, steps + 1):
        share = step / steps
        pixels = pixels_of(list(_batch(clips, r, still=share < 0.1)))
        latents = encode(vae, pixels)
        rows = latents.transpose(0, 1).flatten(1)
        spread = (rows.var(1) - 1).square().mean() + rows.mean(1).square().mean()
        # A little noise, so that near latents mean near pictures: a denoiser is never exact.
        error = decode(vae, latents + 0.05 * torch.randn_like(latents)) - pixels
        loss = error.abs().mean() + 0.5 * _edges(error) + 2 * error.square().mean() + 0.01 * spread
        optimizer.step(loss, share)
        if step % 200 == 0 and rank() == 0:
            log.info("VAE: step %d, loss %.4f, %.2f dB", step, loss.item(), quality(vae, optimizer, test))
    weights = dict(optimizer.averaged(vae))
    vae.load_state_dict(weights)
    return _with_unit_latents(vae, weights, clips[:128])


def _batch(clips: list[np.ndarray], r: np.random.Generator, still: bool) -> Iterator[np.ndarray]:
    """Crops of clips, mirrored and with exchanged colours: 16 pictures while `still`, else 4 clips of 5 frames."""
    count, frames = (16, 1) if still else (4, 5)
    for index in r.integers(len(clips), size=count):
        y, x, t = (
            int(r.integers(0, size - part + 1)) for size, part in ((HEIGHT, CROP), (WIDTH, CROP), (NUM_FRAMES, frames))
        )
        clip = clips[index][t : t + frames, y : y + CROP, x : x + CROP]
        for axis in (0, 1, 2):
            if r.random() < 0.5:
                clip = np.flip(clip, axis)
        yield np.ascontiguousarray(clip)


def _edges(error: Tensor) -> Tensor:
    """The error of differences between neighbouring pixels."""
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def quality(vae: WanVAE, optimizer: Both, test: list[np.ndarray]) -> float:
    """The mean PSNR, in dB, of clips that no training has seen, with the averaged weights."""
    twin = WanVAE(vae.config)
    twin.load_state_dict(optimizer.averaged(vae))
    pixels = pixels_of(test)
    back = decode(twin, encode(twin, pixels)).clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return float(np.mean([psnr(a.permute(1, 2, 3, 0).numpy(), b) for a, b in zip(back, test, strict=True)]))


@torch.no_grad()
def _with_unit_latents(vae: WanVAE, weights: dict[str, Tensor], clips: list[np.ndarray]) -> Mapping[str, Tensor]:
    """The weights, with latents whose mean and standard deviation are those that the published VAE's are.

    The last convolution of the encoder and the first of the decoder have 1 x 1 x 1 kernels, which take any change of
    scale and offset per channel exactly.
    """
    latents = torch.cat([encode(vae, pixels_of(clips[i : i + 16])) for i in range(0, len(clips), 16)])
    rows = latents.transpose(0, 1).flatten(1).double()
    own_mean, own_std = rows.mean(1), rows.std(1)
    geometry = vae.config.geometry
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in (geometry.mean, geometry.std))
    count = vae.config.latent_channels
    gain = std / own_std
    encoder, offset = weights["conv1.weight"].double(), weights["conv1.bias"].double()
    encoder[:count] *= gain.view(-1, 1, 1, 1, 1)
    offset[:count] = (offset[:count] - own_mean) * gain + mean
    decoder = weights["conv2.weight"].double()
    decoder_offset = weights["conv2.bias"].double() + decoder[:, :, 0, 0, 0] @ (own_mean - mean / gain)
    return {
        **weights,
        "conv1.weight": encoder.float(),
        "conv1.bias": offset.float(),
        "conv2.weight": (decoder / gain.view(1, -1, 1, 1, 1)).float(),
        "conv2.bias": decoder_offset.float(),
    }
