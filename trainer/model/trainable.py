"""What of a model is trained: whole modules, a LoRA, or both; and the model as one module that a step can call."""

import dataclasses
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan_core.conditioning.text import TextEncoder, clean_prompt
from wan_core.loading.pairs import EXPERTS, Side, expert_files
from wan_core.lora.patches import LowRank
from wan_core.lora.target import Target, bind_to, open_lora
from wan_core.model import VideoModel
from wan_core.models.config import TEXT_TOKENS
from wan_core.models.dit import WanDiT, check_shapes, timesteps_of, vace_strengths
from wan_core.models.layers import MotionController
from wan_core.models.vae import WanVAE
from wan_core.offload.quant import QuantisedLinear
from wan_core.sampling.predictor import motion_offset
from wan_core.types import Conditioning

from ..config import TrainConfig
from ..objective import Noising, errors, noisy

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

# It is imported where a LoRA is made: it brings transformers, which takes longer than PyTorch. That it is there is
# asked at once.
if find_spec("peft") is None:
    raise ModuleNotFoundError("No module named 'peft'", name="peft")

log = logging.getLogger("wancore")

ADAPTER = "default"
"""The name that PEFT gives to the one adapter of a model."""

VACE = "vace_"
"""How the names of the VACE branch begin; the reference counts it as a model of its own."""

UNREACHED = re.compile(r"time_embedding\.|time_projection\.")
"""Layers whose weights the model reads without calling them, so that a LoRA on them would do nothing."""

NO_DECAY = re.compile(r"(.*[._])?(bias|modulation|emb_pos|gamma)")
"""Parameters that weight decay leaves alone, besides all vectors."""


