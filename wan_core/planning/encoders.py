"""Memory of encoding and decoding, the tiles and placements that keep it within a budget, and a user's limit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..media.fitting import SIZE_RULES, SizeRule, size_by_rule
from ..models.config import Geometry, PreviewDecoderConfig, TextEncoderConfig, VAEConfig
from ..models.ops import on_meta
from ..models.preview_decoder import PreviewDecoder
from ..models.text_encoder import UMT5Encoder
from ..models.vae import WanVAE
from ..offload.blocks import installed_ram, used_bytes
from ..offload.streaming import place
from ..offload.weights import WeightProvider
from ..runtime import GIB, OutOfMemoryError, Runtime, gigabytes
from ..settings import MemorySettings, check_choice
from ..tiling import TileSettings
from ..types import LatentSize, VideoSize
from .estimate import count_bytes


@cache
def text_peak_bytes(config: TextEncoderConfig, dtype: torch.dtype, tokens: int = 512, prompts: int = 2) -> int:
    """Peak bytes on the device of encoding `prompts` texts of `tokens` tokens each, beside the weights.

    Attention is counted as fused kernels run it.
    """
    with on_meta():
        # All layers are alike, and memory does not grow after the second.
        encoder = UMT5Encoder(replace(config, num_layers=min(config.num_layers, 2))).requires_grad_(False).to(dtype)
        ids, mask = torch.empty(prompts, tokens, dtype=torch.long), torch.empty(prompts, tokens, dtype=torch.bool)
    with count_bytes(*encoder.parameters(), ids, mask) as counter:
        encoder.encode([row for row in ids])
    return counter.peak


VaePass = Literal["decode", "encode"]

DecoderConfig = VAEConfig | PreviewDecoderConfig
"""Of what decodes: a VAE, or the tiny autoencoder in its place."""

WORKSPACE_BYTES = 256 * 2**20
"""Allowance beside the counted tensors, of any size: cuBLAS keeps up to 32 MiB for itself, cuDNN's implicit-GEMM
convolutions of channels-last tensors ask for some tens, and the caching allocator rounds blocks of this size up to
2 MiB. It is not measured; where it is too little, `decode` falls back to smaller tiles.
"""

STEADY_FRAMES = 3
"""Latent frames after which the peak is reached: the first meets no past, the second leaves half-filled caches, and
from the third on each is like the one before.
"""

OVERLAP = 8
"""Latent cells that neighbouring tiles share at least. A tile is wrong as far as the padding at its edge reaches: 11
convolutions at latent resolution and two cells' worth at the finer ones. Most of the error is in the outermost cells,
which blending weights least. ComfyUI's tiled decoder shares as many.
"""

LEAST_STRIP = 3 * OVERLAP
"""Fewest rows of a strip: below it more than half of the rows would be computed twice, and tiles cost less."""

LEAST_TILE = 2 * OVERLAP
"""Fewest cells of a tile's side: below it every cell is in an overlap."""

_SAMPLE_SIDE = 32
"""Cells of the square on which memory per cell is counted."""


def vae_peak_bytes(
    config: DecoderConfig,
    dtype: torch.dtype,
    size: LatentSize,
    tiles: TileSettings | None = None,
    what: VaePass = "decode",
    batch: int = 1,
) -> int:
    """Peak bytes on the device of one pass over `batch` videos, beside the weights.

    The video itself stays in host memory, where the pieces are gathered (`wan_core.decode`). Attention is counted as
    fused kernels run it.
    """
    height, width = size.height, size.width
    if tiles is not None:
        height, width = min(height, tiles.size[0]), min(width, tiles.size[1])
    # Every tensor of a pass grows with the area, so memory per cell is counted once.
    per_cell = _bytes_per_cell(config, dtype, min(size.frames, STEADY_FRAMES), what)
    return int(per_cell * height * width * batch) + WORKSPACE_BYTES


