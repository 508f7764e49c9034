"""A sampling run between two steps: everything that the rest of it depends on, as a value that can be kept."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..settings import SamplerSettings
from ..types import Conditioning, LatentSize, VideoSize, map_tensors

WEIGHT_SAMPLE = 64
"""At least so many values of each weight, evenly spread, tell one model from another; reading all would take as long
as loading it."""


class HasMemory(Protocol):
    """A part of a run that remembers tensors from step to step."""

    memory: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A run after `step` steps of its schedule.

    Attributes:
        latents: normalised, (B, 16, R + F, h, w) in float32 on the CPU, reference frames in front.
        prefix: R.
        memory: what solver and cache remember, by "solver.<name>" and "cache.<name>".
        run: digest of everything that decides the result; a run with another digest cannot go on from here exactly.
        schedule: digest of solver and noise levels; with these alone the same, the solver can still go on.
        done: latents of finished clips, where the video is made in several.
        clip: number of the clip that `step` counts in.
        kernels: those that the run computed with, see `models.kernels.Choices`; with others it would not go on exactly.
    """

    latents: Tensor
    prefix: int
    step: int
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    run: str = ""
    schedule: str = ""
    done: Tensor | None = None
    clip: int = 0
    kernels: Mapping[str, str] = field(default_factory=dict)

    @property
    def video(self) -> Tensor:
        """The latents without reference frames."""
        return self.latents[:, :, self.prefix :]


def memory_of(parts: Mapping[str, HasMemory]) -> dict[str, Tensor]:
    """A copy on the CPU of what the parts of a run remember."""
    return {f"{name}.{key}": value.cpu() for name, part in parts.items() for key, value in part.memory.items()}


def restore(parts: Mapping[str, HasMemory], memory: Mapping[str, Tensor], device: torch.device) -> None:
    """Give each part back what `memory_of` took from it; numbers stay on the CPU, as the caches keep them."""
    for name, part in parts.items():
        own = {key.split(".", 1)[1]: value for key, value in memory.items() if key.startswith(f"{name}.")}
        part.memory = {key: value.to(device) if value.ndim else value for key, value in own.items()}


def digest_run(dit: nn.Module, cond: Conditioning, size: LatentSize, settings: SamplerSettings, *others: Any) -> str:
    """A digest of everything that decides a run's result: weights, conditioning, size, settings and `others`.

    Which steps are run now does not count, nor where a cache rests or what is kept. Of each weight and buffer a sample
    is read: training and conversion change nearly every value and are seen, a change to a few by hand may not be.
    """
    cache = settings.cache and dataclasses.replace(settings.cache, residual_on_cpu=False)
    settings = dataclasses.replace(settings, start_step=0, end_step=None, cache=cache, keep_projections=False)
    return digest(*_samples(dit), cond, size, settings, *others)


def digest_weights(module: nn.Module) -> str:
    """A digest of the weights of `module`, of each of which a sample is read."""
    return digest(*_samples(module))


def _samples(module: nn.Module) -> tuple[Any, Any]:
    weights = module.state_dict()
    names = tuple((name, tuple(weight.shape), str(weight.dtype)) for name, weight in weights.items())
    return names, tuple(_sample(weight).float().cpu() for weight in weights.values())


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().flatten()
    return flat[:: max(1, flat.numel() // WEIGHT_SAMPLE)]


def manifest(
    settings: SamplerSettings, size: VideoSize, latents: Tensor, kernels: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What made these normalised latents, and their digest, as values that JSON can hold."""
    return {
        "settings": json.loads(json.dumps(dataclasses.asdict(settings))),
        "size": dataclasses.asdict(size),
        "kernels": dict(kernels or {}),
        "latents": {"shape": list(latents.shape), "sha256": digest(latents.float())},
    }


def digest(*values: Any) -> str:
    """SHA-256 of values, as hexadecimal digits: tensors by dtype, shape and bytes, wherever in them they stand."""
    total = hashlib.sha256()

    def marked(tensor: Tensor) -> str:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return f"{tensor.dtype} {tuple(tensor.shape)}"

    for value in values:
        total.update(repr(map_tensors(value, marked)).encode())
    return total.hexdigest()
