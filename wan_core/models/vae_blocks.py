"""Building blocks of the causal video autoencoder.

Tensors are (B, C, T, H, W) in channels-last memory: channel norms then read contiguous rows, convolutions run without
layout changes, and frames (B * T, C, H, W) are a view. Time is streamed: each convolution keeps its last input frames
in a `FeatureCache`. Attribute names are the published keys (Wan-Video/Wan2.1 wan/modules/vae.py).
"""

from collections.abc import Iterable
from itertools import chain, islice

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..parallel.strips import Strip
from .convolution import conv2d, conv3d, enlarge
from .ops import has_fused_rms_norm, may_overwrite, rms_norm


class FeatureCache(dict[nn.Module, Tensor]):
    """The state of one pass over one video: the last input frames of each causal convolution, and the summed kernels of
    `enlarge`.

    Attributes:
        strip: the rows that this rank computes, where several share the picture.
    """

    strip: Strip | None = None


PIECE = {"cpu": 2**18, "meta": 2**18}
"""Elements that are normalised at a time. On a CPU their float32 copies stay in its cache, which is several times as
fast as large tensors at once; elsewhere `LARGEST_PIECE` only bounds the copies' memory, below the allowance beside what
is counted on "meta".
"""

LARGEST_PIECE = 2**23


def to_frames(x: Tensor) -> Tensor:
    """(B, C, T, H, W) as (B * T, C, H, W)."""
    return rearrange(x, "b c t h w -> (b t) c h w")


def from_frames(frames: Tensor, batch: int) -> Tensor:
    """(B * T, C, H, W) as (B, C, T, H, W)."""
    return rearrange(frames, "(b t) c h w -> b c t h w", b=batch)


class ChannelNorm(nn.Module):
    """RMS norm over channels, `x / |x| * sqrt(C) * gamma`; `dims` is the number of axes behind the channels."""

    EPS = 1e-24
    """The square of the official code's lower bound of the norm, 1e-12. It only keeps all-zero pixels from becoming
    NaN.
    """

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *(1,) * dims))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.movedim(1, -1), self.gamma.flatten(), self.EPS).movedim(-1, 1)

    def activate(self, x: Tensor, out: Tensor) -> None:
        """Write `silu(norm(x))` of x (B, C, T, H, W) into `out`, which may be a part of a larger tensor."""
        batch, channels, frames = x.shape[:3]
        size = max(1, PIECE.get(x.device.type, LARGEST_PIECE) // (batch * channels * frames))
        pieces = (tensor.movedim(1, -1).flatten(2, 3).split(size, 2) for tensor in (x, out))
        for piece, target in zip(*pieces, strict=True):
            if has_fused_rms_norm(x):
                normed = rms_norm(piece, self.gamma.flatten(), self.EPS)
                torch.ops.aten.silu.out(normed, out=target)
            else:
                # In float32, and in fewer passes than `F.rms_norm`, which is not one kernel here.
                length = torch.linalg.vector_norm(piece, dim=-1, keepdim=True, dtype=torch.float32)
                gain = self.gamma.flatten().float() * channels**0.5
                target.copy_(F.silu((piece / length.clamp_(min=self.EPS**0.5)).mul_(gain), inplace=True))
                if x.is_meta:
                    return  # Each piece takes as much memory as the first, and counting them all takes seconds.


class CausalConv3d(nn.Conv3d):
    """A convolution that reads the frames before its input and none after it; before the first frame of a video are
    zeros.
    """

    padding: tuple[int, int, int]

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], stride: int = 1) -> None:
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(in_channels, out_channels, kernel, (stride, 1, 1), padding)
        self.reach = kernel[0] - 1

    def forward(  # type: ignore[override]  # it is called with the cache of its pass, and never as a Conv3d
        self, x: Tensor, cache: FeatureCache, norm: ChannelNorm | None = None
    ) -> Tensor:
        """The convolution of `x`, or with a norm of `silu(norm(x))`."""
        return self.convolve(self.joined(x, cache, norm), cache.strip)

    def joined(self, x: Tensor, cache: FeatureCache, norm: ChannelNorm | None = None) -> Tensor:
        """`x`, or `silu(norm(x))`, behind the frames before it. The last frames of the result are left in `cache`.

        A first frame that comes alone gets no zeros in front: `convolve` applies only the kernel's last time slice to
        it.
        """
        past = cache.get(self)
        if not self.reach:
            return x
        if past is None and x.shape[2] == 1:
            cache[self] = x if norm is None else silu_(norm(x))
            return cache[self]
        missing = self.reach - (0 if past is None else past.shape[2])  # frames of zeros
        if not may_overwrite(x, *self.parameters()):
            zeros = x.new_zeros(()).expand(*x.shape[:2], missing, *x.shape[3:])
            new = x if norm is None else silu_(norm(x))
            joined = torch.cat((zeros, new) if past is None else (zeros, past, new), 2)
            cache[self] = joined[:, :, -self.reach :]
            return joined.contiguous(memory_format=torch.channels_last_3d)
        # Zeros, past and new frames are written into one tensor: `torch.cat` would need the new ones twice.
        shape = (*x.shape[:2], self.reach + x.shape[2], *x.shape[3:])
        joined = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
        joined[:, :, :missing].zero_()
        if past is not None:
            joined[:, :, missing : self.reach] = past
        new = joined[:, :, self.reach :]
        new.copy_(x) if norm is None else norm.activate(x, new)
        if missing:
            cache[self] = joined[:, :, -self.reach :].clone()  # a view would keep all of `joined`
        elif past is not None:
            past.copy_(joined[:, :, -self.reach :])
        return joined

    def convolve(self, joined: Tensor, strip: Strip | None = None) -> Tensor:
        """The convolution of a tensor that `joined` returned, of all rows or of those of a strip."""
        assert not isinstance(self.padding, str)
        padding = self.padding
        if strip is not None and padding[1]:
            joined, padding = strip.extended(joined), (0, 0, padding[2])
        if joined.shape[2] >= self.kernel_size[0]:
            return conv3d(joined, self.weight, self.bias, padding, self.stride)
        first = conv2d(joined[:, :, 0], self.weight[:, :, -1], self.bias, padding[1:], self.stride[1:])
        return first.unsqueeze(2)


