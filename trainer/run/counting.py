"""One forward and backward pass of training, counted on the meta device, where tensors have no data.

A model of two and of three blocks is enough: what a block adds to the peak is the difference, and all blocks are alike.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from wan_core.models.config import Geometry
from wan_core.models.dit import TimeEmbedding
from wan_core.offload.blocks import weights_of
from wan_core.planning.estimate import META, LiveBytes
from wan_core.planning.job import InputSizes, placeholder_conditioning
from wan_core.types import Conditioning, LatentSize, tensors_in

from ..config import TrainConfig
from ..model.memory import Saving, checkpointing_of, in_host_memory
from ..model.trainable import Denoiser
from ..objective import Noising, weighted

aten = torch.ops.aten


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: bytes at its peak on the device, bytes kept in host memory, and floating-point
    operations of matrix products, convolutions and attention.
    """

    peak: int
    host: int = 0
    flops: int = 0

    def plus(self, other: "Pass", times: int) -> "Pass":
        return Pass(*(own + times * new for own, new in zip(astuple(self), astuple(other), strict=True)))


def whole_pass(
    module: Denoiser, shape: tuple[int, ...], config: TrainConfig, *, cuda: bool = True
) -> tuple[Pass, Pass]:
    """A pass of a batch of latents (z, R + F, h, w) through all blocks, beside weights and gradients: at its peak, and
    when its way back has come to the first block.

    Args:
        cuda: count RMS norms as CUDA devices run them, else as a CPU does.
    """

    def counted(blocks: int, hints: int) -> Pass:
        return counted_pass(module, shape, config, blocks, hints, cuda)

    layers, hints = len(module.dit.blocks), len(module.dit.config.vace_layers)
    blocks, vace = min(2, layers), min(1, hints)
    base = counted(blocks, vace)
    per_block = counted(blocks + 1, vace).plus(base, -1) if layers > blocks else Pass(0)
    per_hint = counted(blocks, vace + 1).plus(base, -1) if hints > vace else Pass(0)
    whole = base.plus(per_block, layers - blocks).plus(per_hint, hints - vace)
    return whole, base.plus(per_block, 1 - blocks)


def counted_pass(
    module: Denoiser, shape: tuple[int, ...], config: TrainConfig, blocks: int, vace_blocks: int, cuda: bool = True
) -> Pass:
    """A pass through the model cut to so many blocks."""
    twin = _twin(module, blocks, vace_blocks)
    host, work, inputs = _HostMemory(), _Operations(), _inputs(twin, shape, config.batch_size)
    live = LiveBytes(META, (*weights_of(twin).values(), *tensors_of(inputs)))
    with live, work, _kernels(twin, config, cuda), without_gradients(twin):
        run_pass(twin, inputs, config, host)
    return Pass(live.peak, host.bytes, work.flops)


@dataclass(frozen=True)
class Inputs:
    """What a pass is given: latents (B, z, R + F, h, w), what is drawn for them, and their conditioning."""

    latents: Tensor
    noising: Noising
    cond: Conditioning


def run_pass(module: Denoiser, inputs: Inputs, config: TrainConfig, saving: Saving = in_host_memory) -> None:
    """The forward and backward pass of the training loop; `saving` is how activations are kept in host memory."""
    bf16 = torch.autocast("cpu", torch.bfloat16, enabled=config.mixed_precision == "bf16", cache_enabled=False)
    with checkpointing_of(config, module.blocks, saving):
        with bf16:
            error = module(inputs.latents, inputs.noising, inputs.cond)
        weighted(error, inputs.noising).sum().backward()


def _twin(module: Denoiser, blocks: int, vace_blocks: int) -> Denoiser:
    """A copy of `module` on the meta device, cut to its first blocks, which trains what `module` trains."""
    dit = module.dit
    lists = {id(dit.blocks): (dit.blocks, blocks)}
    if dit.config.vace_layers:
        lists[id(dit.vace_blocks)] = (dit.vace_blocks, vace_blocks)
    left_out = {id(t) for every, count in lists.values() for block in every[count:] for t in weights_of(block).values()}
    known: dict[int, Any] = {id(module.dit2): None}  # a pass is that of one expert
    for tensor in weights_of(module).values():
        if id(tensor) not in left_out:
            twin = torch.empty_like(tensor, device=META)
            trained = tensor.requires_grad
            known[id(tensor)] = nn.Parameter(twin, trained) if isinstance(tensor, nn.Parameter) else twin
    for key, (every, count) in lists.items():
        known[key] = nn.ModuleList(copy.deepcopy(block, known) for block in every[:count])
    found = copy.deepcopy(module, known)
    found.dit.config = dataclasses.replace(dit.config, vace_layers=tuple(range(vace_blocks)))
    return found


