"""The Wan video transformer, in every published shape.

A forward is split by how often each part must run: `embed_time` once for all steps, `prepare` once per branch and
window, then `embed`, `run_blocks` and `unembed` per step. Nothing of a run is stored on the module.

Shapes: B batch, S tokens, D model width, z latent channels, F latent frames with R reference frames in front, h and w
latent cells. Attribute names are the published keys (Wan-Video/Wan2.1 wan/modules/model.py).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ..parallel.mesh import Mesh, Part
from ..settings import NagSettings
from ..types import Conditioning
from .attention import AttentionFn, RotaryTable, rotary_table, sdpa
from .config import HEAD_DIM, DiTConfig
from .fused import EAGER, TokenRows, norm_modulate_
from .layers import EPS, CameraAdapter, Context, ImageTokens, VaceBlock, WanBlock, sinusoid
from .ops import Linear, add_, linear


@dataclass(frozen=True)
class TimeEmbedding:
    """The outputs of the time path in float32, for each of U timesteps: `head` (B, U, D) for the output head, `blocks`
    (B, U, 6, D) for the blocks.
    """

    head: Tensor
    blocks: Tensor

    def __getitem__(self, index: slice) -> "TimeEmbedding":
        return TimeEmbedding(self.head[index], self.blocks[index])


@dataclass(frozen=True)
class Prepared:
    """The inputs of one branch, projected; they do not change from step to step.

    `size` is (R + F, h, w); `concat` (B, c, R + F, h, w); `camera` (B, S, D); `reference` (B, S_ref, D); `motion`
    (B, 6, D); each of `vace` (B, S, D), of this rank's tokens where it has a part of them. `rows` are the timesteps of
    the video's tokens, without those of the reference.
    """

    context: Context
    size: tuple[int, int, int]
    concat: Tensor | None = None
    camera: Tensor | None = None
    reference: Tensor | None = None
    motion: Tensor | None = None
    vace: tuple[Tensor, ...] = ()
    rows: TokenRows | None = None


@dataclass
class TokenState:
    """The tokens (B, S, D) of one branch in one step, which `run_blocks` advances in place.

    `vace` holds the hidden state (B, S, D) of each VACE input with a strength other than 0 in this step, and the
    strength. The blocks of the numbers `skipped` leave the tokens as they are.
    """

    tokens: Tensor
    time: TimeEmbedding
    prepared: Prepared
    vace: list[tuple[Tensor, float]]
    skipped: frozenset[int] = frozenset()


class Head(nn.Module):
    """The output head; its modulation uses the time embedding before the six-way projection."""

    def __init__(self, dim: int, out_features: int) -> None:
        super().__init__()
        self.head = Linear(dim, out_features)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor, dtype: torch.dtype, rows: TokenRows | None = None) -> Tensor:
        shift, scale = (self.modulation.float()[:, None] + time[:, :, None]).unbind(2)  # (B, U, D) each
        return self.head(norm_modulate_(x, shift, 1 + scale, EPS, dtype, rows))


class WanDiT(nn.Module):
    """Noisy latents, time and conditioning to velocity.

    Attributes:
        attend: the attention kernel, see `attention.load_backend`.
        fused: how the elementwise steps of a block are run, see `fused.load_fused`.
        exact: keep the residual stream in float32, as the authors do, instead of in the compute dtype.
    """

    FLOAT32_PARAMETERS = ("modulation",)

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        dim, patch = config.dim, config.patch_size
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, patch, patch)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(
            WanBlock(dim, config.ffn_dim, config.has_image_input) for _ in range(config.num_layers)
        )
        self.head = Head(dim, config.out_channels * patch[0] * patch[1] * patch[2])
        if config.has_image_input:
            self.img_emb = ImageTokens(config.image_dim, dim, config.image_positions)
        if config.has_reference:
            self.ref_conv = nn.Conv2d(config.out_channels, dim, patch[1:], patch[1:])
        if config.camera_channels:
            self.control_adapter = CameraAdapter(config.camera_channels, dim, patch[1:], config.geometry.spatial_stride)
        if config.vace_layers:
            self.vace_patch_embedding = nn.Conv3d(config.vace_channels, dim, patch, patch)
            self.vace_blocks = nn.ModuleList(
                VaceBlock(dim, config.ffn_dim, is_first=n == 0) for n in range(len(config.vace_layers))
            )
        self.attend: AttentionFn = sdpa
        self.fused = EAGER
        self.exact = False

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype; that of the patch embedding, which is never quantised."""
        return self.patch_embedding.weight.dtype

    def embed_time(self, timesteps: Tensor) -> TimeEmbedding:
        """The time path for timesteps (B,) or (B, U) in 0..1000, in float32 whatever the weights are stored in."""
        timesteps = timesteps if timesteps.ndim > 1 else timesteps[:, None]
        first, _, second = self.time_embedding
        embedding = sinusoid(timesteps.to(first.get_parameter("weight").device, torch.float32), self.config.freq_dim)
        head = _linear_float32(second, F.silu(_linear_float32(first, embedding)))
        blocks = _linear_float32(self.time_projection[1], F.silu(head))
        return TimeEmbedding(head, blocks.unflatten(-1, (6, self.config.dim)))

    def prepare(
        self,
        cond: Conditioning,
        size: tuple[int, int, int],
        motion: Tensor | None = None,
        rope: RotaryTable | None = None,
        rows: tuple[TokenRows, TokenRows] | None = None,
        *,
        keep: bool = False,
        nag: NagSettings | None = None,
        mesh: Mesh | None = None,
    ) -> Prepared:
        """Project `cond` once for latents of `size` = (R + F, h, w); `motion` (B, 6, D) is the motion controller's
        output, `rope` the rotation of an earlier preparation of this size, `rows` the timesteps of all tokens and of
        those of the video of an earlier one with this `timestep_index`.

        With `keep` the first step leaves the keys and values of cross-attention to the others; weights must not change.
        With `nag`, attention to the text is led away from that to the negative text, if there is one. With `mesh`, the
        blocks run on this rank's part of the tokens; what comes before them is computed whole by each rank.

        Inputs that the model has a place for and `cond` lacks are zeros: the image tokens and channels of an inpainting
        model without an image, and the reference of a control model without one, were trained that way (VideoX-Fun).
        """
        config, dtype, device = self.config, self.dtype, self.patch_embedding.weight.device
        batch = len(cond.encoded_text)
        text = self.text_embedding(cond.encoded_text.to(device, dtype))  # (B, 512, D)
        image = reference = camera = concat = None
        if config.has_image_input:
            tokens = cond.image_tokens
            if tokens is None:
                tokens = text.new_zeros(batch, config.num_image_tokens, config.image_dim)
            image = self.img_emb(tokens.to(device))  # (B, 257 or 514, D)
        if config.concat_channels:
            shape = (batch, config.concat_channels, *size)
            concat = text.new_zeros(shape) if cond.concat is None else cond.concat.to(device, dtype)
        if config.has_reference:
            latent = cond.reference
            if latent is None:
                latent = text.new_zeros(batch, config.out_channels, *size[1:])
            reference = rearrange(self.ref_conv(latent.to(device, dtype)), "b d h w -> b (h w) d")
        if config.camera_channels and cond.camera is not None:
            camera = self.control_adapter(cond.camera.to(device))
        vace: tuple[Tensor, ...] = ()
        if config.vace_layers and cond.vace:
            vace = tuple(_patchify(self.vace_patch_embedding, v.context.to(device, dtype)) for v in cond.vace)
        frames, height, width = (n // p for n, p in zip(size, config.patch_size, strict=True))
        # The reference's tokens take the first frame position, and the video's follow (Fun control models).
        grid = (frames + (reference is not None), height, width)
        part = None if mesh is None else mesh.part(math.prod(grid))
        if part is not None:
            vace = tuple(map(part.own, vace))
        rope = rope or _rotations(grid, part, device)
        rows = rows or _timestep_rows(cond, grid, 0 if reference is None else reference.shape[1], part, device)
        all_rows, video_rows = rows or (None, None)
        kept: dict[tuple[nn.Module, str], tuple[Tensor, ...]] | None = {} if keep else None
        context = Context(text, image, rope, self.attend, self.fused, kept, all_rows, part=part)
        if nag is not None and cond.negative_text is not None:
            negative = self.text_embedding(cond.negative_text.to(device, dtype))
            context = dataclasses.replace(context, negative=negative, nag=nag)
        return Prepared(context, size, concat, camera, reference, motion, vace, video_rows)

    def embed(
        self, x: Tensor, time: TimeEmbedding, prepared: Prepared, vace_strengths: Sequence[float] = ()
    ) -> TokenState:
        """Latents (B, z, R + F, h, w) to tokens, with every input that enters before the blocks.

        VACE inputs of strength 0 are left out, and cost nothing in this step.
        """
        x = x.to(prepared.context.text.dtype)
        if prepared.concat is not None:
            x = torch.cat((x, prepared.concat), 1)
        tokens = _patchify(self.patch_embedding, x)  # (B, S, D), one token per patch of 1 x 2 x 2 cells
        if prepared.camera is not None:
            tokens = add_(tokens, prepared.camera)
        if prepared.reference is not None:
            tokens = torch.cat((prepared.reference, tokens), 1)
        if prepared.context.part is not None:
            tokens = prepared.context.part.own(tokens)
        if self.exact:
            tokens = tokens.float()
        if prepared.motion is not None:
            time = TimeEmbedding(time.head, time.blocks + prepared.motion[:, None])
        vace = [(hidden, factor) for hidden, factor in zip(prepared.vace, vace_strengths, strict=True) if factor]
        return TokenState(tokens, time, prepared, vace)

    def run_blocks(
        self,
        states: Sequence[TokenState],
        on_block: Callable[[int], None] | None = None,
        blocks: range | None = None,
    ) -> None:
        """Advance every state through `blocks` (all if None), each block for all states before the next one.

        So a block whose weights are streamed is copied once per step and not once per branch. `on_block` is called with
        the block's index before it runs; what it raises ends the run.
        """
        hints = {layer: n for n, layer in enumerate(self.config.vace_layers)}
        for index in range(len(self.blocks)) if blocks is None else blocks:
            block = self.blocks[index]
            if on_block is not None:
                on_block(index)
            if all(index in state.skipped and index not in hints for state in states):
                continue
            # The first VACE block reads the tokens before block 0, the others only their own hidden state. A hint is
            # added after the block of its layer, also of a skipped one.
            found = [self._hints(hints[index], state) if index in hints else [] for state in states]
            for state, updates in zip(states, found, strict=True):
                if index not in state.skipped:
                    state.tokens = block(state.tokens, state.time.blocks, state.prepared.context)
                while updates:  # popped, so that each hint's memory is free before the next is added
                    state.tokens = add_(state.tokens, *updates.pop(0))

    def block_order(self) -> list[str]:
        """The paths of all blocks as `run_blocks` calls them for a state with VACE inputs."""
        order = []
        for index in range(len(self.blocks)):
            if index in self.config.vace_layers:
                order.append(f"vace_blocks.{self.config.vace_layers.index(index)}")
            order.append(f"blocks.{index}")
        return order

    def _hints(self, n: int, state: TokenState) -> list[tuple[Tensor, float]]:
        """The hint (B, S, D) of VACE block `n` for each VACE input of `state`, and its strength."""
        hints = []
        for i, (hidden, strength) in enumerate(state.vace):
            hidden, hint = self.vace_blocks[n](hidden, state.tokens, state.time.blocks, state.prepared.context)
            state.vace[i] = (hidden, strength)
            hints.append((hint, strength))
        return hints

    def unembed(self, state: TokenState) -> Tensor:
        """Tokens to velocity (B, z, R + F, h, w) in float32; reference tokens are dropped first."""
        tokens, prepared, context = state.tokens, state.prepared, state.prepared.context
        before, rows = 0 if prepared.reference is None else prepared.reference.shape[1], prepared.rows
        if context.part is not None:
            rows = context.rows
        elif before:
            tokens = tokens[:, before:]
        patches = self.head(tokens, state.time.head, context.text.dtype, rows)  # (B, S, patch * z)
        if context.part is not None:
            patches = context.part.whole(patches)[:, before:]
        patches = patches.float()
        (pt, ph, pw), (frames, height, _) = self.config.patch_size, prepared.size
        folds = {"f": frames // pt, "h": height // ph, "pt": pt, "ph": ph, "pw": pw}
        return rearrange(patches, "b (f h w) (pt ph pw c) -> b c (f pt) (h ph) (w pw)", **folds)

    def forward(self, x: Tensor, timestep: Tensor, cond: Conditioning, motion: Tensor | None = None) -> Tensor:
        """Velocity (B, z, R + F, h, w) for latents `x` of that shape at `timestep` (B,) in 0..1000.

        Tokens for which `cond` has factors are at that fraction of it.

        Raises:
            ValueError: a side of `x` is no multiple of the patch, or a conditioning tensor does not fit.
        """
        check_shapes(self.config, x, cond)
        frames, height, width = x.shape[2:]
        prepared = self.prepare(cond, (frames, height, width), motion)
        state = self.embed(x, self.embed_time(timesteps_of(cond, timestep)), prepared, vace_strengths(cond))
        self.run_blocks([state])
        return self.unembed(state)


def timesteps_of(cond: Conditioning, timestep: Tensor) -> Tensor:
    """The timesteps (B, U) of the tokens of a video that is at `timestep` (B,)."""
    if cond.timestep_factors is None:
        return timestep[:, None]
    return timestep[:, None] * cond.timestep_factors.to(timestep)


def vace_strengths(cond: Conditioning, index: int = 0, total: int = 1) -> list[float]:
    """The strength of each VACE input at step `index` of `total`."""
    return [vace.strength.at(index, total) for vace in cond.vace or ()]


def check_shapes(config: DiTConfig, x: Tensor, cond: Conditioning) -> None:
    """Raise ValueError for a tensor whose shape the model does not take. Nothing after this checks shapes."""
    batch, _, frames, height, width = x.shape
    if height % config.patch_size[1] or width % config.patch_size[2]:
        raise ValueError(
            f"Latents are {height}x{width} cells; both must be multiples of a token's {config.patch_size[1]}x"
            f"{config.patch_size[2]} (pixel sides are multiples of {config.geometry.side_multiple})."
        )
    if cond.text is None or cond.text.shape[-1] != config.text_dim:
        got = None if cond.text is None else tuple(cond.text.shape)
        raise ValueError(f"The model takes text embeddings (B, L, {config.text_dim}); got {got}.")
    if cond.timestep_index is not None:
        grid = (frames, height // config.patch_size[1], width // config.patch_size[2])
        if tuple(cond.timestep_index.shape[1:]) not in (grid, (frames, 1, 1)):
            raise ValueError(
                f"timestep_index should be {(batch, frames, 1, 1)} or {(batch, *grid)} for these latents; got "
                f"{tuple(cond.timestep_index.shape)}."
            )
    stride = config.geometry.spatial_stride
    rays = (config.camera_channels, frames, height * stride, width * stride)
    expected = {
        "latents": (x, (config.out_channels, frames, height, width)),
        "concat": (cond.concat, (config.concat_channels, frames, height, width)),
        "reference": (cond.reference, (config.out_channels, height, width)),
        "camera": (cond.camera, rays),
        "image_tokens": (
            cond.image_tokens if config.has_image_input else None,
            (config.num_image_tokens, config.image_dim),
        ),
    }
    for i, vace in enumerate(cond.vace or ()):
        expected[f"vace[{i}]"] = (vace.context, (config.vace_channels, frames, height, width))
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != (batch, *shape):
            raise ValueError(
                f"{name} should be {(batch, *shape)} for these latents and this model; got {tuple(tensor.shape)}."
            )


def _linear_float32(layer: nn.Module, x: Tensor) -> Tensor:
    kind = x.device.type
    # Autocast, which a trainer may have switched on, would round the timestep's embedding.
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        return F.linear(x, layer.get_parameter("weight").float(), layer.get_parameter("bias").float())


def _patchify(conv: nn.Conv3d, x: Tensor) -> Tensor:
    """`conv(x)` as tokens (B, S, D), by a matrix product that leaves them in the layout the blocks read."""
    pt, ph, pw = conv.kernel_size
    patches = rearrange(x, "b c (f pt) (h ph) (w pw) -> b (f h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    return linear(patches, conv.weight.flatten(1), conv.bias)


def _rotations(grid: tuple[int, int, int], part: Part | None, device: torch.device) -> RotaryTable:
    """The rotation of each token of `grid`, or of those of this rank."""
    table = rotary_table(grid, HEAD_DIM, device)
    return table if part is None else RotaryTable(table.cos[part.place].clone(), table.sin[part.place].clone())


def _timestep_rows(
    cond: Conditioning, grid: tuple[int, int, int], before: int, part: Part | None, device: torch.device
) -> tuple[TokenRows, TokenRows] | None:
    """The timesteps of all tokens of `grid`, or of those of this rank, and of the video's; `before` are the
    reference's.
    """
    if cond.timestep_index is None:
        return None
    frames = grid[0] - (before > 0)
    index = cond.timestep_index[0].expand(frames, *grid[1:]).flatten()
    # The reference's tokens have the timestep of the last one (VideoX-Fun `Wan2_2Transformer3DModel`).
    whole = torch.cat((index[-1:].expand(before), index))
    return TokenRows.of(whole if part is None else whole[part.place], device), TokenRows.of(index, device)
