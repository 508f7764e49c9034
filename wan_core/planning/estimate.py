"""Memory and work of a step, counted on the meta device, where tensors have sizes and no data."""

import copy
import dataclasses
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..models.config import DiTConfig
from ..models.dit import TokenState, WanDiT
from ..models.fused import EAGER
from ..models.layers import MotionController
from ..offload.blocks import weights_of
from ..parallel.layout import ALONE, Layout
from ..parallel.mesh import Mesh
from ..runtime import Runtime
from ..sampling.guidance import Guided
from ..sampling.predictor import AllBlocks, BlockRunner, Key, ModelPredictor, TimeTable
from ..sampling.step_cache import CachedBlocks, Lead
from ..settings import GuidanceSettings, SkipSettings
from ..types import Conditioning, StepInfo, map_tensors, tensors_in


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that are made on `device` while it is active and are alive, and their peak.

    Attributes:
        live: bytes alive now.
        peak: the most that were alive at once.
    """

    def __init__(self, device: torch.device | str = "meta", given: Iterable[Tensor] = ()) -> None:
        """`given` tensors exist already and do not count."""
        super().__init__()
        self.device = torch.device(device)
        self.live = self.peak = 0
        self._known = WeakIdKeyDictionary()
        for tensor in given:
            self._known[tensor.untyped_storage()] = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and the wrapper that would keep PyTorch's compiler out costs as much as an answer.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = compute(func, args, kwargs or {})
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and x.device == self.device:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        # By storage, so that views and results written in place are not counted again.
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = True
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size


META = torch.device("meta")

Answer = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""From the arguments of an operation to its result."""

_ANSWERS: dict[Hashable, Answer | None] = {}
"""Of operations on the meta device, by their signatures; None where an operation has to be asked every time."""

MOST_ANSWERS = 50_000


@dataclasses.dataclass(frozen=True)
class _Layout:
    """What a tensor on the meta device is."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "_Layout":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype)

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=META)


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the operation `func` gives. On the meta device it is asked once for each kind of inputs.

    PyTorch derives shapes, strides and dtypes there in Python, which takes a millisecond for most operations and nearly
    all of the time of a count, and a model asks for the same ones in each of its blocks.
    """
    try:
        key = (func, _signature(args), _signature(tuple(kwargs.items())))
        answer = _ANSWERS.get(key)
    except TypeError:  # a tensor that has data, or an argument of another kind
        return func(*args, **kwargs)
    if answer is not None:
        return answer(args, kwargs)
    if key in _ANSWERS:
        return func(*args, **kwargs)
    given = [x for x in (*args, *kwargs.values()) for x in (x if isinstance(x, (tuple, list)) else (x,))]
    tensors = [x for x in given if isinstance(x, Tensor)]
    before = [_Layout.of(x) for x in tensors]  # an operation in place may change it
    out = func(*args, **kwargs)
    if len(_ANSWERS) >= MOST_ANSWERS:
        _ANSWERS.clear()
    unchanged = tensors and before == [_Layout.of(x) for x in tensors]
    _ANSWERS[key] = _answer(out, tensors, args, kwargs) if unchanged else None
    return out


def _signature(value: Any) -> Hashable:
    """What decides on the layout of results: of tensors their own, all else but floats by value.

    Raises:
        TypeError: the value has data, which may decide, or is of another kind.
    """
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple(map(_signature, value))
    return float if isinstance(value, float) else (type(value), value)