def latent_size(shape: tuple[int, ...], geometry: Geometry) -> LatentSize:
    """The size of latents (z, R + F, h, w)."""
    _, frames, height, width = shape
    return LatentSize(frames, height, width, geometry)


def _inputs(module: Denoiser, shape: tuple[int, ...], batch: int) -> Inputs:
    """What a batch of latents (z, R + F, h, w) comes with, on the meta device."""
    config = module.dit.config
    sizes = InputSizes(vace=(0,) if config.vace_layers else (), camera=True)
    cond = placeholder_conditioning(config, latent_size(shape, config.geometry), sizes).expanded(batch)
    latents, noise, numbers = (torch.empty(batch, *rest, device=META) for rest in (shape, shape, ()))
    return Inputs(latents, Noising(noise, numbers, numbers, numbers), cond)


class _Operations(TorchDispatchMode):
    """Adds up the floating-point operations; a multiplication and an addition are two."""

    ATTENTION: ClassVar[Mapping[Any, Callable[..., int]]] = {
        aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop_count,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop_count,
    }
    """What attention is on a CPU; the registry knows that of cards alone."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in self.ATTENTION:
            count = self.ATTENTION[packet]
            number = 4 if count is sdpa_backward_flop_count else 3
            self.flops += count(*(tensor.shape for tensor in args[:number]))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


class _HostMemory:
    """In place of copies to host memory and back: what is kept there is counted, and is no more on the device."""

    def __init__(self) -> None:
        self.bytes = 0

    def __call__(self, tokens: Tensor) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> tuple[torch.Size, torch.dtype]:
        self.bytes += tensor.nbytes
        return tensor.shape, tensor.dtype

    def _unpack(self, kept: tuple[torch.Size, torch.dtype]) -> Tensor:
        return torch.empty(kept[0], dtype=kept[1], device=META)


@contextmanager
def without_gradients(module: nn.Module) -> Iterator[None]:
    """Within the block gradients of weights are dropped when they are complete: they are counted as a whole."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    handles = [p.register_post_accumulate_grad_hook(drop) for p in module.parameters() if p.requires_grad]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Kernels(TorchFunctionMode):
    """What the meta device lacks: autocast, attention in one kernel, and on CUDA devices RMS norm in one kernel."""

    MATRIX_PRODUCTS = frozenset((F.linear, F.conv2d, F.conv3d, torch.matmul, Tensor.matmul))

    def __init__(self, autocast: bool, cuda: bool) -> None:
        super().__init__()
        self._autocast, self._cuda = autocast, cuda

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._autocast and (func in self.MATRIX_PRODUCTS or func is F.scaled_dot_product_attention):
            args, kwargs = tree_map_only(Tensor, Tensor.bfloat16, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return aten._scaled_dot_product_flash_attention_for_cpu(*args)[0]
        if func is F.rms_norm and self._cuda:
            return _FusedRmsNorm.apply(args[0], kwargs["weight"])
        return func(*args, **kwargs)


class _FusedRmsNorm(torch.autograd.Function):
    """The memory of `aten::_fused_rms_norm`: it keeps its inputs and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


@contextmanager
def _kernels(module: Denoiser, config: TrainConfig, cuda: bool) -> Iterator[None]:
    """Within the block of this statement `module` computes with these kernels."""
    kernels = partial(_Kernels, config.mixed_precision == "bf16", cuda)

    def within(forward: Callable[..., Any], *args: Any) -> Any:
        with kernels():
            return forward(*args)

    for block in module.blocks:
        # The backward pass runs blocks again without the modes that it was called in.
        block.forward = partial(within, block.forward)
    embed_time = module.dit.embed_time

    def embed_time_in_float32(timesteps: Tensor) -> TimeEmbedding:
        with torch._C.DisableTorchFunction():  # as it turns autocast off, which the meta device does not have
            return embed_time(timesteps)

    module.dit.embed_time = embed_time_in_float32  # type: ignore[method-assign]  # of a copy
    with kernels():
        yield


def tensors_of(inputs: Inputs) -> list[Tensor]:
    return [inputs.latents, inputs.noising.noise, inputs.noising.sigmas, *tensors_in(inputs.cond)]
