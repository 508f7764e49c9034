"""Packed numbers: how the types of GGUF files put a few numbers and their scales into one block of bytes.

The layouts are those of ggml (`ggml-common.h`). All numbers are little-endian, "half" is a float16. Values are computed
in float32 in the order of the formulas below, so they are bit for bit what ggml's reference and `gguf.quants` give.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""What the 4 bits of IQ4_NL and IQ4_XS stand for (`kvalues_iq4nl` of ggml)."""


@dataclass(frozen=True)
class Packing:
    """One way to pack numbers.

    Attributes:
        name: of the GGUF type, such as "Q4_K".
        numbers: in a block; a row consists of whole blocks.
        nbytes: of a block.
        unpack: from blocks (n, nbytes) as uint8 to their numbers (n, numbers) in float32.
    """

    name: str
    numbers: int
    nbytes: int
    unpack: Callable[[Tensor], Tensor]


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, (n, 1) in float32."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """(..., k) bytes to (..., 2k) numbers of 4 bits: all low halves, then all high ones."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _layers(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The numbers of `bits` bits in each byte from the lowest up, along a new axis `dim`."""
    return torch.stack([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], dim)


def _scaled(numbers: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """`numbers` (n, groups, k) times `scale` less `offset`, each (n, groups) in float32, as (n, groups * k)."""
    values = numbers.float().mul_(scale[..., None])
    return (values if offset is None else values.sub_(offset[..., None])).flatten(1)


def _q4_0(blocks: Tensor) -> Tensor:
    """half d, 16 bytes of nibbles: d * (q - 8)."""
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    """half d, half m, 16 bytes of nibbles: d * q + m."""
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _fives(high: Tensor, low: Tensor) -> Tensor:
    """Numbers of 5 bits: the fifth one in the 32 bits of `high`, the others the nibbles of `low`."""
    return _nibbles(low) | _layers(high, 1, -1).flatten(1) << 4


def _q5_0(blocks: Tensor) -> Tensor:
    """half d, 32 fifth bits, 16 bytes of nibbles: d * (q - 16)."""
    return _fives(blocks[:, 2:6], blocks[:, 6:]).float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    """half d, half m, 32 fifth bits, 16 bytes of nibbles: d * q + m."""
    return _fives(blocks[:, 4:8], blocks[:, 8:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    """half d, 32 signed bytes: d * q."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    """16 bytes of a scale and a minimum, 64 bytes of 2 bits, half d, half dmin: d * scale * q - dmin * minimum.

    A byte of each half of 32 bytes holds numbers that are 32 apart; 16 neighbours share a scale.
    """
    scales = blocks[:, :16]
    numbers = _layers(blocks[:, 16:80].unflatten(1, (2, 32)), 2, 2).view(-1, 16, 16)
    scale, offset = (scales & 15).float() * _half(blocks, 80), (scales >> 4).float() * _half(blocks, 82)
    return _scaled(numbers, scale, offset)


def _q3_k(blocks: Tensor) -> Tensor:
    """32 bytes of third bits, 64 bytes of 2 bits as in Q2_K, 12 bytes of scales, half d: d * (scale - 32) * (q - 4).

    Of the 16 scales of 6 bits the low 4 lie in 8 bytes of nibbles and the high 2 in the other 4 bytes.
    """
    low = _layers(blocks[:, 32:96].unflatten(1, (2, 32)), 2, 2).view(-1, 16, 16)
    high = _layers(blocks[:, :32], 1, 1).view(-1, 16, 16)
    scales = _nibbles(blocks[:, 96:104]) | _layers(blocks[:, 104:108], 2, 1).flatten(1) << 4
    numbers = (low | high << 2).float().sub_(4)
    return _scaled(numbers, scales.float().sub_(32).mul_(_half(blocks, 108)))


def _sixes(packed: Tensor) -> tuple[Tensor, Tensor]:
    """8 scales and 8 minima of 6 bits from the 12 bytes of Q4_K and Q5_K.

    The first four of each are the low bits of bytes 0-3 and 4-7. Of the others the low 4 bits are in bytes 8-11, and
    the high 2 in what is left of bytes 0-3 and 4-7.
    """
    scales, minima, rest = packed.split(4, 1)
    return (
        torch.cat([scales & 63, (rest & 15) | (scales >> 6) << 4], 1),
        torch.cat([minima & 63, (rest >> 4) | (minima >> 6) << 4], 1),
    )


def _q4_k(blocks: Tensor) -> Tensor:
    """half d, half dmin, 12 bytes of scales and minima, 128 bytes of nibbles: d * scale * q - dmin * minimum.

    The nibbles of 32 bytes are 64 neighbours, 32 of which share a scale.
    """
    scale, minimum = _sixes(blocks[:, 4:16])
    numbers = _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32)
    return _scaled(numbers, scale.float() * _half(blocks, 0), minimum.float() * _half(blocks, 2))


def _q5_k(blocks: Tensor) -> Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles; bit i of a byte belongs to the group i of 32."""
    scale, minimum = _sixes(blocks[:, 4:16])
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    numbers = low | _layers(blocks[:, 16:48], 1, 1) << 4
    return _scaled(numbers, scale.float() * _half(blocks, 0), minimum.float() * _half(blocks, 2))


def _q6_k(blocks: Tensor) -> Tensor:
    """128 bytes of nibbles, 64 of fifth and sixth bits, 16 signed scales, half d: d * scale * (q - 32).

    Each half of the numbers has 64 bytes of nibbles, and 32 bytes of high bits as in Q2_K; 16 neighbours share a scale.
    """
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64)))
    high = _layers(blocks[:, 128:192].unflatten(1, (2, 32)), 2, 2).flatten(2)
    numbers = (low | high << 4).view(-1, 16, 16).float().sub_(32)
    return _scaled(numbers, blocks[:, 192:208].view(torch.int8).float() * _half(blocks, 208))


