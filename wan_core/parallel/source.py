"""How a model was loaded, so that another process can load it again from the same files."""

import copyreg
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch


def _read_only(mapping: dict[Any, Any]) -> MappingProxyType[Any, Any]:
    return MappingProxyType(mapping)


# The headers of files, which are arguments of loading, hold read-only mappings; pickle does not know these.
copyreg.pickle(MappingProxyType, lambda mapping: (_read_only, (dict(mapping),)))


@dataclass(frozen=True, eq=False)
class Source:
    """Calls of functions, each of which gets the result of the one before as its first argument."""

    calls: tuple[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]], ...]

    @classmethod
    def of(cls, function: Callable[..., Any], *arguments: Any, **more: Any) -> "Source":
        return cls(((function, arguments, more),))

    def then(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> "Source":
        return Source((*self.calls, (function, arguments, more)))

    def load(self, device: torch.device, *, mapped: bool = False) -> Any:
        """The model, with `device` in the place of another device of its kind; with `mapped`, weights that wait in host
        memory stay in their file, whose pages all processes share.

        Raises:
            ValueError: the files cannot be read, or their weights cannot stay in them.
        """
        found: list[Any] = []
        for function, arguments, more in self.calls:
            moved = [_moved(argument, device, mapped) for argument in arguments]
            named = {name: _moved(value, device, mapped) for name, value in more.items()}
            found = [function(*found, *moved, **named)]
        return found[0]


def _moved(value: Any, device: torch.device, mapped: bool) -> Any:
    if mapped and isinstance(getattr(value, "mapped", None), bool) and value.device.type == "cpu":
        return replace(value, mapped=True)
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        value = torch.device(value)
    if isinstance(value, torch.device):
        return device if value.type == device.type else value
    inner = getattr(value, "device", None)
    if isinstance(inner, torch.device) and not isinstance(value, torch.Tensor) and inner.type == device.type:
        return replace(value, device=device)
    return value