@cache
def _bytes_per_cell(config: DecoderConfig, dtype: torch.dtype, frames: int, what: VaePass) -> float:
    size = LatentSize(frames, _SAMPLE_SIDE, _SAMPLE_SIDE, config.geometry)
    return count_vae_bytes(config, dtype, size, what) / _SAMPLE_SIDE**2


def count_vae_bytes(config: DecoderConfig, dtype: torch.dtype, size: LatentSize, what: VaePass) -> int:
    """Peak bytes of the tensors of one untiled pass, by running it on the meta device."""
    frames, height, width = size.shape
    geometry = config.geometry
    stride = geometry.spatial_stride
    with on_meta():
        vae: Any = (
            PreviewDecoder(config) if isinstance(config, PreviewDecoderConfig) else WanVAE(config).use_channels_last()
        )
        vae.requires_grad_(False).to(dtype)
        latents = torch.empty(1, config.latent_channels, frames, height, width)
        video = torch.empty(1, 3, geometry.video_frames(frames), stride * height, stride * width)
    passes: dict[VaePass, Callable[[], Iterator[Tensor]]] = {
        "decode": lambda: vae.decode_chunks(latents),
        "encode": lambda: vae.encode_chunks(video),
    }
    with count_bytes(*vae.parameters(), latents, video) as counter:
        for _ in passes[what]():
            pass
    return counter.peak


def choose_tiles(
    config: DecoderConfig,
    dtype: torch.dtype,
    size: LatentSize,
    budget_bytes: float,
    what: VaePass = "decode",
    batch: int = 1,
) -> TileSettings | None:
    """The cheapest way to run a pass within `budget_bytes` beside the weights.

    None, the whole at once, where it fits; else the strips of full width or tiles that compute the least area twice.

    Raises:
        OutOfMemoryError: the smallest tiles need more; the message says how much. It is a ValueError.
    """

    def fits(tiles: TileSettings | None) -> bool:
        return vae_peak_bytes(config, dtype, size, tiles, what, batch) <= budget_bytes

    if fits(None):
        return None
    strips = [_grid(size, parts, 1) for parts in _parts(size.height, LEAST_STRIP)]
    grids = [_grid(size, rows, columns) for rows in (1, *_parts(size.height)) for columns in (1, *_parts(size.width))]
    fitting = [tiles for tiles in (*strips, *grids) if fits(tiles)]
    if fitting:
        # `min` takes the first of equals: strips, whose seams run in one direction only.
        return min(fitting, key=lambda tiles: computed_cells(tiles, size))
    needed = vae_peak_bytes(config, dtype, size, smallest_tiles(size), what, batch)
    side = config.pixel_stride(what)
    raise OutOfMemoryError(
        f"To {what} {size.width * side}x{size.height * side} even in the smallest tiles takes "
        f"{gigabytes(needed, 2)} beside the VAE's weights; the budget is {gigabytes(budget_bytes, 2)}, "
        f"{gigabytes(needed - budget_bytes, 2)} short."
    )


def smallest_tiles(size: LatentSize) -> TileSettings:
    """The tiles of a latent of that size which take the least memory."""
    last = (([1, *_parts(side)])[-1] for side in (size.height, size.width))
    return _grid(size, *last)


def computed_cells(tiles: TileSettings | None, size: LatentSize) -> int:
    """How many cells of one latent frame are computed; those in overlaps count once per tile."""
    if tiles is None:
        return size.height * size.width
    return sum(row.length * column.length for row, column in tiles.plan(size.height, size.width))


def _parts(length: int, least: int = LEAST_TILE) -> list[int]:
    """The numbers of parts, each of at least `least` cells, that an axis can be cut into; empty if it is too short."""
    counts: list[int] = []
    while _part(length, len(counts) + 2) >= least:
        counts.append(len(counts) + 2)
    return counts