class ResidualBlock(nn.Module):
    """Two causal 3 x 3 x 3 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(in_channels, 3),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels, (3, 3, 3)),
            ChannelNorm(out_channels, 3),
            nn.SiLU(),
            nn.Identity(),
            CausalConv3d(out_channels, out_channels, (3, 3, 3)),
        )
        self.shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1)) if in_channels != out_channels else None

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        hidden = conv1(x, cache, norm1)
        assert isinstance(norm2, ChannelNorm) and isinstance(conv2, CausalConv3d)
        # Two calls instead of one, so that `hidden` is freed before the result is allocated.
        joined = conv2.joined(hidden, cache, norm2)
        del hidden
        out = conv2.convolve(joined, cache.strip)
        del joined
        shortcut = x if self.shortcut is None else self.shortcut(x, cache)
        return out.add_(shortcut) if may_overwrite(out, shortcut) else out + shortcut


class SpatialAttention(nn.Module):
    """Single-head attention among the pixels of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        frames, strip = to_frames(x), cache.strip
        pixels = rearrange(self.norm(frames), "n c h w -> n (h w) c")
        if strip is not None:
            pixels = strip.all_pixels(pixels, x.shape[4])
        qkv = F.linear(pixels, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1)  # (B * T, H * W, C), one head
        if strip is not None:
            out = strip.own_pixels(out, x.shape[4], x.shape[3])
        out = F.linear(out, self.proj.weight.flatten(1), self.proj.bias)
        return x + rearrange(out, "(b t) (h w) c -> b c t h w", b=x.shape[0], h=x.shape[3])


