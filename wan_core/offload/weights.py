"""The owner of a module's weights: where each is kept between uses, how it gets to the device, what a LoRA changes.

A weight passes through stages, and `blocks.Weight` shows the last one that it has reached:

1. *offloaded*, between uses: in host memory, in the flat pinned buffer of its block, as a view of the mapped model
   file, on a device, or in another dtype than it works in;
2. *folded*: a LoRA's change of what is offloaded, for a run; the base waits in host memory;
3. *arrived* on the device: as a whole copy, which may be cached for the next use, or in a slot of a `BlockStream`;
4. *changed* while its block runs, by a LoRA on a weight that can be neither folded nor left alone: norms, biases and
   modulation of a model that streams blocks or has a strength that follows a curve.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .blocks import FlatBuffer, FlatLayout, Weight, blocks_of, contents_of, tables_of, used_bytes, weights_of
from .quant import quantised_layers
from .streaming import BlockStream, Copies, Inventory, Placement, StreamedBlock, copies_for, place

Change = Callable[[Tensor], Tensor]
"""What a LoRA makes of a weight; the result has its shape, dtype and device."""


class WeightProvider:
    """The one owner of the weights of a module while they are offloaded, copied to a device, or changed by a LoRA.

    It is the module's attribute `weight_provider`, made by `of` at its first use. Code that puts another parameter in
    the place of one calls `replaced`. Weights that are trained stay where they are.

    Attributes:
        work_dtypes: the dtype, by name, that a weight has on the device when it is offloaded in another one.
        mapped: the names of the weights that are views of the model file.
        origin: identifies the weights without reading them; empty once they may differ from what was deferred.
    """

    def __init__(self, module: nn.Module) -> None:
        # A strong reference would be a cycle: a dropped module would keep its weights until the garbage collector runs.
        self._reference = weakref.ref(module)
        self.work_dtypes: dict[str, torch.dtype] = {}
        self.mapped: set[str] = set()
        self._weights: dict[str, Weight] = {}
        self._stream: BlockStream | None = None
        self._changes: dict[str, dict[str, Change]] = {}
        self._hooked: set[str] = set()
        self._at_work, self._users = False, 0
        self._load: Callable[[], nn.Module] | None = None
        self._unread: tuple[Callable[[], nn.Module], dict[str, object]] | None = None
        self.origin = ""

    @classmethod
    def of(cls, module: nn.Module) -> "WeightProvider":
        """The provider of `module`, its attribute `weight_provider`."""
        found = getattr(module, "weight_provider", None)
        if found is None:
            found = module.__dict__["weight_provider"] = cls(module)
            module.register_load_state_dict_post_hook(_after_load_state_dict)
        assert isinstance(found, cls)
        return found

    def __deepcopy__(self, memo: dict[int, object]) -> "WeightProvider | None":
        module = memo.get(id(self._reference()))
        if not isinstance(module, nn.Module):
            return None
        copy = WeightProvider(module)
        # Not `mapped`: the copies are in memory.
        copy.work_dtypes = dict(self.work_dtypes)
        return copy

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        # As None: a module that comes out of a pickle gets a provider of its own.
        return type(None), ()

    @property
    def _module(self) -> nn.Module:
        module = self._reference()
        assert module is not None, "a provider is used after its module is gone"
        return module

    def inventory(self, order: Sequence[str] | None = None, idle: Collection[str] = ()) -> Inventory:
        """The sizes of the weights as they work, see `Inventory.of`."""
        return Inventory.of(self._module, self.work_dtypes, order, idle)

    def defer(self, load: Callable[[], nn.Module], origin: str) -> None:
        """Take the weights, which `origin` identifies, from the module that `load` makes, when they are first used.
        Until then this module, on the meta device, has their sizes.
        """
        self._load, self.origin = load, origin

    def read(self, *, keep: bool = False) -> None:
        """Read weights that were deferred; loading them may raise ValueError. With `keep` they are never dropped."""
        if self._load is not None:
            unread, made = contents_of(self._module), self._load()
            self._module.__dict__.update(contents_of(made))
            self.mapped, self.work_dtypes = WeightProvider.of(made).mapped, WeightProvider.of(made).work_dtypes
            self._unread, self._load = (self._load, unread), None
        self._unread = None if keep else self._unread

    def drop(self) -> None:
        """Let go of deferred weights until they are read again, unless they are in use or differ from those by now."""
        if self._unread is None or self._users or self._at_work or not self.origin:
            return
        (self._load, unread), self._unread = self._unread, None
        self._module.__dict__.update(unread)
        self._weights = {}

    @property
    def cached_bytes(self) -> int:
        """Bytes of the copies that stay on a device for the next use."""
        return sum(weight.cached.nbytes for weight in self._weights.values() if weight.cached is not None)

    @property
    def at_work(self) -> bool:
        """Whether the module is at work now, on whichever device."""
        return self._at_work

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the block, the module counts as at work with its weights where they are; a trainer's are."""
        self.read()
        before, self._at_work = self._at_work, True
        try:
            yield
        finally:
            self._at_work = before

    def bytes_on(self, device: torch.device) -> int:
        """Bytes of the weights that are on `device` between uses, offloaded or cached.

        0 where the bytes in use are not known: callers add this to a figure that does not contain them either.
        """
        if not used_bytes(device):
            return 0
        offloaded = (weight for weight in weights_of(self._module).values() if weight.device == device)
        return self.cached_bytes + sum(weight.nbytes for weight in offloaded)

    @property
    def flat_buffers(self) -> list[FlatBuffer]:
        """The buffers that blocks were moved into when they were streamed."""
        found = {id(weight.buffer): weight.buffer for weight in self._weights.values()}
        return [buffer for buffer in found.values() if buffer is not None]

    def offload_to(self, device: torch.device) -> None:
        """Keep all weights on `device` between uses from now on."""
        if self._load is not None and device.type == "cpu":
            return  # deferred weights are there once they are read
        with self._in_use() as weights:
            for weight in weights.values():
                if weight.offloaded.device != device:
                    weight.offload(weight.offloaded.to(device))

    def offload_as(self, dtype: torch.dtype, works_as: torch.dtype) -> None:
        """Keep the weights of blocks that work in `works_as` in `dtype` between uses from now on.

        Quantised layers keep their numbers and scales.
        """
        inside = tuple(f"{path}." for path in blocks_of(self._module))
        quantised = {f"{path}.{leaf}" for path in quantised_layers(self._module) for leaf in ("weight", "scale")}
        with self._in_use() as weights:
            for name, weight in weights.items():
                if name.startswith(inside) and weight.offloaded.dtype == works_as and name not in quantised:
                    weight.offload(weight.offloaded.to(dtype))
                    self.work_dtypes[name] = works_as

    def replace(self, name: str, data: Tensor) -> None:
        """Hold `data` as the weight `name` from now on."""
        with self._in_use() as weights:
            weights[name].offload(data)
            self.mapped.discard(name)
            self.origin = ""

    def replaced(self, name: str) -> None:
        """Forget what was known of the parameter `name`: another one in memory has taken its place."""
        self._weights.pop(name, None)
        self.mapped.discard(name)
        self.origin = ""

    def evict(self, size: float | None = None) -> int:
        """Drop cached copies, at least `size` bytes of them or all; the bytes that were dropped.

        Weights that are at work stay.
        """
        dropped = 0
        # The last blocks first: the next run needs the first ones soonest.
        for weight in reversed(list(self._weights.values())):
            if self._at_work or (size is not None and dropped >= size):
                break
            if weight.cached is not None:
                dropped += weight.cached.nbytes
                weight.cached = None
        return dropped

    @contextmanager
    def working(
        self,
        device: torch.device,
        placement: Placement | None = None,
        *,
        keep: bool = False,
        copies: Copies | None = None,
    ) -> Iterator[BlockStream | None]:
        """The module able to work on `device` inside the block; afterwards every weight is as it was before.

        Inside of another use this changes nothing: the weights are where that one has them.

        Args:
            placement: which blocks are streamed; none is if None. Blocks that it calls idle stay where they are.
            keep: cache the copies on the device for the next use instead of dropping them.
        """
        if self._at_work:
            yield self._stream
            return
        placement = placement or place(self.inventory())
        copies = copies or copies_for(device)
        with self._in_use() as weights:
            self._at_work = True
            arrived: list[Weight] = []
            try:
                for weight in self._copied(weights, placement, device, copies):
                    assert weight.cached is not None
                    weight.arrive(weight.cached)
                    arrived.append(weight)
                with self._streaming(weights, placement, device, copies) as stream:
                    yield stream
            except BaseException:
                # After an out-of-memory error the copies must go, or nothing smaller fits either.
                keep = False
                raise
            finally:
                for weight in arrived:
                    weight.leave()
                self._at_work = False
                if not keep:
                    self.evict()

    @contextmanager
    def folded(self, name: str, change: Change) -> Iterator[Callable[[], None]]:
        """The weight `name` as `change` makes it inside the block, between uses and at work.

        The function that is yielded folds again, for a change whose strength is another by then. The base waits in host
        memory meanwhile, so that a device holds the weight once.
        """
        with self._in_use() as weights:
            weight = weights[name]
            device, buffer, base = weight.offloaded.device, weight.buffer, weight.offloaded.cpu()
            first = change(weight.offloaded)

            def fold() -> None:
                weight.offload(change(base).to(device))

            try:
                weight.offload(first)
                # The generator's frame lives as long as the run, and would hold a second copy.
                del first
                yield fold
            finally:
                weight.offload(base.to(device), buffer if device.type == "cpu" else None)

    @contextmanager
    def changed_while_running(self, path: str, changes: Mapping[str, Change]) -> Iterator[None]:
        """Inside the block, the weights of `changes` are changed whenever the module at `path` runs, wherever they are
        by then. Only one module's changed weights are in memory at a time.
        """
        with self._in_use() as weights, self._block_hooks([path]):
            assert path not in self._changes, "the weights of a block are changed once"
            self._changes[path] = dict(changes)
            try:
                yield
            finally:
                del self._changes[path]
                # After an interruption (Ctrl-C) no hook has run.
                for name in changes:
                    weights[name].change(None)

    @contextmanager
    def _in_use(self) -> Iterator[dict[str, Weight]]:
        """The `Weight` of each parameter and buffer that the module has now.

        One that was replaced, or moved or cast by its module (`Module.to`), starts over. After the last use only those
        with cached copies or flat buffers are kept: others would hold the memory of parameters that are replaced later.
        """
        self.read()
        known = self._weights
        self._weights = {
            name: known[name] if name in known and known[name].stands_for(tensor) else Weight(tensor)
            for name, tensor in weights_of(self._module).items()
        }
        self._users += 1
        try:
            yield self._weights
        finally:
            self._users -= 1
            if not self._users:
                self._weights = {
                    name: weight
                    for name, weight in self._weights.items()
                    if weight.cached is not None or weight.buffer is not None
                }

    def _copied(
        self, weights: Mapping[str, Weight], placement: Placement, device: torch.device, copies: Copies
    ) -> list[Weight]:
        """Copy to `device` what `placement` wants there, drop other cached copies; the weights that have one."""
        elsewhere = tuple(f"{path}." for path in (*placement.streamed, *placement.inventory.idle))
        tables = tables_of(self._module)
        wanted = {
            name: weight
            for name, weight in weights.items()
            if not (weight.tensor.requires_grad or name.startswith(elsewhere) or name in tables)
        }
        for name, weight in weights.items():
            # Before the first copy is made, so that the device never holds both.
            if weight.cached is not None and (name not in wanted or weight.cached.device != device):
                weight.cached = None
        for name, weight in wanted.items():
            if weight.cached is None:
                copy = copies.whole(weight.offloaded, self.work_dtypes.get(name, weight.offloaded.dtype))
                weight.cached = None if copy is weight.offloaded else copy
        return [weight for weight in wanted.values() if weight.cached is not None]

    @contextmanager
    def _streaming(
        self, weights: Mapping[str, Weight], placement: Placement, device: torch.device, copies: Copies
    ) -> Iterator[BlockStream | None]:
        """The stream of the blocks that `placement` streams; None where it streams none."""
        blocks, tensors = blocks_of(self._module), {name: weight.tensor for name, weight in weights.items()}
        streamed = []
        for path in placement.streamed:
            layout = FlatLayout.of(path, tensors, self.work_dtypes)
            own = {entry.name: weights[entry.name] for entry in layout.entries}
            buffer = self._flat_buffer(layout, own, pin=copies.reads_pinned)
            streamed.append(StreamedBlock(path, blocks[path], layout, own, buffer))
        if not streamed:
            yield None
            return
        with self._block_hooks(placement.streamed), BlockStream(streamed, device, copies) as stream:
            self._stream = stream
            try:
                yield stream
            finally:
                self._stream = None

    def _flat_buffer(self, layout: FlatLayout, weights: Mapping[str, Weight], *, pin: bool) -> FlatBuffer | None:
        """The buffer that a block's weights are views of; they are moved into one the first time.

        None for weights that are not in host memory in the form in which they work: those in another dtype, and those
        of a mapped file, where a buffer would take the memory that mapping saves.
        """
        if any(name in self.mapped or name in self.work_dtypes for name in weights):
            return None
        first = next(iter(weights.values()))
        buffer = first.buffer
        if buffer is None or buffer.layout != layout or any(weight.buffer is not buffer for weight in weights.values()):
            buffer = FlatBuffer(layout.bytes, first.offloaded.device, pin, layout)
            layout.fill(buffer.bytes, {name: weight.offloaded for name, weight in weights.items()})
            for entry in layout.entries:
                weights[entry.name].offload(entry.view(buffer.bytes), buffer)
        return buffer

    @contextmanager
    def _block_hooks(self, paths: Sequence[str]) -> Iterator[None]:
        """Call `_begin` and `_end` around every run of the blocks at `paths`, by one pair of hooks for each block."""
        with ExitStack() as stack:
            for path in paths:
                if path in self._hooked:
                    continue
                block = self._module.get_submodule(path)
                self._hooked.add(path)
                stack.callback(self._hooked.discard, path)
                # Prepended: the block's other hooks may read the weights that this one brings.
                before = block.register_forward_pre_hook(lambda *_, path=path: self._begin(path), prepend=True)
                after = block.register_forward_hook(lambda *run, path=path: self._end(path, run[-1]), always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            yield

    def _begin(self, path: str) -> None:
        if self._stream is not None:
            self._stream.begin(path)
        for name, change in self._changes.get(path, {}).items():
            weight = self._weights[name]
            weight.change(change(weight.current))

    def _end(self, path: str, out: object) -> None:
        for name in self._changes.get(path, ()):
            self._weights[name].change(None)
        # A block that failed has no output, and nothing follows it.
        if self._stream is not None and out is not None:
            self._stream.end(path)


def _after_load_state_dict(module: nn.Module, _: object) -> None:
    """Drop cached copies: the weights of `module` have other values now, or are other parameters."""
    provider = WeightProvider.of(module)
    provider.origin = ""
    for weight in provider._weights.values():
        weight.cached = None
