"""Names and shapes of the published Wan 2.1 checkpoints at real size, and tiny tensors of the same structures."""

import json
import zlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from wan_core.loading.tensor_files import Header, TensorInfo

Shapes = dict[str, tuple[int, ...]]
MANIFESTS = Path(__file__).resolve().parents[1] / "data" / "manifests"
HEADERS = MANIFESTS.parent / "headers"


def linear(name: str, inputs: int, outputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, inputs: int, outputs: int, *kernel: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs, *kernel), f"{name}.bias": (outputs,)}


def dit(name: str) -> Shapes:
    """A published DiT from `tests/data/headers`; a name with `*` stands for each of its repeated blocks."""
    stored = json.loads((HEADERS / f"{name}.json").read_text())
    shapes: Shapes = {}
    for key, shape in stored["tensors"].items():
        count = stored["repeated"][key.partition(".")[0]] if "*" in key else 1
        shapes |= {key.replace("*", str(i)): tuple(shape) for i in range(count)}
    return shapes


def umt5() -> Shapes:
    shapes: Shapes = {"token_embedding.weight": (256384, 4096), "norm.weight": (4096,)}
    for i in range(24):
        b = f"blocks.{i}"
        shapes |= {f"{b}.norm1.weight": (4096,), f"{b}.norm2.weight": (4096,)}
        shapes |= {f"{b}.attn.{part}.weight": (4096, 4096) for part in "qkvo"}
        shapes |= {f"{b}.pos_embedding.embedding.weight": (32, 64), f"{b}.ffn.gate.0.weight": (10240, 4096)}
        shapes |= {f"{b}.ffn.fc1.weight": (10240, 4096), f"{b}.ffn.fc2.weight": (4096, 10240)}
    return shapes


def vae_residual(name: str, inputs: int, outputs: int) -> Shapes:
    shapes: Shapes = {f"{name}.residual.0.gamma": (inputs, 1, 1, 1), f"{name}.residual.3.gamma": (outputs, 1, 1, 1)}
    shapes |= conv(f"{name}.residual.2", inputs, outputs, 3, 3, 3) | conv(
        f"{name}.residual.6", outputs, outputs, 3, 3, 3
    )
    return shapes | (conv(f"{name}.shortcut", inputs, outputs, 1, 1, 1) if inputs != outputs else {})


def vae_middle(side: str, c: int) -> Shapes:
    shapes = vae_residual(f"{side}.middle.0", c, c) | vae_residual(f"{side}.middle.2", c, c)
    shapes |= {f"{side}.middle.1.norm.gamma": (c, 1, 1)}
    return shapes | conv(f"{side}.middle.1.to_qkv", c, 3 * c, 1, 1) | conv(f"{side}.middle.1.proj", c, c, 1, 1)


