"""One picture in strips of rows, one on each rank: convolutions read a row of each neighbour, so that the result is
that of the whole picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import spans
from .mesh import Mesh


@dataclass(frozen=True, eq=False)
class Strip:
    """The rows of one rank. `sizes` are the latent rows of each; a tensor may have any multiple of them, on its last
    axis but one.
    """

    mesh: Mesh
    sizes: tuple[int, ...]

    @property
    def place(self) -> slice:
        """Where its latent rows are in the picture."""
        return spans(self.sizes)[self.mesh.place]

    def _scaled(self, rows: int) -> list[int]:
        """The rows of each rank's tensor where this one's has so many."""
        factor = rows // self.sizes[self.mesh.place]
        return [size * factor for size in self.sizes]

    def extended(self, x: Tensor) -> Tensor:
        """x (..., rows, columns) between the nearest row of the strip above and that of the one below; zeros beyond the
        picture.
        """
        place, last = self.mesh.place, len(self.sizes) - 1
        edges = {place - 1: x[..., :1, :], place + 1: x[..., -1:, :]}
        edges = {rank: row for rank, row in edges.items() if 0 <= rank <= last}
        sizes = [edges[rank].numel() if rank in edges else 0 for rank in range(last + 1)]
        send = torch.cat([edges[rank].flatten() for rank in sorted(edges)]) if edges else x.new_empty(0)
        found = self.mesh.swapped(send, sizes, sizes, "rows").split([size for size in sizes if size])
        rows = dict(zip(sorted(edges), found, strict=True))
        layout = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
        shape = (*x.shape[:-2], x.shape[-2] + 2, x.shape[-1])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        out[..., 1:-1, :] = x
        for rank, target in ((place - 1, out[..., :1, :]), (place + 1, out[..., -1:, :])):
            target.copy_(rows[rank].view_as(target)) if rank in rows else target.zero_()
        return out

    def all_pixels(self, pixels: Tensor, columns: int) -> Tensor:
        """The pixels (N, rows * columns, C) of the whole picture."""
        rows = self._scaled(pixels.shape[1] // columns)
        return self.mesh.gathered(pixels, [size * columns for size in rows], "frames")

    def own_pixels(self, pixels: Tensor, columns: int, rows: int) -> Tensor:
        """Its `rows` of pixels (N, all rows * columns, C)."""
        return pixels.split([size * columns for size in self._scaled(rows)], 1)[self.mesh.place]

    def at_first(self, x: Tensor) -> Tensor | None:
        """The whole picture (..., rows, columns) at the first rank; None at the others."""
        rows, mesh = self._scaled(x.shape[-2]), self.mesh
        moved = x.movedim(-2, 0).contiguous()
        each = moved[0].numel()
        leads = mesh.place == 0
        sizes = [moved.numel(), *(0 for _ in rows[1:])]
        found = mesh.swapped(moved.flatten(), sizes, [size * each if leads else 0 for size in rows], "pixels")
        return found.view(sum(rows), *moved.shape[1:]).movedim(0, -2) if leads else None
