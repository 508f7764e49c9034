"""The order in which samples are trained: a pure function of seed and epoch, so that a place in it is one number."""

from collections.abc import Hashable, Sequence

import torch


def batches(
    shapes: Sequence[Hashable], seed: int, epoch: int, batch_size: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """The batches of one process in one epoch, each a list of positions in `shapes`.

    All positions of a batch have one shape. The processes' batches of one index form a global batch of one shape too,
    and hold together the positions that a single process of `world` times the batch size would take. Every position
    occurs; where a shape's last positions do not divide among the processes, some of its positions occur twice.

    Args:
        shapes: what must be equal within a batch, per position.
        seed, epoch: choose the permutation.
        batch_size: positions per process.
        rank, world: which of how many processes.

    Raises:
        ValueError: there is no position, or `rank` is not one of `world`.
    """
    if not shapes or batch_size < 1 or not 0 <= rank < world:
        raise ValueError(f"No batches of {batch_size} from {len(shapes)} samples for process {rank} of {world}.")
    buckets: dict[Hashable, list[int]] = {}
    order = permutation(len(shapes), seed, epoch)
    for position in order:
        buckets.setdefault(shapes[position], []).append(position)
    place = {position: index for index, position in enumerate(order)}
    together = [part for bucket in buckets.values() for part in _parts(bucket, batch_size * world, world)]
    together.sort(key=lambda part: place[part[0]])
    share = [len(part) // world for part in together]
    return [part[rank * n : (rank + 1) * n] for part, n in zip(together, share, strict=True)]


def permutation(count: int, seed: int, epoch: int) -> list[int]:
    """The positions 0 to `count` - 1 in the order of `epoch`."""
    generator = torch.Generator().manual_seed(mixed(seed, epoch))
    return torch.randperm(count, generator=generator).tolist()


def mixed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers, unlike for neighbours (the finaliser of SplitMix64, Steele et al. 2014,
    applied to each)."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 1


def _parts(bucket: list[int], size: int, world: int) -> list[list[int]]:
    """`bucket` in parts of `size`; the last one may be smaller, and repeats positions until `world` divides it."""
    parts = [bucket[start : start + size] for start in range(0, len(bucket), size)]
    last = parts[-1]
    parts[-1] = last + [bucket[index % len(bucket)] for index in range(-len(last) % world)]
    return parts
