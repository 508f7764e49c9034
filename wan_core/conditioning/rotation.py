"""Rotations between given ones."""

import torch
from torch import Tensor


def slerp(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """Rotation matrices (N, 3, 3) at `weight` (N,) of the way from `first` to `second`, along the shorter arc.

    What is not quite orthonormal counts as the nearest rotation.
    """
    start, end = _quaternions(first), _quaternions(second)
    cosine = (start * end).sum(-1, keepdim=True)
    end = torch.where(cosine < 0, -end, end)
    angle = cosine.abs().clamp(max=1).acos()
    weight = weight[:, None]
    # sin(w a) / sin(a) tends to w as the angle vanishes.
    near = angle < 1e-6
    sine = torch.where(near, 1, angle.sin())
    kept = torch.where(near, 1 - weight, ((1 - weight) * angle).sin() / sine)
    added = torch.where(near, weight, (weight * angle).sin() / sine)
    return _matrices(kept * start + added * end)


def _quaternions(rotations: Tensor) -> Tensor:
    """Unit quaternions (N, 4), real part first.

    For a rotation with the quaternion q, the matrix 4 q qᵀ - 1 is linear in the rotation's entries, and q is its
    eigenvector with the largest eigenvalue (Bar-Itzhack 2000); no angle is a special case.
    """
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotations.permute(1, 2, 0)
    rows = (
        (xx + yy + zz, zy - yz, xz - zx, yx - xy),
        (zy - yz, xx - yy - zz, xy + yx, zx + xz),
        (xz - zx, xy + yx, yy - xx - zz, yz + zy),
        (yx - xy, zx + xz, yz + zy, zz - xx - yy),
    )
    symmetric = torch.stack([torch.stack(row, -1) for row in rows], -2)
    return torch.linalg.eigh(symmetric).eigenvectors[..., -1]


def _matrices(quaternions: Tensor) -> Tensor:
    w, x, y, z = torch.nn.functional.normalize(quaternions, dim=-1).unbind(-1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, -1) for row in rows], -2)
