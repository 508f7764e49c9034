"""Where the weights of a module are: at rest between uses, and on a device while it works."""

import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from .blocks import Layout, Slab, blocks_of, tables_of, used_bytes, weights_of
from .placement import Inventory, Placement, place
from .quant import quantised_layers
from .streaming import BlockStream, Copies, StreamedBlock, copies_for


class Residency:
    """Moves the weights of one module. Resting weights are what the parameters hold between uses: in host memory, on a
    device, or as views of the model file ("disk"). Copies on a device are dropped when they are no longer needed and
    never copied back: they do not change. Weights that are trained are left where they are.

    Attributes:
        work_dtypes: the dtype, by parameter name, that a weight is given on the device when it rests in another one.
        mapped: the names of the weights that rest in the model file.
    """

    _known: ClassVar["weakref.WeakKeyDictionary[nn.Module, Residency]"] = weakref.WeakKeyDictionary()

    def __init__(self, module: nn.Module) -> None:
        self._reference = weakref.ref(module)
        self.work_dtypes: dict[str, torch.dtype] = {}
        self.mapped: set[str] = set()
        self._slabs: dict[str, Slab] = {}
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._busy = 0

    @classmethod
    def of(cls, module: nn.Module) -> "Residency":
        """The one residency of `module`; it lives as long as the module."""
        if module not in cls._known:
            cls._known[module] = cls(module)
        return cls._known[module]

    def _module(self) -> nn.Module:
        module = self._reference()
        assert module is not None, "a residency is used after its module is gone"
        return module

    def inventory(self, order: Sequence[str] | None = None, idle: Collection[str] = ()) -> Inventory:
        """The sizes of the weights as they work, see `Inventory.of`."""
        return Inventory.of(self._module(), self.work_dtypes, order, idle)

    @property
    def kept_bytes(self) -> int:
        """Bytes of the copies that wait on a device for the next use."""
        return sum(copy.nbytes for _, copy in self._kept.values())

    def bytes_on(self, device: torch.device) -> int:
        """Bytes of the weights that are on `device` between uses, at rest or waiting; 0 where used bytes are not known,
        because they are not counted there either.
        """
        if not used_bytes(device):
            return 0
        resting = (weight for weight in weights_of(self._module()).values() if weight.device == device)
        return self.kept_bytes + sum(weight.nbytes for weight in resting)

    def rest_on(self, device: torch.device) -> None:
        """Let all weights rest on `device` from now on."""
        for weight in weights_of(self._module()).values():
            weight.data = weight.data.to(device)

    def rest_as(self, dtype: torch.dtype, works_as: torch.dtype) -> None:
        """Let the weights of blocks that work in `works_as` rest in `dtype` from now on; quantised ones stay as they
        are, with their scales."""
        inside = tuple(f"{path}." for path in blocks_of(self._module()))
        kept = {f"{path}.{leaf}" for path in quantised_layers(self._module()) for leaf in ("weight", "scale")}
        for name, weight in weights_of(self._module()).items():
            if name.startswith(inside) and weight.dtype == works_as and name not in kept:
                weight.data = weight.data.to(dtype)
                self.work_dtypes[name] = works_as

    def evict(self, size: float | None = None) -> int:
        """Drop copies that wait for the next use, at least `size` bytes of them or all; the bytes that were dropped.

        Weights that are at work stay.
        """
        dropped = 0
        while self._kept and not self._busy and (size is None or dropped < size):
            _, (_, copy) = self._kept.popitem()
            dropped += copy.nbytes
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
        """The module able to work on `device` inside the block; afterwards every weight is where it rested.

        Args:
            placement: which blocks are streamed; none is if None. Blocks that it calls idle stay where they rest.
            keep: leave the copies on the device for the next use instead of dropping them.
        """
        module = self._module()
        placement = placement or place(self.inventory())
        weights = weights_of(module)
        copies = copies or copies_for(device)
        moved: list[tuple[Tensor, Tensor]] = []
        self._busy += 1
        try:
            for name, copy in self._brought(module, weights, placement, device, copies).items():
                moved.append((weights[name], weights[name].data))
                weights[name].data = copy
            if not placement.streamed:
                yield None
                return
            streamed = self._streamed(module, weights, placement, pin=copies.reads_pinned)
            with BlockStream(streamed, device, copies) as stream:
                yield stream
        except BaseException:
            keep = False
            raise
        finally:
            for tensor, resting in moved:
                tensor.data = resting
            moved.clear()
            self._busy -= 1
            if not keep:
                self.evict()

    def _brought(
        self,
        module: nn.Module,
        weights: Mapping[str, Tensor],
        placement: Placement,
        device: torch.device,
        copies: Copies,
    ) -> dict[str, Tensor]:
        """The copies that `placement` wants to stay on `device`, kept ones first; other kept ones are dropped."""
        elsewhere = tuple(f"{path}." for path in (*placement.streamed, *placement.inventory.idle))
        tables = tables_of(module)
        wanted = [
            name
            for name, weight in weights.items()
            if not (weight.requires_grad or name.startswith(elsewhere) or name in tables)
        ]
        self._kept = {
            name: (resting, copy)
            for name, (resting, copy) in self._kept.items()
            if name in wanted and resting.data_ptr() == weights[name].data_ptr() and copy.device == device
        }
        found = {}
        for name in wanted:
            resting = weights[name].data
            if name not in self._kept:
                copy = copies.whole(resting, self.work_dtypes.get(name, resting.dtype))
                if copy is not resting:
                    self._kept[name] = (resting, copy)
            if name in self._kept:
                found[name] = self._kept[name][1]
        return found

    def _streamed(
        self, module: nn.Module, weights: Mapping[str, Tensor], placement: Placement, *, pin: bool
    ) -> list[StreamedBlock]:
        blocks = blocks_of(module)
        found = []
        for path in placement.streamed:
            layout = Layout.of(path, weights, self.work_dtypes)
            slab = self._slab(path, layout, weights, pin=pin)
            found.append(StreamedBlock(blocks[path], layout, weights, slab))
        return found

    def _slab(self, path: str, layout: Layout, weights: Mapping[str, Tensor], *, pin: bool) -> Slab | None:
        """The row that the block's weights rest in; they are moved into it the first time."""
        names = [entry.name for entry in layout.entries]
        if any(name in self.mapped or name in self.work_dtypes for name in names):
            return None
        slab = self._slabs.get(path)
        if slab is None or any(weights[e.name].data_ptr() != e.view(slab.row).data_ptr() for e in layout.entries):
            slab = Slab(layout.bytes, weights[names[0]].device, pin)
            layout.fill(slab.row, weights)
            for entry in layout.entries:
                weights[entry.name].data = entry.view(slab.row)
            self._slabs[path] = slab
        return slab


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[nn.Module]:
    """`module` with its weights on `device` inside the block, and back where they rest after it."""
    with Residency.of(module).working(device):
        yield module