def _answer(out: Any, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer | None:
    """How to repeat `out`; None for views, and for results that are no tensors of their own."""
    if args and out is args[0]:
        return lambda args, _: args[0]
    if "out" in kwargs:
        return (lambda _, kwargs: kwargs["out"]) if out is kwargs["out"] else None
    results = out if isinstance(out, tuple) else (out,)
    if not all(isinstance(x, Tensor) and x.is_meta for x in results):
        return None
    layouts = [_Layout.of(x) for x in results]
    own = {x.untyped_storage()._cdata for x in results} - {x.untyped_storage()._cdata for x in given}
    sizes = [x.untyped_storage().nbytes() for x in results]
    if len(own) < len(results) or sizes != [layout.made().untyped_storage().nbytes() for layout in layouts]:
        return None
    if isinstance(out, tuple):
        return lambda *_: tuple(layout.made() for layout in layouts)
    return lambda *_: layouts[0].made()


class _FusedAttention(TorchFunctionMode):
    """Attention as fused kernels run it: its result is all that it allocates.

    The meta device knows only the plain form, which holds the logits of all pairs.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            query, _, value = args
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return func(*args, **(kwargs or {}))


@contextmanager
def count_bytes(*given: Tensor) -> Iterator[LiveBytes]:
    """A counter of what is made on the meta device inside the block, beside the tensors that are `given`."""
    with torch.no_grad(), LiveBytes(META, given) as counter, _FusedAttention():
        yield counter


Module = TypeVar("Module", bound=nn.Module)

Residuals = Literal["none", "device", "host"]
"""Where a step cache keeps its residuals: the change that the blocks made to the tokens."""


def meta_twin(module: Module, **parts: nn.Module) -> Module:
    """A copy of `module` on the meta device, without its weights; `parts` take the place of those of their names."""
    known: dict[int, object] = {id(getattr(module, name)): part for name, part in parts.items()}
    for tensor in weights_of(module).values():
        twin = torch.empty_like(tensor, device=META)
        known[id(tensor)] = nn.Parameter(twin, requires_grad=False) if isinstance(tensor, nn.Parameter) else twin
    return copy.deepcopy(module, known)


def _short_twin(dit: WanDiT) -> WanDiT:
    """A twin of the first two blocks, and of the two VACE blocks that feed them: memory does not grow after these."""
    layers = tuple(range(len(dit.config.vace_layers[:2])))
    parts = {"blocks": nn.ModuleList(meta_twin(block) for block in dit.blocks[:2])}
    if layers:
        parts["vace_blocks"] = nn.ModuleList(meta_twin(block) for block in dit.vace_blocks[: len(layers)])
    twin = meta_twin(dit, **parts)
    twin.config = dataclasses.replace(dit.config, vace_layers=layers)
    # A kernel of any kind allocates its result, and scratch space that the allowance covers.
    twin.attend = lambda q, k, v: torch.empty_like(q)
    # The plain steps: nothing is compiled for the meta device.
    twin.fused = EAGER
    return twin


def step_bytes(
    dit: WanDiT,
    cond: Conditioning,
    size: tuple[int, int, int],
    guidance: GuidanceSettings,
    residuals: Residuals = "none",
    motion_controller: MotionController | None = None,
    layout: Layout = ALONE,
) -> int:
    """Peak bytes on the device of a step with all its branches, beside weights and conditioning.

    The step is run on the meta device, with attention counted as fused kernels run it. Results are kept by model and
    shapes of inputs, because a count takes most of a second.

    Args:
        size: latent frames with those in front, rows and columns, of the video or of one window of it.
        residuals: where a step cache keeps its tensors.
        layout: of the ranks that share the step; counted is one of them.
    """
    twin = _short_twin(dit)
    controller = None if motion_controller is None else meta_twin(motion_controller)
    key = _described(twin, controller, cond, size, guidance, residuals, layout)
    if key not in _COUNTED:
        _COUNTED[key] = _counted_bytes(twin, controller, cond, size, guidance, residuals, layout)
    return _COUNTED[key]


_COUNTED: dict[str, int] = {}


def _described(*values: object) -> str:
    """A key of what memory depends on: the layers and weights of modules, the shapes and dtypes of tensors."""

    def described(value: object) -> str:
        if isinstance(value, nn.Module):
            weights = {name: (tuple(w.shape), w.dtype) for name, w in weights_of(value).items()}
            return f"{vars(value).get('exact')} {value} {weights}"
        return repr(map_tensors(value, lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}"))

    return "; ".join(map(described, values))


def _counted_bytes(
    twin: WanDiT,
    controller: MotionController | None,
    cond: Conditioning,
    size: tuple[int, int, int],
    guidance: GuidanceSettings,
    residuals: Residuals,
    layout: Layout,
) -> int:
    cond = cond.on_meta()
    if layout.cfg > 1:
        # A row has a branch to itself, or shares it with that of skip-layer guidance.
        alone = guidance.branches == 2
        guidance = dataclasses.replace(
            guidance, skip=SkipSettings(), scale=1.0 if alone else guidance.scale, scale_low=None, mode="interleaved"
        )
    x = torch.empty(len(cond.encoded_text), twin.config.out_channels, *size, device=META)
    weights = [*weights_of(twin).values(), *([] if controller is None else weights_of(controller).values())]
    with count_bytes(*weights, *tensors_in(cond), x) as counter:
        blocks: BlockRunner = AllBlocks(twin, Runtime(device=META, dtype=twin.dtype))
        if residuals == "device":
            blocks = CachedBlocks(blocks, _ComputesEveryStep(), twin.dtype)
        elif residuals == "host":
            blocks = _Comparing(blocks)
        time = TimeTable(twin, [[0.0]] * 4, cond)
        # Guidance at every step, so that all its branches are counted.
        scale = next((scale for scale in guidance.scales if scale != 1), 1.0)
        always = dataclasses.replace(guidance, scale=scale, start=0.0, end=1.0, zero_steps=0)
        if guidance.skip.blocks:
            # One of the two blocks: a branch that leaves blocks out keeps as much as any other.
            always = dataclasses.replace(always, skip=dataclasses.replace(guidance.skip, blocks=(1,), start=0, end=1))
        predict = Guided(ModelPredictor(twin, time, blocks, controller, guidance=always, mesh=Mesh(layout)), always)
        # The second step has what a cache kept of the first.
        for index in (1, 2):
            predict(x, 0.0, cond, StepInfo(index, 4))
    return counter.peak


class _ComputesEveryStep:
    """A rule that skips no step and keeps everything: the most memory that a cache takes."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def may_skip(self, index: int) -> bool:
        return True

    def skips(self, lead: Lead, info: StepInfo) -> bool:
        return False

    def computed(self, lead: Lead, info: StepInfo) -> None: ...


class _Comparing:
    """What a cache with residuals in host memory holds on the device: the tokens from before the blocks."""

    def __init__(self, run: BlockRunner) -> None:
        self._run, self.count = run, run.count

    def __call__(
        self, states: Sequence[TokenState], keys: Sequence[Key], info: StepInfo, blocks: range | None = None
    ) -> None:
        before = [state.tokens.clone() for state in states]
        self._run(states, keys, info, blocks)
        del before


def kept_bytes(config: DiTConfig, cond: Conditioning, dtype: torch.dtype, guidance: GuidanceSettings) -> int:
    """Bytes of the keys and values of cross-attention in all blocks, of every branch that a run has."""
    # A batch of both branches keeps its own beside those of the one branch at steps without guidance.
    branches = guidance.branches + (guidance.has_negative and guidance.mode == "batched")
    if guidance.skip.blocks and guidance.mode == "batched":
        branches += 1  # the branch that left blocks out runs by itself
    blocks = config.num_layers + (len(config.vace_layers) if cond.vace else 0)
    batch, text_tokens, _ = cond.encoded_text.shape
    tokens = branches * _context_tokens(config, text_tokens)
    if guidance.nag.is_on:
        # Beside the negative text's own branch: it leads the conditional one, alone, in a batch and without blocks.
        tokens += (branches - guidance.has_negative) * text_tokens
    return blocks * 2 * batch * tokens * config.dim * dtype.itemsize


def kept_share(config: DiTConfig, size: tuple[int, int, int], text_tokens: int) -> float:
    """The share of a step's operations that makes the keys and values of cross-attention."""
    made = 4 * config.num_layers * _context_tokens(config, text_tokens) * config.dim**2
    return made / pass_flops(config, size, text_tokens)


def _context_tokens(config: DiTConfig, text_tokens: int) -> int:
    return text_tokens + config.num_image_tokens


def pass_flops(
    config: DiTConfig, size: tuple[int, int, int], text_tokens: int = 512, vace_inputs: int = 0, texts: int = 1
) -> float:
    """Floating-point operations of the blocks in one forward of one branch, which attends to as many `texts`."""
    _, ph, pw = config.patch_size
    tokens = size[0] * (size[1] // ph) * (size[2] // pw)
    dim = config.dim
    context = _context_tokens(config, text_tokens) + (texts - 1) * text_tokens
    # Per token: q, k, v and o of self-attention, q and o of cross-attention, two matrices of the feed-forward; the
    # context gives k and v. A multiply-add counts as two operations, and attention has two products.
    linear = 2 * tokens * (6 * dim * dim + 2 * dim * config.ffn_dim) + 4 * context * dim * dim
    attention = 4 * tokens * tokens * dim + 4 * tokens * context * dim
    return (config.num_layers + vace_inputs * len(config.vace_layers)) * (linear + attention)
