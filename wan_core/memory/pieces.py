"""A module seen as weights: the repeated blocks that can be copied one by one, and everything outside of them."""

from torch import Tensor, nn


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The repeated parts of `module` by path: the outermost lists and sequences of several parts of one
    class that have weights."""
    found: dict[str, nn.Module] = {}

    def walk(owner: nn.Module, path: str) -> None:
        for name, child in owner.named_children():
            inner = f"{path}{name}"
            if _repeats(child):
                found.update({f"{inner}.{index}": block for index, block in child.named_children()})
            else:
                walk(child, f"{inner}.")

    walk(module, "")
    return found


def _repeats(module: nn.Module) -> bool:
    parts = list(module.children())
    one_class = len({type(part) for part in parts}) == 1
    has_weights = any(True for _ in module.parameters())
    return isinstance(module, (nn.ModuleList, nn.Sequential)) and one_class and len(parts) > 1 and has_weights


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def weight_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and buffers as they rest."""
    return sum(tensor.nbytes for tensor in weights_of(module).values())


def tables_of(module: nn.Module) -> set[str]:
    """Names of the embedding tables outside of blocks. A lookup needs a few rows, so a table is used where it rests."""
    blocks = tuple(f"{path}." for path in blocks_of(module))
    return {
        f"{path}.weight"
        for path, part in module.named_modules()
        if isinstance(part, nn.Embedding) and not path.startswith(blocks)
    }