@cache
def _iq4_values(device: torch.device) -> Tensor:
    # Kept between runs, so it must not be made in a host's inference mode.
    with torch.inference_mode(False):
        return torch.tensor(IQ4_VALUES, dtype=torch.float32, device=device)


def _looked_up(nibbles: Tensor) -> Tensor:
    values = _iq4_values(nibbles.device).index_select(0, nibbles.flatten().int())
    return values.view(nibbles.shape)


def _iq4_nl(blocks: Tensor) -> Tensor:
    """half d, 16 bytes of nibbles: d * value(q), with 16 values at uneven distances."""
    return _looked_up(_nibbles(blocks[:, 2:])).mul_(_half(blocks, 0))


def _iq4_xs(blocks: Tensor) -> Tensor:
    """half d, 2 bytes of high bits and 4 bytes of nibbles of the scales, 128 bytes: d * (scale - 32) * value(q).

    16 bytes of nibbles are 32 neighbours, which share a scale of 6 bits.
    """
    high = _layers(blocks[:, 2:4], 2, -1).flatten(1)
    scales = (_layers(blocks[:, 4:8], 4, -1).flatten(1) | high << 4).float().sub_(32).mul_(_half(blocks, 0))
    return _scaled(_looked_up(_nibbles(blocks[:, 8:].unflatten(1, (8, 16)))), scales)


PACKINGS: Mapping[str, Packing] = {
    packing.name: packing
    for packing in (
        Packing("Q4_0", 32, 18, _q4_0),
        Packing("Q4_1", 32, 20, _q4_1),
        Packing("Q5_0", 32, 22, _q5_0),
        Packing("Q5_1", 32, 24, _q5_1),
        Packing("Q8_0", 32, 34, _q8_0),
        Packing("Q2_K", 256, 84, _q2_k),
        Packing("Q3_K", 256, 110, _q3_k),
        Packing("Q4_K", 256, 144, _q4_k),
        Packing("Q5_K", 256, 176, _q5_k),
        Packing("Q6_K", 256, 210, _q6_k),
        Packing("IQ4_NL", 32, 18, _iq4_nl),
        Packing("IQ4_XS", 256, 136, _iq4_xs),
    )
}
"""The packings that are read, by the name of the GGUF type."""
