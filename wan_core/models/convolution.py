"""Convolutions of the video autoencoder: PyTorch's, and on a CPU other kernels where they are faster.

Convolution weights are channels-last (`WanVAE.use_channels_last`). Libraries rearrange them in every call, which costs
more than the convolution itself where a layer has many weights and few pixels, and for some dtypes they only have a
plain loop. A product of matrices needs neither: a pixel's neighbourhood is a row, and the weights are a matrix as they
lie in memory.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Operation
from .ops import may_overwrite, onednn_has

FEW_PIXELS = 2048
"""Pixels of a result up to which a product of matrices is tried: beyond, oneDNN was faster at all widths."""

PIECE = 2**22
"""Elements of neighbourhoods that are multiplied at a time, which bounds their memory."""

WEIGHT_PIECE = 2**21
"""Weights that are converted to float32 at a time."""


def conv3d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The convolution of x (B, C, T, H, W) by a weight (O, C, t, h, w)."""
    if _only_a_loop(x, weight):
        return _matrices(x, weight, bias, padding, stride)
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and onednn_has(torch.float32):
        if not may_overwrite(x, weight):
            return _conv3d_onednn(x, weight, bias, padding, stride)
        operation = _FEW_3D if _pixels(x, stride) <= FEW_PIXELS else _MANY_3D
        return operation(x, weight, bias, padding, stride, sizes=(*x.shape, *weight.shape))
    return _conv3d_pytorch(x, weight, bias, padding, stride)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """The convolution of frames (N, C, H, W) by a weight (O, C, h, w)."""
    if _only_a_loop(x, weight):
        return _frames_by_matrices(x, weight, bias, padding, stride)
    few = x.device.type == "cpu" and _pixels(x, stride) <= FEW_PIXELS
    if few and x.dtype == weight.dtype == torch.float32 and may_overwrite(x, weight):
        return _FEW_2D(x, weight, bias, padding, stride, sizes=(*x.shape, *weight.shape))
    return _conv2d_pytorch(x, weight, bias, padding, stride)


def enlarge(x: Tensor, conv: nn.Conv2d, kept: dict[nn.Module, Tensor]) -> Tensor:
    """Frames (N, C, H, W) enlarged twice to the nearest pixel, then convolved by `conv`, which has 3 x 3 taps; what is
    computed from its weight stays in `kept` for later calls.
    """
    if _only_a_loop(x, conv.weight):
        return _enlarge_steps(x, conv, kept)
    if x.device.type != "cpu" or not may_overwrite(x, conv.weight):
        # The two steps would hold the enlarged frames, which the memory plan of a card does not count.
        return _enlarge_transposed(x, conv, kept)
    return _ENLARGE(x, conv, kept, sizes=(*x.shape, len(conv.weight)))


def _enlarge_steps(x: Tensor, conv: nn.Conv2d, kept: dict[nn.Module, Tensor]) -> Tensor:
    return conv2d(F.interpolate(x, scale_factor=2, mode="nearest-exact"), conv.weight, conv.bias, (1, 1), (1, 1))


def _enlarge_transposed(x: Tensor, conv: nn.Conv2d, kept: dict[nn.Module, Tensor]) -> Tensor:
    """Both steps as one transposed convolution, which reads each pixel once instead of four times.

    Its 4 x 4 kernel holds, for each output pixel, the sum of the taps of the 3 x 3 kernel that read the same source
    pixel.
    """
    if conv not in kept:
        taps = conv.weight.float().permute(1, 2, 3, 0).contiguous()  # (C, 3, 3, O)
        for axis in (1, 2):
            third, second, first = taps.unbind(axis)  # a transposed convolution reads its kernel backwards
            taps = torch.stack((first, first + second, second + third, third), axis)
        kept[conv] = taps.to(conv.weight.dtype).movedim(-1, 1)
    return F.conv_transpose2d(x, kept[conv], conv.bias, stride=2, padding=1)


def _only_a_loop(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch computes this on a CPU without vector units: in 16 bits, where oneDNN does not have them."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype
        and x.dtype in (torch.bfloat16, torch.float16)
        and not onednn_has(x.dtype)
        and may_overwrite(x, weight)
        and not torch.is_autocast_enabled("cpu")
    )


def _pixels(x: Tensor, stride: tuple[int, ...]) -> int:
    return x.numel() // (x.shape[1] * torch.Size(stride).numel())


def _conv3d_onednn(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return torch.mkldnn_convolution(x, weight, bias, padding, stride, (1, 1, 1), 1)


def _conv3d_pytorch(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return F.conv3d(x, weight, bias, stride, padding)


def _conv2d_pytorch(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return F.conv2d(x, weight, bias, stride, padding)


def _frames_by_matrices(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return _matrices(x[:, :, None], weight[:, :, None], bias, (0, *padding), (1, *stride))[:, :, 0]


def _matrices(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    """A convolution without padding in time, as products of neighbourhoods and weights in float32."""
    channels, kernel = weight.shape[0], weight.shape[2:]
    matrix = weight.movedim(1, -1).flatten(1)  # (O, t * h * w * C): a view of weights that are channels-last
    bias = None if bias is None else bias.float()
    padded = F.pad(x.movedim(1, -1), (0, 0, padding[2], padding[2], padding[1], padding[1])).contiguous()
    windows = padded
    for axis, (length, step) in enumerate(zip(kernel, stride, strict=True), start=1):
        windows = windows.unfold(axis, length, step)
    # (B, T', H', W', C, t, h, w), a view of `padded`, as rows of pixels: (B * T' * H', W', t, h, w, C)
    windows = windows.movedim(4, -1)
    out = x.new_empty((*windows.shape[:4], channels))
    size, (_, height, width) = matrix.shape[1], windows.shape[1:4]
    frames, rows = max(1, PIECE // (height * width * size)), max(1, PIECE // (width * size))
    outputs = channels if x.dtype == torch.float32 else max(1, WEIGHT_PIECE // size)
    for video, result in zip(windows, out, strict=True):
        for group, target in zip(video.split(frames), result.split(frames), strict=True):
            for piece, part in zip(group.split(rows, 1), target.split(rows, 1), strict=True):
                pixels = piece.reshape(-1, size).float()
                for start in range(0, channels, outputs):
                    some = slice(start, start + outputs)
                    product = F.linear(pixels, matrix[some].float(), None if bias is None else bias[some])
                    part[..., some] = product.view(*part.shape[:3], -1)
    return out.movedim(-1, 1)


_FEW_3D = Operation(
    "conv3d of few pixels", {"oneDNN": _conv3d_onednn, "PyTorch": _conv3d_pytorch, "matrices": _matrices}
)
_FEW_2D = Operation("conv2d of few pixels", {"PyTorch": _conv2d_pytorch, "matrices": _frames_by_matrices})
_MANY_3D = Operation("conv3d", {"oneDNN": _conv3d_onednn, "PyTorch": _conv3d_pytorch})
_ENLARGE = Operation("enlarge", {"transposed": _enlarge_transposed, "steps": _enlarge_steps})