def _part(length: int, parts: int) -> int:
    """The length of one of `parts` equal spans that share `OVERLAP` cells with their neighbours."""
    return -(-(length + (parts - 1) * OVERLAP) // parts)


def _grid(size: LatentSize, rows: int, columns: int) -> TileSettings:
    sides = _part(size.height, rows), _part(size.width, columns)
    row, column = (side - (OVERLAP if parts > 1 else 0) for side, parts in zip(sides, (rows, columns), strict=True))
    return TileSettings(size=sides, stride=(row, column))


IMAGE_ENCODER_BYTES = 64 * 2**20
"""Activations of CLIP ViT-H/14 for one picture of 257 tokens: its widest tensor, 257 x 5120, is 5 MiB in float32."""


def checked_size(
    width: int,
    height: int,
    num_frames: int,
    geometry: Geometry,
    rule: SizeRule = "exact",
    start_image: Tensor | None = None,
) -> VideoSize:
    """`VideoSize.rounded`, for a video that fits into the memory of this machine at one byte per colour.

    Args:
        rule: how the first frame `start_image` (T, H, W, C), if there is one, decides the sides (`size_by_rule`); the
            area is that of the typed sides, before they are rounded.

    Raises:
        ValueError: it does not fit, there is no such rule, or `VideoSize.rounded` refuses a number.
    """
    check_choice("size_rule", rule, SIZE_RULES)
    size = VideoSize.rounded(width, height, num_frames, geometry)
    if start_image is not None and rule != "exact":
        picture = (start_image.shape[2], start_image.shape[1])
        sides = size_by_rule(rule, int(width), int(height), picture, geometry.side_multiple)
        size = replace(size, width=sides[0], height=sides[1])
    held, memory = 3 * size.width * size.height * size.num_frames, installed_ram()
    if held > memory:
        raise ValueError(
            f"A video of width {size.width}, height {size.height} and num_frames {size.num_frames} has "
            f"{gigabytes(held, 0)}; this machine has {gigabytes(memory, 0)} of memory. Choose a smaller size or fewer "
            "frames."
        )
    return size


def strip_of(size: LatentSize, ranks: int) -> LatentSize:
    """The largest strip of latents that one of so many ranks decodes, with a row of each neighbour."""
    return replace(size, height=min(size.height, -(-size.height // ranks) + 2))


def limit_memory(runtime: Runtime, memory: MemorySettings) -> Runtime:
    """`runtime` on a device of which `memory.vram_limit` may be in use. 0 limits weights alone, see `memory_for`."""
    if not memory.vram_limit:
        return runtime
    limit = memory.vram_limit * GIB

    def left(device: torch.device) -> float:
        below_limit = limit - used_bytes(device)
        free = runtime.memory_left(device)
        return below_limit if free is None else min(free, below_limit)

    return replace(runtime, memory_left=left)


def memory_for(module: nn.Module, runtime: Runtime, memory: MemorySettings, wanted: float) -> float | None:
    """Bytes that work with `module` may use on the device; the host is asked to free some when `wanted` are more.

    Weights of the module that are on the device count as available. None without a limit.
    """
    if memory.vram_limit == 0:
        return 0
    own = WeightProvider.of(module).bytes_on(runtime.device)
    left = runtime.request_memory(wanted - own)
    return None if left is None else left + own


@contextmanager
def working_encoder(
    module: nn.Module, runtime: Runtime, memory: MemorySettings, activations: int, *, keep: bool = False
) -> Iterator[nn.Module]:
    """An encoder or VAE on the device inside the block; blocks that do not fit there are streamed.

    Args:
        activations: peak bytes of a pass beside the weights.
        keep: leave the weights on the device for the next use.
    """
    inventory, beside = WeightProvider.of(module).inventory(), activations + WORKSPACE_BYTES
    bound = memory_for(module, limit_memory(runtime, memory), memory, inventory.bytes + beside)
    placement = place(inventory, None if bound is None else bound - beside)
    with WeightProvider.of(module).working(runtime.device, placement, keep=keep):
        yield module