class Downsample(nn.Module):
    """Half the height and width, then, with `temporal`, half the frames after the first one."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        if temporal:
            self.time_conv = CausalConv3d(channels, channels, (3, 1, 1), stride=2)
        self.temporal = temporal

    def forward(self, x: Tensor, cache: FeatureCache) -> Tensor:
        pad, conv = self.resample
        assert isinstance(conv, nn.Conv2d)
        x = from_frames(conv2d(pad(to_frames(x)), conv.weight, conv.bias, (0, 0), (2, 2)), x.shape[0])
        if not self.temporal:
            return x
        # The time convolution has a stride of 2 and reaches 3 frames: of the past it needs one. A first frame passes.
        past = cache.get(self)
        cache[self] = x[:, :, -1:].clone()
        if past is None:
            return x
        return conv3d(torch.cat((past, x), 2), self.time_conv.weight, self.time_conv.bias, (0, 0, 0), (2, 1, 1))


class Upsample(nn.Module):
    """With `temporal` two frames for each but the first, then twice the height and width."""

    def __init__(self, in_channels: int, out_channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        if temporal:
            self.time_conv = CausalConv3d(in_channels, 2 * in_channels, (3, 1, 1))
        self.temporal = temporal

    def forward(self, x: Tensor, cache: FeatureCache, shortcut: Tensor | None = None) -> Tensor:
        """`shortcut` (B, C', T, H, W) is added by `add_duplicated`."""
        if self.temporal:
            x = self._double_frames(x, cache)
        conv = self.resample[1]
        assert isinstance(conv, nn.Conv2d)
        frames, strip = to_frames(x), cache.strip
        if strip is None:
            frames = enlarge(frames, conv, cache)
        else:  # what the rows of the neighbours become is theirs
            frames = enlarge(strip.extended(frames), conv, cache)[:, :, 2:-2]
        out = from_frames(frames, x.shape[0])
        return out if shortcut is None else add_duplicated(out, shortcut, 1 + self.temporal)

    def _double_frames(self, x: Tensor, cache: FeatureCache) -> Tensor:
        """The first frame of a video passes unchanged and is not cached: zeros stand before the second one."""
        if self not in cache:
            cache[self] = x.new_empty(0)
            return x
        pairs = rearrange(self.time_conv(x, cache), "b (pair c) t h w -> b c (t pair) h w", pair=2)
        return pairs.contiguous(memory_format=torch.channels_last_3d)


def averaged(x: Tensor, time: int, space: int) -> Tensor:
    """The shortcut of a level that shrinks: x (B, C, T, H, W) as (B, time * C, T / time, H / space, W / space).

    Each pixel is the mean of `space` x `space`; the `time` frames of a group become channels. Frames of zeros stand
    before a first frame that comes alone (Wan-Video/Wan2.2 wan/modules/vae2_2.py `AvgDown3D`).
    """
    small = from_frames(F.avg_pool2d(to_frames(x), space), x.shape[0]) if space > 1 else x
    missing = -x.shape[2] % time
    if missing:
        small = torch.cat((torch.zeros_like(small[:, :, :1]).expand(-1, -1, missing, -1, -1), small), 2)
    return rearrange(small, "b c (t time) h w -> b (c time) t h w", time=time)


def add_duplicated(out: Tensor, x: Tensor, time: int) -> Tensor:
    """`out` (B, C, T', H', W') plus the shortcut of a level that grows: each pixel of x (B, C', T, H, W), where C' is a
    multiple of C, repeated over its cell of `time` frames; in the memory of `out` where that is allowed.

    Several channels of x for one of `out` are spread over the cell: over its frames, then its rows, then its columns. A
    first frame that comes alone stays alone, and is the last of its cell (Wan-Video/Wan2.2 `DupUp3D`).
    """
    space, sources = out.shape[3] // x.shape[3], x.shape[1] // out.shape[1]
    spread = []
    for side in (time, space, space):
        spread.append(side if sources > 1 else 1)
        sources //= spread[-1]
    frames, rows, columns = spread
    parts = rearrange(x, "b (c f r q) t h w -> b c t f h r w q", f=frames, r=rows, q=columns)
    if out.shape[2] < time * x.shape[2]:
        parts, time = parts[:, :, :, -1:], 1
    total = out if may_overwrite(out, x) else out.clone()
    rearrange(total, "b c (t f) (h r) (w q) -> b c t f h r w q", f=time, r=space, q=space).add_(parts)
    return total


def silu_(x: Tensor) -> Tensor:
    return F.silu(x, inplace=may_overwrite(x))


def container(levels: list[list[nn.Module]], nested: str | None) -> nn.Module:
    """The layers of all resolutions as the published keys number them: in one row, or in a list called `nested` for
    each resolution.
    """
    if nested is None:
        return nn.Sequential(*chain(*levels))
    return _numbered([nn.ModuleDict({nested: _numbered(layers)}) for layers in levels])


def _numbered(modules: Iterable[nn.Module]) -> nn.ModuleDict:
    """Modules under numbers. A list would count as blocks to be streamed one by one, which a VAE is not made of."""
    return nn.ModuleDict({str(number): module for number, module in enumerate(modules)})


def levels_of(container: nn.Module, counts: list[int]) -> list[list[nn.Module]]:
    """The layers of each resolution; `counts` says how many each has."""
    if isinstance(container, nn.Sequential):
        layers = iter(container)
    else:
        layers = chain.from_iterable(next(level.children()).children() for level in container.children())
    return [[*islice(layers, count)] for count in counts]
