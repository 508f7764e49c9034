"""The parts of a module that run one after the other, and what their weights weigh."""

from torch import nn


def blocks_of(module: nn.Module) -> dict[str, nn.Module]:
    """The blocks of `module` by path, in the order in which they are declared.

    A block is a child of an `nn.ModuleList`, or of an `nn.Sequential` whose children are all of one class and have
    weights. Blocks inside of blocks do not count.
    """
    blocks: dict[str, nn.Module] = {}

    def walk(owner: nn.Module, path: str) -> None:
        for name, child in owner.named_children():
            child_path = f"{path}{name}"
            if _holds_blocks(owner) and any(True for _ in child.parameters()):
                blocks[child_path] = child
            else:
                walk(child, f"{child_path}.")

    walk(module, "")
    return blocks


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers of `module`, in the dtypes they are held in."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def _holds_blocks(owner: nn.Module) -> bool:
    one_class = isinstance(owner, nn.Sequential) and len({type(child) for child in owner}) == 1
    return one_class or isinstance(owner, nn.ModuleList)