class Denoiser(nn.Module):
    """Everything that a training step runs, as one module: the DiT, and what else of the model is trained with it.

    `dit2` is the expert for low noise where both of a pair are trained; `dit` is then that for high noise.
    `text_encoder` and `vae` are None unless they are trained; else their outputs are in the batch already.
    """

    def __init__(
        self,
        dits: Sequence[WanDiT],
        motion_controller: MotionController | None = None,
        text_encoder: TextEncoder | None = None,
        vae: WanVAE | None = None,
    ) -> None:
        super().__init__()
        self.dit, self.dit2 = dits[0], dits[1] if len(dits) > 1 else None
        self.motion_controller = motion_controller
        self.text_encoder = None if text_encoder is None else text_encoder.model
        self.vae = vae
        self._tokenizer = None if text_encoder is None else text_encoder.tokenizer

    def forward(
        self,
        latents: Tensor,
        noising: Noising,
        cond: Conditioning,
        captions: Sequence[str] = (),
        pixels: Tensor | None = None,
        expert: int = 0,
    ) -> Tensor:
        """The error of each sample (B,) in float32, without its weight: how far the velocity at the drawn noise level
        is from the one that leads from the clean latents (B, z, R + F, h, w) to the noise. Frames that `cond` gives as
        clean enter so, and do not count (DiffSynth-Studio `FlowMatchSFTLoss`).

        Args:
            captions: of each sample; read where the text encoder is trained.
            pixels: (B, 3, T, H, W), encoded again to the last F latent frames where the VAE is trained.
            expert: the number of the transformer that computes it.

        Raises:
            ValueError: a tensor does not fit the model.
        """
        if self.vae is not None and pixels is not None:
            video = self.vae.encode(pixels)
            latents = torch.cat((latents[:, :, : latents.shape[2] - video.shape[2]], video), 2)
        x, places = noisy(latents, noising), cond.clean_places
        if cond.clean is not None:
            # Models with clean frames have no reference frames in front of the video's.
            x[:, :, places] = cond.clean[:, :, places].to(x.dtype)
        velocity = self.velocity(x, noising.timesteps.to(latents.device), cond, captions, expert)
        return errors(velocity, latents, noising, places)

    def velocity(
        self, x: Tensor, timesteps: Tensor, cond: Conditioning, captions: Sequence[str] = (), expert: int = 0
    ) -> Tensor:
        """Velocity (B, z, R + F, h, w) in float32 for noisy latents `x` at `timesteps` (B,) in 0..1000, or at the
        fractions of them that `cond` has for each frame.
        """
        dit = self.experts[expert]
        if self.text_encoder is not None and captions:
            cond = dataclasses.replace(cond, text=self.embed_text(captions))
        check_shapes(dit.config, x, cond)
        frames, height, width = x.shape[2:]
        prepared = dit.prepare(cond, (frames, height, width), motion_offset(self.motion_controller, cond))
        state = dit.embed(x, dit.embed_time(timesteps_of(cond, timesteps)), prepared, vace_strengths(cond))
        if torch.is_grad_enabled() and not state.tokens.requires_grad:
            # Blocks overwrite tokens that need no gradient; those of the first block are needed to run it again.
            state.tokens.requires_grad_()
        dit.run_blocks([state])
        return dit.unembed(state)

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """Embeddings (B, 512, text_dim) of `captions`, with gradients."""
        assert self._tokenizer is not None and self.text_encoder is not None, "the text encoder is trained"
        ids, mask = self._tokenizer([clean_prompt(caption) for caption in captions], TEXT_TOKENS)
        embeddings = self.text_encoder(ids, mask)
        return F.pad(embeddings, (0, 0, 0, TEXT_TOKENS - embeddings.shape[1]))

    @property
    def experts(self) -> tuple[WanDiT, ...]:
        """The transformers, that for high noise first."""
        return (self.dit,) if self.dit2 is None else (self.dit, self.dit2)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of all transformers, which gradient checkpointing is put around."""
        return [block for dit in self.experts for block in (*dit.blocks, *getattr(dit, "vace_blocks", ()))]


@dataclass(frozen=True, eq=False)
class Trainable:
    """Weights that are trained and saved together.

    Attributes:
        name: of the model, as `--trainable_models` and `--lora_base_model` call it.
        owner: the module of `Denoiser` that holds it.
        names: original names of its parameters; for a LoRA, of the layers that it is on.
        is_lora: whether it is a LoRA.
        expert: of a pair, the expert that it belongs to; None for other models, and for what both share.
    """

    name: str
    owner: str
    names: tuple[str, ...]
    is_lora: bool
    expert: Side | None = None

    def parameter_names(self) -> list[str]:
        """The names of its parameters in `Denoiser`."""
        if not self.is_lora:
            return [f"{self.owner}.{name}" for name in self.names]
        return [f"{self.owner}.{n}.lora_{side}.{ADAPTER}.weight" for n in self.names for side in "AB"]


@dataclass(frozen=True, eq=False)
class Trainables:
    """A model ready to be trained.

    Attributes:
        module: what a step calls; only what is trained in it has `requires_grad`.
        parts: what is trained, in the order in which it is saved.
        model: the model as the sampler takes it, with the same weights.
    """

    module: Denoiser
    parts: tuple[Trainable, ...]
    model: VideoModel

    def parameters(self) -> dict[str, nn.Parameter]:
        """Every trained parameter by its name in `module`."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def groups(self, weight_decay: float) -> list[dict[str, object]]:
        """The optimizer's parameter groups: matrices with weight decay, vectors and modulations without."""
        sides: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, parameter in self.parameters().items():
            sides[parameter.ndim > 1 and not NO_DECAY.fullmatch(name)].append(parameter)
        return [
            {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
            for decays, parameters in sides.items()
            if parameters
        ]


def prepare(
    model: VideoModel,
    config: TrainConfig,
    text_encoder: TextEncoder | None = None,
    vae: WanVAE | None = None,
) -> Trainables:
    """`model` with what `config` trains in float32 and with gradients, all else frozen as it is.

    Args:
        text_encoder, vae: those of the model; needed only where they are trained.

    Raises:
        ValueError: nothing is to be trained, a model that is to be trained is not there, no layer has the names that
            the LoRA asks for, or the LoRA to start from does not fit.
    """
    check(config)
    wanted = {*config.trainable_models, config.lora_base_model}
    dits = [model.expert_dit(number) for number in range(len(model.experts))]
    module = Denoiser(
        dits,
        model.motion_controller,
        text_encoder if "text_encoder" in wanted else None,
        vae if "vae" in wanted else None,
    )
    module.requires_grad_(False)
    parts = [part for name in config.trainable_models for part in _whole(module, name, model.name)]
    if config.lora_base_model:
        parts += _inject(module, config.lora_base_model, config, model.name)
    for part in parts:
        for name in part.parameter_names():
            parameter = module.get_parameter(name)
            parameter.data = parameter.data.float()
            parameter.requires_grad_()
    return Trainables(module, tuple(parts), model)


def check(config: TrainConfig) -> None:
    """Raise ValueError when `config` trains nothing, or one model in two ways, or asks for what is not there."""
    if not config.trainable_models and not config.lora_base_model:
        raise ValueError("Nothing is to be trained: set --trainable_models, --lora_base_model, or both.")
    if config.lora_base_model in config.trainable_models:
        raise ValueError(
            f"{config.lora_base_model} is in --trainable_models and is --lora_base_model: train its weights or a LoRA "
            "on them, not both."
        )
    whole = {"dit", "vace"} & set(config.trainable_models)
    frozen = "--fp8_base" if config.fp8_base else "--stream_base" if config.streams else None
    if frozen and whole:
        raise ValueError(
            f"{frozen} is for frozen weights, but those of {min(whole)} are trained; train a LoRA instead."
        )
    if config.streams and not config.use_gradient_checkpointing:
        raise ValueError("--stream_base needs gradient checkpointing: a block that is gone has to run again.")


def _modules_of(module: Denoiser, name: str, label: str) -> list[tuple[str, nn.Module, Side | None]]:
    """The modules of `Denoiser` that hold the model `name`, with their attributes; of a pair two, with their expert."""
    if name == "vace" and not module.dit.config.vace_layers:
        raise ValueError(f"vace is to be trained, but {label} has no VACE branch; load a VACE model.")
    if name in ("dit", "vace"):
        sides = EXPERTS if module.dit2 is not None else (None,)
        return list(zip(("dit", "dit2"), module.experts, sides, strict=False))
    found = getattr(module, name)
    if found is None:
        raise ValueError(f"{name} is to be trained, but none was loaded; add its file to the models.")
    return [(name, found, None)]


def _belongs(name: str, part: str) -> bool:
    """Whether the parameter or layer `name` of a DiT is of `part`."""
    return part not in ("dit", "vace") or name.startswith(VACE) == (part == "vace")


def _whole(module: Denoiser, name: str, label: str) -> list[Trainable]:
    return [
        Trainable(name, owner, tuple(n for n, _ in found.named_parameters() if _belongs(n, name)), False, expert)
        for owner, found, expert in _modules_of(module, name, label)
    ]


def _inject(module: Denoiser, name: str, config: TrainConfig, label: str) -> list[Trainable]:
    """Put the LoRA that `config` describes on the layers of the model `name` that it names: of a pair on those of each
    expert, or one LoRA on those of both.
    """
    found = _modules_of(module, name, label)
    layers = tuple(_target_layers(found[0][1], name, config.lora_target_modules))
    for number, (_, base, _) in enumerate(found):
        _inject_one(base, layers, config)
        if config.lora_checkpoint:
            _start_from(base, layers, expert_files(config.lora_checkpoint, len(found))[number], config.lora_rank)
    if config.expert_loras == "shared" and len(found) > 1:
        (owner, first, _), (_, second, _) = found
        for layer in layers:
            own, other = _lora_layer(first, layer), _lora_layer(second, layer)
            other.lora_A[ADAPTER], other.lora_B[ADAPTER] = own.lora_A[ADAPTER], own.lora_B[ADAPTER]
        return [Trainable(name, owner, layers, is_lora=True)]
    return [Trainable(name, owner, layers, True, expert) for owner, _, expert in found]


def _inject_one(base: nn.Module, layers: Sequence[str], config: TrainConfig) -> None:
    """Put a LoRA on `layers` of `base`."""
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or config.lora_rank,  # type: ignore[arg-type]  # PEFT divides any number
        lora_dropout=config.lora_dropout,
        target_modules="|".join(map(re.escape, layers)),
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        inject_adapter_in_model(settings, base)
        _start_in_float32(base, layers, config.seed)
    for layer in layers:
        # Matrix products run in the dtype of the layer's input, by autocast; a float32 copy of it would only cost.
        _lora_layer(base, layer).cast_input_dtype_enabled = config.mixed_precision == "no"


def _lora_layer(base: nn.Module, name: str) -> "LoraLayer":
    from peft.tuners.lora import LoraLayer

    layer = base.get_submodule(name)
    assert isinstance(layer, LoraLayer)
    return layer


def _start_in_float32(base: nn.Module, layers: Sequence[str], seed: int) -> None:
    """Draw factors again where layers are quantised: PEFT gives factors the dtype of their layer, too coarse a one."""
    coarse = {layer for layer in layers if isinstance(_lora_layer(base, layer).get_base_layer(), QuantisedLinear)}
    torch.manual_seed(seed)
    for layer in (_lora_layer(base, name) for name, _ in base.named_modules() if name in coarse):
        layer.lora_A[ADAPTER].float(), layer.lora_B[ADAPTER].float()
        layer.reset_lora_parameters(ADAPTER, True)


def _target_layers(base: nn.Module, part: str, targets: Sequence[str]) -> list[str]:
    """The linear layers of `base` whose name is or ends with one of `targets`."""
    named = {n: m for n, m in base.named_modules() if n and _belongs(n, part)}
    found = {target: [n for n in named if n == target or n.endswith(f".{target}")] for target in targets}
    linear = sorted({n.rpartition(".")[2] if not n[-1].isdigit() else ".".join(n.split(".")[-2:])
                     for n, m in named.items() if isinstance(m, nn.Linear) and not UNREACHED.match(n)})  # fmt: skip
    for target, names in found.items():
        if not names:
            raise ValueError(f"--lora_target_modules: no layer of {part} is called {target!r}; it has {linear}.")
        wrong = [n for n in names if not isinstance(named[n], nn.Linear) or UNREACHED.match(n)]
        if wrong:
            raise ValueError(
                f"--lora_target_modules: {target!r} means {wrong[0]}, which cannot carry a LoRA; choose of {linear}."
            )
    return list(dict.fromkeys(n for names in found.values() for n in names))


def _start_from(base: nn.Module, layers: Sequence[str], file: Path, rank: int) -> None:
    """Give the injected LoRA the factors of `--lora_checkpoint`; layers that it lacks keep their start."""
    lora = open_lora(file)
    shapes = {f"{n}.weight": tuple(_lora_layer(base, n).weight.shape) for n in layers}
    bound = bind_to(lora, Target("the layers of this LoRA", shapes))
    if bound.skipped:
        raise ValueError(
            f"{lora.name} has factors that this LoRA has no place for, such as {bound.skipped[0].name} "
            f"({bound.skipped[0].reason}); give the --lora_target_modules that it was trained with."
        )
    for name, patch in bound.patches:
        layer = _lora_layer(base, name.removesuffix(".weight"))
        if not isinstance(patch, LowRank) or patch.rank != rank:
            raise ValueError(
                f"{lora.name} has a {patch.label} of rank {patch.rank} at {name}; set --lora_rank to the rank of a "
                f"plain LoRA (it is {rank})."
            )
        down, up = patch.factors()
        layer.lora_A[ADAPTER].get_parameter("weight").data.copy_(down)
        layer.lora_B[ADAPTER].get_parameter("weight").data.copy_(up / layer.scaling[ADAPTER])
    log.info("Starting from %s: factors of %d layers.", lora.name, len(bound.patches))


def lora_patches(part: Trainable, tensors: Mapping[str, Tensor], alpha: float) -> Iterator[tuple[str, LowRank]]:
    """The patches of a LoRA part under original parameter names, from the tensors of `Denoiser` by name."""
    for layer in part.names:
        down, up = (tensors[f"{part.owner}.{layer}.lora_{side}.{ADAPTER}.weight"] for side in "AB")
        yield f"{layer}.weight", LowRank(down, up, alpha / down.shape[0])