def vae(base: int = 96, latent: int = 16) -> Shapes:
    a, b, c = base, 2 * base, 4 * base
    shapes = conv("encoder.conv1", 3, a, 3, 3, 3)
    for i, (inputs, outputs) in {
        0: (a, a),
        1: (a, a),
        3: (a, b),
        4: (b, b),
        6: (b, c),
        7: (c, c),
        9: (c, c),
        10: (c, c),
    }.items():
        shapes |= vae_residual(f"encoder.downsamples.{i}", inputs, outputs)
    for i, width, temporal in ((2, a, False), (5, b, True), (8, c, True)):
        shapes |= conv(f"encoder.downsamples.{i}.resample.1", width, width, 3, 3)
        shapes |= conv(f"encoder.downsamples.{i}.time_conv", width, width, 3, 1, 1) if temporal else {}
    shapes |= vae_middle("encoder", c) | {"encoder.head.0.gamma": (c, 1, 1, 1)}
    shapes |= conv("encoder.head.2", c, 2 * latent, 3, 3, 3) | conv("conv1", 2 * latent, 2 * latent, 1, 1, 1)
    shapes |= (
        conv("conv2", latent, latent, 1, 1, 1) | conv("decoder.conv1", latent, c, 3, 3, 3) | vae_middle("decoder", c)
    )
    widths = {0: (c, c), 1: (c, c), 2: (c, c), 4: (b, c), 5: (c, c), 6: (c, c), 8: (b, b), 9: (b, b), 10: (b, b)}
    for i, (inputs, outputs) in (widths | {12: (a, a), 13: (a, a), 14: (a, a)}).items():
        shapes |= vae_residual(f"decoder.upsamples.{i}", inputs, outputs)
    for i, width, temporal in ((3, c, True), (7, c, True), (11, b, False)):
        shapes |= conv(f"decoder.upsamples.{i}.resample.1", width, width // 2, 3, 3)
        shapes |= conv(f"decoder.upsamples.{i}.time_conv", width, 2 * width, 3, 1, 1) if temporal else {}
    return shapes | {"decoder.head.0.gamma": (a, 1, 1, 1)} | conv("decoder.head.2", a, 3, 3, 3, 3)


def clip_visual() -> Shapes:
    shapes: Shapes = {"visual.patch_embedding.weight": (1280, 3, 14, 14), "visual.cls_embedding": (1, 1, 1280)}
    shapes |= {"visual.pos_embedding": (1, 257, 1280), "visual.head": (1280, 1024)}
    shapes |= norm("visual.pre_norm", 1280) | norm("visual.post_norm", 1280)
    for i in range(32):
        b = f"visual.transformer.{i}"
        shapes |= norm(f"{b}.norm1", 1280) | norm(f"{b}.norm2", 1280) | linear(f"{b}.attn.to_qkv", 1280, 3840)
        shapes |= (
            linear(f"{b}.attn.proj", 1280, 1280) | linear(f"{b}.mlp.0", 1280, 5120) | linear(f"{b}.mlp.2", 5120, 1280)
        )
    return shapes


def clip() -> Shapes:
    """The whole published file: the vision tower, the logit scale and XLM-RoBERTa-large."""
    shapes = clip_visual() | {"log_scale": (), "textual.token_embedding.weight": (250002, 1024)}
    shapes |= {"textual.type_embedding.weight": (1, 1024), "textual.pos_embedding.weight": (514, 1024)}
    shapes |= norm("textual.norm", 1024) | {
        "textual.head.0.weight": (1024, 1024),
        "textual.head.2.weight": (1024, 1024),
    }
    for i in range(24):
        b = f"textual.blocks.{i}"
        shapes |= norm(f"{b}.norm1", 1024) | norm(f"{b}.norm2", 1024)
        shapes |= linear(f"{b}.ffn.0", 1024, 4096) | linear(f"{b}.ffn.2", 4096, 1024)
        for part in "qkvo":
            shapes |= linear(f"{b}.attn.{part}", 1024, 1024)
    return shapes


def motion_controller() -> Shapes:
    return linear("linear.0", 256, 1536) | linear("linear.2", 1536, 1536) | linear("linear.4", 1536, 9216)


def header(
    shapes: Mapping[str, Iterable[int]], dtype=torch.bfloat16, file="model.safetensors", **metadata: str
) -> Header:
    """A header with these names and shapes, as if read from `file`."""
    path = Path(file)
    tensors = {name: TensorInfo(tuple(shape), dtype, path) for name, shape in shapes.items()}
    return Header(MappingProxyType(tensors), (path,), MappingProxyType(metadata))


def tiny(name: str) -> dict[str, Tensor]:
    """Random float32 tensors of the tiny checkpoint `name`, drawn per key; a new dictionary of shared tensors."""
    return dict(_drawn(name))


@cache
def _drawn(name: str) -> dict[str, Tensor]:
    return draw(json.loads((MANIFESTS / f"{name}.json").read_text()))


def draw(shapes: Mapping[str, Iterable[int]]) -> dict[str, Tensor]:
    def one(key: str, shape: Iterable[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))

    return {key: one(key, shape) for key, shape in shapes.items()}


class StandIn(nn.Module):
    """A module whose state dict holds exactly the given names and shapes."""

    def __init__(self, shapes: Mapping[str, Iterable[int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            *path, leaf = name.split(".")
            owner: nn.Module = self
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner._modules[part]
            owner.register_parameter(leaf, nn.Parameter(torch.empty(tuple(shape)), requires_grad=False))
