"""LoRAs on a model for the length of one run: folded into weights, beside linear layers, or per block as it runs.

After the run the model holds the same tensors as before it.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..offload.formats import PLAIN
from ..offload.quant import QuantisedLinear, weight_of
from ..offload.weights import Change, WeightProvider
from ..types import Curve
from .bind import EVERYWHERE, BlockStrengths, Bound
from .patches import Decomposed, LowRank, Patch, Replacement

LoraMode = Literal["auto", "fold", "side"]
LORA_MODES: tuple[LoraMode, ...] = ("auto", "fold", "side")


@dataclass(frozen=True, eq=False, kw_only=True)
class LoraUse:
    """A LoRA as it is to be applied to one model.

    Attributes:
        bound: its patches by parameter.
        strength: the factor on all of them, a number or a curve over the steps of the run.
        blocks: factors by block on top of it.
        mode: `fold` changes weights for the run, `side` computes beside them, `auto` folds where that costs nothing:
            plain weights that are kept on the device that computes, at constant strength.
    """

    bound: Bound
    strength: Curve = Curve((1.0,))
    blocks: BlockStrengths = EVERYWHERE
    mode: LoraMode = "auto"

    @property
    def fingerprint(self) -> str:
        """Everything that determines what this does to a model, as text; for digests of runs."""
        return f"{self.bound.lora.digest} {self.strength} {self.blocks}"

    @property
    def constant(self) -> bool:
        """Whether the strength is the same in every step."""
        curve = self.strength
        whole = (curve.start, curve.end) == (0, 1) or curve.outside == curve.values[0]
        return whole and len(set(curve.values)) == 1


@dataclass(frozen=True)
class ModelBlocks:
    """How a model's code uses its parameters, by name.

    Attributes:
        block: the path of the block that calls the module of a parameter, None for parameters outside of blocks.
        once: whether a parameter is only read before the first step.
    """

    block: Callable[[str], str | None]
    once: Callable[[str], bool]


@dataclass(eq=False)
class _ScaledPatch:
    """One patch of one parameter, with its strength at the current step."""

    patch: Patch
    use: LoraUse
    factor: float
    strength: float = 0.0

    def set_step(self, index: int, total: int) -> None:
        self.strength = self.factor * self.use.strength.at(index, total)

    def set_mean(self, total: int) -> None:
        self.strength = self.factor * sum(self.use.strength.at(i, total) for i in range(total)) / total


@dataclass(eq=False)
class _PatchedWeight:
    """A parameter with the module and the provider that own it, and all patches that change it."""

    name: str
    provider: WeightProvider
    owner: nn.Module
    leaf: str
    parts: list[_ScaledPatch]

    @property
    def tensor(self) -> Tensor:
        return getattr(self.owner, self.leaf)

    @property
    def is_linear_weight(self) -> bool:
        return self.leaf == "weight" and self.tensor.ndim == 2 and not isinstance(self.owner, nn.Embedding)

    @property
    def is_plain(self) -> bool:
        """Whether a change can be folded in. Folded into a quantised weight it would be rounded a second time."""
        return not isinstance(self.owner, QuantisedLinear) and self.tensor.dtype in PLAIN.dtypes

    @property
    def held(self) -> str:
        """How the weight is held, in words."""
        return self.owner.words if isinstance(self.owner, QuantisedLinear) else str(self.tensor.dtype)

    def change(self, device: torch.device | None = None) -> Change:
        """The change of the weight by all patches at their current strength, computed on `device`; where the weight is
        if None.
        """
        return lambda base: fold_patches(base, [(p.patch, p.strength) for p in self.parts], device or base.device)


def fold_patches(base: Tensor, changes: Sequence[tuple[Patch, float]], device: torch.device) -> Tensor:
    """`base` with each patch at its strength, in its dtype on its device, computed on `device` in float32."""
    # Every difference is taken from the base itself, so that the order of stacked LoRAs does not matter.
    active = [(patch, strength) for patch, strength in changes if strength]
    if len(active) == 1 and isinstance(active[0][0], Replacement) and active[0][1] == 1:
        return active[0][0].value.to(base.device, base.dtype).reshape(base.shape)
    if not active:
        return base
    start = base.to(device, torch.float32)
    total = start.clone()
    for patch, strength in active:
        total.add_(patch.to(device, torch.float32).delta(start).reshape(base.shape), alpha=strength)
    return total.to(base.device, base.dtype)


class LoraRun:
    """The LoRAs of one run, at the strengths of step 0 until `step` is called."""

    def __init__(self, steps: int, device: torch.device | None) -> None:
        self.steps = steps
        self.device = device
        self.stepwise: list[_ScaledPatch] = []
        self.refolded: list[Callable[[], None]] = []

    def step(self, index: int) -> None:
        """Set every strength to its value at step `index`."""
        for part in self.stepwise:
            part.set_step(index, self.steps)
        for fold in self.refolded:
            fold()

    def before_step(self, index: int, total: int) -> None:
        """`step`, if any strength changes over the steps."""
        if not all(part.use.constant for part in self.stepwise):
            self.step(index)


@contextmanager
def apply_loras(
    modules: Sequence[nn.Module],
    uses: Sequence[LoraUse],
    code: ModelBlocks,
    *,
    steps: int = 1,
    device: torch.device | None = None,
    streamed: bool = False,
) -> Iterator[LoraRun]:
    """`modules` with `uses` applied inside the block, and bit for bit as they were after it.

    Enter it before weights are moved to the device, so that folded weights move with the others. LoRA factors beside
    layers go where the activations are and are dropped at the end. Weights are changed by their owner
    (`offload.weights`) alone.

    Args:
        modules: the parts of one model; their parameter names do not collide.
        steps: the length of the run, for strengths that follow a curve. A parameter that is only read before the first
            step gets the mean of the curve.
        device: where the run computes; None is where each weight is kept.
        streamed: weights of blocks arrive when their turn comes, so that nothing can be folded into them before.

    Raises:
        ValueError: `mode="fold"` was asked of a LoRA that cannot be folded; nothing is changed then.
    """
    run = LoraRun(steps, device)
    weights = _patched_weights(modules, uses)
    ways = [(weight, _way(weight, code, device, streamed)) for weight in weights]
    with ExitStack() as stack:
        while_running: dict[str, list[_PatchedWeight]] = defaultdict(list)
        for weight, way in ways:
            once = code.once(weight.name)
            for part in weight.parts:
                part.set_mean(steps) if once else part.set_step(0, steps)
            run.stepwise += [] if once else weight.parts
            if way == "side":
                stack.callback(weight.owner.register_forward_hook(_branch_hook(weight)).remove)
            elif way == "block":
                block = code.block(weight.name)
                assert block is not None, "outside of blocks every change is folded"
                while_running[block].append(weight)
            else:
                fold = stack.enter_context(weight.provider.folded(weight.name, weight.change(device)))
                if not once and not all(part.use.constant for part in weight.parts):
                    run.refolded.append(fold)
        for path, changed in while_running.items():
            changes = {weight.name: weight.change() for weight in changed}
            stack.enter_context(changed[0].provider.changed_while_running(path, changes))
        yield run


def fuse(modules: Sequence[nn.Module], use: LoraUse) -> None:
    """Make `use`, at its strength in the first step, part of the weights of `modules` for good.

    Raises:
        ValueError: it changes a weight that is quantised; nothing is changed then.
    """
    weights = _patched_weights(modules, [use])
    for weight in weights:
        if not weight.is_plain:
            raise ValueError(
                f"{use.bound.lora.name} changes {weight.name}, which is held as {weight.tensor.dtype}; load the model "
                "without quantising it."
            )
    for weight in weights:
        for part in weight.parts:
            part.set_step(0, 1)
        weight.provider.replace(weight.name, weight.change()(weight.tensor.data))


def _patched_weights(modules: Sequence[nn.Module], uses: Sequence[LoraUse]) -> list[_PatchedWeight]:
    weights: dict[str, _PatchedWeight] = {}
    for use in uses:
        for name, patch in use.bound.patches:
            factor = use.blocks.factor(name)
            if not factor or not any((*use.strength.values, use.strength.outside)):
                continue
            if name not in weights:
                path, _, leaf = name.rpartition(".")
                weights[name] = _PatchedWeight(name, *_owner(modules, path), leaf, [])
            weights[name].parts.append(_ScaledPatch(patch, use, factor))
    return list(weights.values())


def _owner(modules: Sequence[nn.Module], path: str) -> tuple[WeightProvider, nn.Module]:
    """The submodule at `path`, and the provider of the module that it is in."""
    for module in modules:
        try:
            return WeightProvider.of(module), module.get_submodule(path)
        except AttributeError:
            continue
    raise ValueError(f"The model has no part {path!r}; the LoRA was prepared for another model.")


def _way(
    weight: _PatchedWeight, code: ModelBlocks, device: torch.device | None, streamed: bool
) -> Literal["fold", "side", "block"]:
    """How a parameter is changed: before the run, beside its layer, or whenever its block runs; see `LoraUse.mode`."""
    replaces = any(isinstance(part.patch, Replacement) for part in weight.parts)
    in_block = code.block(weight.name) is not None
    if not weight.is_plain and (replaces or not in_block):
        advice = "Load that checkpoint itself as the model." if replaces else "Load the model without quantising it."
        raise ValueError(
            f"{weight.parts[0].use.bound.lora.name} changes {weight.name}, which this model holds as {weight.held}. "
            f"{advice}"
        )
    if not in_block:
        return "fold"
    elsewhere = device is not None and not _same_device(weight.tensor.device, device)
    if all(_folds(part, weight, streamed, elsewhere) for part in weight.parts):
        return "fold"
    return "side" if weight.is_linear_weight and not replaces else "block"


def _same_device(first: torch.device, second: torch.device) -> bool:
    """Whether both name one device; a name without a number is the first that matches."""
    return first.type == second.type and (None in (first.index, second.index) or first.index == second.index)


def _folds(part: _ScaledPatch, weight: _PatchedWeight, streamed: bool, elsewhere: bool) -> bool:
    use = part.use
    obstacle = (
        "its strength follows a curve" if not use.constant
        else "the weights are quantised" if not weight.is_plain
        else "the weights are streamed" if streamed
        else None
    )  # fmt: skip
    if use.mode == "fold" and obstacle:
        raise ValueError(f"{use.bound.lora.name} cannot be folded: {obstacle}. Choose mode 'side' or 'auto'.")
    if use.mode == "auto":
        return obstacle is None and (not elsewhere or isinstance(part.patch, Replacement))
    return use.mode == "fold"


def _branch_hook(weight: _PatchedWeight) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    """A forward hook of a linear layer that adds what the patches of its weight contribute."""
    factors: dict[tuple[int, torch.device, torch.dtype], Patch] = {}
    gains: dict[tuple[int, torch.device], Tensor] = {}

    def gain(index: int, patch: Decomposed, module: nn.Module, device: torch.device) -> Tensor:
        if (index, device) not in gains:
            gains[index, device] = patch.to(device, torch.float32).gain(weight_of(module).to(device, torch.float32))
        return gains[index, device]

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x, plain = args[0], out
        # `out` is added to in place below, and a DoRA needs the output of the base alone.
        if len(weight.parts) > 1 and any(isinstance(part.patch, Decomposed) for part in weight.parts):
            plain = out.clone()
        for index, part in enumerate(weight.parts):
            if not part.strength:
                continue
            key = (index, x.device, x.dtype)
            if key not in factors:
                factors[key] = part.patch.to(x.device, x.dtype)
            patch = factors[key]
            if isinstance(patch, Decomposed) and isinstance(part.patch, Decomposed):
                change = _decomposed_branch(patch, gain(index, part.patch, module, x.device), module, x, plain)
                out = out.add_(change, alpha=part.strength)
            elif isinstance(patch, LowRank) and out.is_contiguous():
                # One fused multiply-add into the layer's output: no tensor of its size is made.
                hidden = nn.functional.linear(x, patch.down.flatten(1)).flatten(0, -2)
                alpha = part.strength * patch.scale
                out.view(-1, out.shape[-1]).addmm_(hidden, patch.up.flatten(1).T, alpha=alpha)
            else:
                out = out.add_(patch.branch(x), alpha=part.strength)
        return out

    return hook


def _decomposed_branch(patch: Decomposed, gain: Tensor, module: nn.Module, x: Tensor, plain: Tensor) -> Tensor:
    """What a DoRA adds to the output `plain` of `module`, from its gain per row (out,) or column (in,).

    By row: gain * (W + BA) x - W x. By column, the gain scales the inputs: (W + BA)(gain * x) - W x.
    """
    bias = module.bias.to(x.dtype) if isinstance(module.bias, Tensor) else 0
    if patch.by_row:
        gain = gain.to(x.dtype)
        return (plain - bias) * (gain - 1) + patch.inner.branch(x) * gain
    scaled = x * gain.to(x.dtype)
    return module.forward(scaled - x) - bias + patch.inner.branch(scaled)
