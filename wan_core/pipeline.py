"""The call surface of the reference README: load with `from_pretrained`, generate with a call."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import catalog, prepare
from .checkpoints.detect import Component, detect_files
from .checkpoints.download import models_folder
from .checkpoints.files import resolve_files
from .conditioning.text import Prompt, TextEncoder, text_conditioning
from .media import pixels_to_images
from .memory.residency import on_device
from .models.vae import WanVAE
from .runtime import Runtime, default_device, log
from .sampling.loop import sample
from .settings import GuidanceSettings, SamplerSettings, check_choice
from .tiling import TileSettings
from .types import VideoSize

OUTPUT_TYPES = ("pil", "tensor", "latent")
PathLike = str | Path


@dataclass(frozen=True)
class ModelConfig:
    """Where one model of a pipeline is, and where its weights rest.

    Attributes:
        path: a file, a folder, a glob or a list of shards; wins over `model_id`.
        model_id: a repository on ModelScope, or "WanCore/tiny".
        origin_file_pattern: a glob inside that repository.
        offload_device: where the weights rest while another model works; None keeps them on the pipeline's device.
        offload_dtype: in which dtype they rest; None is the pipeline's.
        local_model_path: root of the downloaded models, "./models" when None.
        skip_download: use local files only.
    """

    path: PathLike | Sequence[PathLike] | None = None
    model_id: str | None = None
    origin_file_pattern: str | None = None
    offload_device: str | torch.device | None = None
    offload_dtype: torch.dtype | None = None
    local_model_path: PathLike | None = None
    skip_download: bool | None = None

    def files(self, redirect_common_files: bool = True) -> list[Path]:
        """The local files, downloaded first when they are absent and that is allowed.

        Raises:
            ValueError: neither a path nor a repository with a pattern is given, or nothing is found.
        """
        if self.path is not None:
            return [file for group in resolve_files(self.path) for file in group]
        if not self.model_id or not self.origin_file_pattern:
            raise ValueError(f"ModelConfig needs `path`, or `model_id` with `origin_file_pattern`; got {self}.")
        return prepare.find_files(
            self.model_id,
            self.origin_file_pattern,
            models_dir=models_folder(self.local_model_path),
            skip_download=bool(self.skip_download),
            redirect_common_files=redirect_common_files,
        )


TOKENIZER_CONFIG = ModelConfig(model_id=catalog.T2V_BASE, origin_file_pattern=catalog.TOKENIZER_PATTERN)

# Parameters of the reference that a later part of the library brings, with the value that means "not used".
_LATER: dict[str, Any] = {
    "input_image": None, "end_image": None, "input_video": None, "control_video": None, "reference_image": None,
    "camera_control_direction": None, "camera_control_speed": 1 / 54, "camera_control_origin": None,
    "vace_video": None, "vace_video_mask": None, "vace_reference_image": None, "vace_scale": 1.0,
    "denoising_strength": 1.0, "motion_bucket_id": None, "sliding_window_size": None, "sliding_window_stride": None,
    "tea_cache_l1_thresh": None, "tea_cache_model_id": "",
}  # fmt: skip


@dataclass(eq=False)
class WanVideoPipeline:
    """Text to video in one object. Build it with `from_pretrained`, then call it.

    Models whose `offload_device` differs from `device` are on `device` only while they work.
    """

    device: torch.device
    torch_dtype: torch.dtype
    model: prepare.VideoModel
    text_encoder: TextEncoder
    vae: WanVAE

    @property
    def dit(self) -> torch.nn.Module:
        return self.model.dit

    @property
    def tokenizer(self) -> Any:
        return self.text_encoder.tokenizer

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        model_configs: Sequence[ModelConfig] = (),
        tokenizer_config: ModelConfig | None = None,
        local_model_path: PathLike | None = None,
        skip_download: bool | None = None,
        redirect_common_files: bool = True,
    ) -> "WanVideoPipeline":
        """Find, check and load the models.

        Every file's header is read and checked before the first weight is. The tokenizer is looked for in the text
        encoder's file and beside it, then in `tokenizer_config`, by default google/umt5-xxl of Wan-AI/Wan2.1-T2V-1.3B.

        Raises:
            ValueError: a model is missing, given twice, unknown or broken.
        """
        device = torch.device(device) if device is not None else default_device()
        found: dict[str, tuple[Component, ModelConfig]] = {}
        for config in model_configs:
            config = _with_defaults(config, local_model_path, skip_download)
            for group in resolve_files(config.files(redirect_common_files)):
                component = detect_files(group)
                if component.kind in found:
                    raise ValueError(
                        f"Two models of one kind were given: {found[component.kind][0].name} and {component.name}."
                    )
                found[component.kind] = (component, config)
        for kind, what in (("dit", "a DiT"), ("text_encoder", "a text encoder"), ("vae", "a VAE")):
            if kind not in found:
                raise ValueError(f"model_configs lacks {what}; it has {', '.join(found) or 'nothing'}.")
        for kind, (component, config) in found.items():
            if kind not in ("dit", "text_encoder", "vae"):
                raise ValueError(f"{component.name} ({kind}) cannot be used by this version of the pipeline.")
            if config.offload_dtype not in (None, torch_dtype):
                raise ValueError(
                    f"offload_dtype {config.offload_dtype} other than torch_dtype is not available in this version."
                )
        rest = {kind: config.offload_device or device for kind, (_, config) in found.items()}
        text_component = found["text_encoder"][0]
        tokenizer = _tokenizer_folder(text_component, tokenizer_config, local_model_path, skip_download)
        settings = prepare.DiTSettings(dtype=torch_dtype)
        return cls(
            device,
            torch_dtype,
            prepare.load_dit(found["dit"][0], settings, rest["dit"]),
            prepare.load_text_encoder(text_component, tokenizer, torch_dtype, rest["text_encoder"]),
            prepare.load_vae(found["vae"][0], torch_dtype, rest["vae"]),
        )

    def enable_vram_management(
        self,
        num_persistent_param_in_dit: int | None = None,
        vram_limit: float | None = None,
        vram_buffer: float | None = None,
    ) -> None:
        """Not part of this version; `ModelConfig(offload_device="cpu")` keeps idle models off the card."""
        raise ValueError(
            "enable_vram_management is not part of this version. Use ModelConfig(offload_device='cpu') to keep models "
            "that are not at work off the card."
        )

    def load_lora(self, module: torch.nn.Module, path: PathLike, alpha: float = 1.0) -> None:
        """Not part of this version."""
        raise ValueError(f"LoRA files are not supported by this version; {path} was not loaded.")

    def __call__(
        self,
        prompt: Prompt = "",
        negative_prompt: Prompt = "",
        *,
        seed: int | None = None,
        rand_device: str = "cpu",
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        cfg_scale: float = 5.0,
        cfg_merge: bool = False,
        num_inference_steps: int = 50,
        sigma_shift: float = 5.0,
        solver: str = "euler",
        tiled: bool = False,
        tile_size: tuple[int, int] = (30, 52),
        tile_stride: tuple[int, int] = (15, 26),
        progress_bar_cmd: Callable[[Iterable[int]], Iterable[int]] | None = None,
        output_type: str = "pil",
        **later: Any,
    ) -> list[Image.Image] | list[list[Image.Image]] | Tensor:
        """Generate a video.

        Args:
            prompt: what to show; a list makes one video of each.
            negative_prompt: what to avoid.
            seed: of the noise; None draws one.
            rand_device: where noise is drawn; on the CPU it is the same everywhere.
            height, width: in pixels, rounded up to multiples of 16.
            num_frames: rounded up to 4k + 1; 1 makes a still picture.
            cfg_scale: guidance; 1 leaves the negative prompt out and takes half the time.
            cfg_merge: run both branches as one batch.
            num_inference_steps: model evaluations per branch.
            sigma_shift: shift of the noise schedule.
            solver: see `SamplerSettings`.
            tiled, tile_size, tile_stride: decode in tiles of that many latent cells (height, width).
            progress_bar_cmd: wraps the steps, such as `tqdm` (the default).
            output_type: `pil` for a list of images, `tensor` for pixels (B, 3, T, H, W) in [-1, 1], `latent` for
                normalised latents (B, 16, F, h, w).

        Raises:
            ValueError: an argument is out of range or not supported by this version.
        """
        _refuse_later(later)
        check_choice("output_type", output_type, OUTPUT_TYPES)
        size = _rounded(width, height, num_frames)
        settings = SamplerSettings(
            seed=random.getrandbits(32) if seed is None else seed,
            steps=num_inference_steps,
            shift=sigma_shift,
            solver=solver,
            rand_device=rand_device,
            guidance=GuidanceSettings(scale=cfg_scale, mode="batched" if cfg_merge else "sequential"),
        )
        tiles = TileSettings(size=tuple(tile_size), stride=tuple(tile_stride)) if tiled else None
        with on_device(self.text_encoder.model, self.device):
            cond = text_conditioning(self.text_encoder, prompt, negative_prompt)
        with on_device(self.dit, self.device):
            latents = sample(
                self.dit, cond, size.latent, settings, self._runtime(progress_bar_cmd, num_inference_steps)
            )
        if output_type == "latent":
            return latents
        with on_device(self.vae, self.device), torch.no_grad():
            pixels = self.vae.decode(latents, tiles)
        if output_type == "tensor":
            return pixels
        videos = [pixels_to_images(video[None]) for video in pixels]
        return videos[0] if len(videos) == 1 else videos

    def _runtime(self, progress_bar_cmd: Callable[[Iterable[int]], Iterable[int]] | None, steps: int) -> Runtime:
        if progress_bar_cmd is None:
            from tqdm import tqdm as progress_bar_cmd
        bar = iter(progress_bar_cmd(range(steps)))
        next(bar, None)
        return Runtime(
            device=self.device,
            dtype=self.torch_dtype,
            on_progress=lambda phase, done, total, latents=None: next(bar, None),
        )


def _with_defaults(config: ModelConfig, local_model_path: PathLike | None, skip_download: bool | None) -> ModelConfig:
    return replace(
        config,
        local_model_path=local_model_path if config.local_model_path is None else config.local_model_path,
        skip_download=skip_download if config.skip_download is None else config.skip_download,
    )


def _tokenizer_folder(
    component: Component, config: ModelConfig | None, local_model_path: PathLike | None, skip_download: bool | None
) -> Path | None:
    """The tokenizer's folder; None when the text encoder brings one and no other was asked for."""
    if config is None:
        if prepare.has_tokenizer(component):
            return None
        config = TOKENIZER_CONFIG
    if config.path is not None:
        return Path(config.path)
    files = _with_defaults(config, local_model_path, skip_download).files()
    return files[0] if files[0].is_dir() else files[0].parent


def _refuse_later(arguments: dict[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in _LATER:
            raise TypeError(f"WanVideoPipeline has no parameter {name!r}.")
        if value != _LATER[name]:
            raise ValueError(f"{name} is not supported by this version of the pipeline; leave it out.")


def _rounded(width: int, height: int, num_frames: int) -> VideoSize:
    size = VideoSize.rounded(width, height, num_frames)
    if (size.width, size.height, size.num_frames) != (width, height, num_frames):
        log.warning("Rounded up to %s (asked for %sx%s, %s frames).", size, width, height, num_frames)
    return size
