"""The call surface of the reference README: load with `from_pretrained`, generate with a call."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import prepare
from .budget.room import IMAGE_ENCODER_BYTES, encoder_at_work, limited
from .budget.text import peak_bytes as text_bytes
from .conditioning.camera_path import CameraPath
from .conditioning.encoders import Fit, LatentEncoder
from .conditioning.inputs import VideoInputs, condition
from .conditioning.text import Prompt, TextEncoder, as_prompts, text_conditioning
from .decode import AUTO, Tiles, decode, decode_pieces, encode
from .fitting import Pictures, as_frames, as_masks, as_references
from .lora.report import Report
from .media import pixels_to_images
from .memory.residency import Residency, on_device
from .model_config import ModelConfig, find_models, tokenizer_folder
from .models.image_encoder import ImageEncoder
from .models.vae import WanVAE
from .runtime import Runtime, default_device, log
from .sampling.call import cache_of_call, windows_of_call
from .sampling.loop import sample
from .settings import GuidanceSettings, MemorySettings, SamplerSettings, check_choice
from .tiling import TileSettings
from .types import Conditioning, Curve, VideoSize
from .variants import check

OUTPUT_TYPES = ("pil", "stream", "tensor", "latent")


@dataclass(eq=False)
class WanVideoPipeline:
    """Every Wan 2.1 model in one object. Build it with `from_pretrained`, then call it.

    Models whose `offload_device` differs from `device` are on `device` only while they work; blocks that do not fit
    there are streamed.
    """

    device: torch.device
    torch_dtype: torch.dtype
    model: prepare.VideoModel
    text_encoder: TextEncoder
    vae: WanVAE
    image_encoder: ImageEncoder | None = None
    text_cache_dir: str | Path | None = None
    """Where encoded prompts are kept from one process to the next; None keeps them in memory only."""
    memory: MemorySettings = MemorySettings()
    """What may be used of the device; see `enable_vram_management`."""

    @property
    def dit(self) -> torch.nn.Module:
        return self.model.dit

    @property
    def tokenizer(self) -> Any:
        return self.text_encoder.tokenizer

    @property
    def motion_controller(self) -> torch.nn.Module | None:
        return self.model.motion_controller

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
        model_configs: Sequence[ModelConfig] = (),
        tokenizer_config: ModelConfig | None = None,
        local_model_path: str | Path | None = None,
        skip_download: bool | None = None,
        redirect_common_files: bool = True,
        torch_compile: bool = False,
    ) -> "WanVideoPipeline":
        """Find, check and load the models.

        Every file's header is read and checked before the first weight is. The tokenizer is looked for in the text
        encoder's file and beside it, then in `tokenizer_config`, by default google/umt5-xxl of Wan-AI/Wan2.1-T2V-1.3B.
        `torch_compile` fuses elementwise steps of the video model, see `prepare.DiTSettings`.

        Raises:
            ValueError: a model is missing, given twice, unknown or broken.
        """
        device = torch.device(device) if device is not None else default_device()
        defaults = ModelConfig(local_model_path=local_model_path, skip_download=skip_download)
        configs = [config.filled_from(defaults) for config in model_configs]
        found = find_models(configs, redirect_common_files)
        component = {kind: model.component for kind, model in found.items()}
        tokenizer = tokenizer_folder(component["text_encoder"], tokenizer_config, defaults)
        rest = {kind: model.config.rest(device) for kind, model in found.items()}
        settings = prepare.DiTSettings(dtype=torch_dtype, torch_compile=torch_compile)
        model = prepare.load_dit(
            component["dit"], settings, rest["dit"], vace=component.get("vace"), compute_device=device
        )
        if "motion_controller" in found:
            model = prepare.with_speed_control(model, component["motion_controller"], rest["motion_controller"])
        image_encoder = None
        if "image_encoder" in found:
            image_encoder = prepare.load_image_encoder(component["image_encoder"], torch_dtype, rest["image_encoder"])
        return cls(
            device,
            torch_dtype,
            model,
            prepare.load_text_encoder(component["text_encoder"], tokenizer, torch_dtype, rest["text_encoder"]),
            prepare.load_vae(component["vae"], torch_dtype, rest["vae"]),
            image_encoder,
        )

    def enable_vram_management(
        self,
        num_persistent_param_in_dit: int | None = None,
        vram_limit: float | None = None,
        vram_buffer: float | None = None,
    ) -> None:
        """Keep what is in use on the device within a limit, in every call from now on.

        Models are on the device only while they work; those that rest there now are moved to host memory. Blocks that
        do not fit are copied to it one ahead of their turn. The limit is met where that is possible at all: a run that
        needs more with every block streamed is run so, with a warning.

        Args:
            num_persistent_param_in_dit: keep that many parameters of the DiT on the device and stream the others,
                whatever the limit; 0 streams all blocks.
            vram_limit: GiB in use on the device by all programs; all that is free if None. 0 streams everything.
            vram_buffer: GiB of it that are left to what is not weights; computed from the size of the video if None.

        Raises:
            ValueError: a number is out of range.
        """
        self.memory = MemorySettings(
            vram_limit=vram_limit, vram_buffer=vram_buffer, persistent_params=num_persistent_param_in_dit
        )
        for module in filter(None, (*self.model.modules, self.text_encoder.model, self.vae, self.image_encoder)):
            if self.device.type != "cpu":
                Residency.of(module).rest_on(torch.device("cpu"))

    def load_lora(
        self, module: torch.nn.Module, path: str | Path, alpha: float | Sequence[float] | Curve = 1.0
    ) -> Report:
        """Apply a LoRA, or a checkpoint of trained weights, in every call from now on; say what it does.

        Args:
            module: `pipe.dit` or `pipe.motion_controller`, as the reference's scripts name it; the file's own names
                tell which of its tensors belong where.
            path: in any dialect.
            alpha: its strength, a number or a curve over the steps.

        Raises:
            ValueError: `module` is not one that can be adapted, or nothing in the file matches.
        """
        if not any(module is part for part in self.model.modules):
            raise ValueError(f"A LoRA is applied to pipe.dit or pipe.motion_controller; got {type(module).__name__}.")
        self.model, report = self.model.with_lora(path, strength=alpha)
        log.info("%s", report.summary)
        return report

    def clear_lora(self) -> None:
        """Leave all LoRAs out again; the weights were never changed."""
        self.model = replace(self.model, loras=())

    def __call__(
        self,
        prompt: Prompt = "",
        negative_prompt: Prompt = "",
        *,
        input_image: Pictures | None = None,
        end_image: Pictures | None = None,
        input_video: Pictures | None = None,
        denoising_strength: float = 1.0,
        inpaint_video: Pictures | None = None,
        inpaint_mask: Pictures | None = None,
        control_video: Pictures | None = None,
        reference_image: Pictures | None = None,
        camera_control_direction: str | None = None,
        camera_control_speed: float = 1 / 54,
        camera_control_origin: Sequence[float] | None = None,
        camera_path: CameraPath | None = None,
        vace_video: Pictures | None = None,
        vace_video_mask: Pictures | None = None,
        vace_reference_image: Pictures | None = None,
        vace_scale: float | Sequence[float] | Curve = 1.0,
        motion_bucket_id: float | None = None,
        fit: Fit | None = None,
        seed: int | None = None,
        rand_device: str = "cpu",
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        cfg_scale: float | Sequence[float] = 5.0,
        cfg_merge: bool = False,
        num_inference_steps: int = 50,
        sigma_shift: float = 5.0,
        solver: str = "euler",
        tiled: bool = False,
        tile_size: tuple[int, int] = (30, 52),
        tile_stride: tuple[int, int] = (15, 26),
        sliding_window_size: int | None = None,
        sliding_window_stride: int | None = None,
        window_prompts: Sequence[Prompt] = (),
        tea_cache_l1_thresh: float | None = None,
        tea_cache_model_id: str = "",
        progress_bar_cmd: Callable[[Iterable[int]], Iterable[int]] | None = None,
        output_type: str = "pil",
    ) -> list[Image.Image] | list[list[Image.Image]] | Iterator[Image.Image] | Tensor:
        """Generate a video.

        Which inputs a model takes is decided by its structure; one that it cannot use is refused before anything runs.
        Pictures and clips may have any size and length (see `fit`).

        Args:
            prompt: what to show; a list makes one video of each.
            negative_prompt: what to avoid.
            input_image, end_image: first and last frame.
            input_video, denoising_strength: a video to start from, with that much noise; all steps are run.
            inpaint_video, inpaint_mask: a video of which the parts where the mask is white are drawn anew (Fun InP).
            control_video, reference_image: for the Fun control models.
            camera_control_direction, camera_control_speed, camera_control_origin: a camera move, or
            camera_path: any path (`conditioning.camera_path`).
            vace_video, vace_video_mask, vace_reference_image, vace_scale: a VACE input; several references make a list.
            motion_bucket_id: speed from 0 to 100, with the speed-control adapter.
            fit: how pictures and clips are brought to the size of the video. By default the authors' rule for each:
                stretched for the Fun control and camera models, cropped for the others; a short clip is held.
            seed: of the noise; None draws one.
            rand_device: where noise is drawn; on the CPU it is the same everywhere.
            height, width: in pixels, rounded up to multiples of 16.
            num_frames: rounded up to 4k + 1; 1 makes a still picture.
            cfg_scale: guidance; 1 leaves the negative prompt out and takes half the time. Several numbers are a curve
                over the steps.
            cfg_merge: run both branches as one batch.
            num_inference_steps: model evaluations per branch.
            sigma_shift: shift of the noise schedule.
            solver: see `SamplerSettings`.
            tiled, tile_size, tile_stride: encode and decode in tiles of that many latent cells (height,
                width). Without `tiled` that happens, in tiles of fitting sizes, only where memory asks for it.
            sliding_window_size, sliding_window_stride: windows over a long video, in latent frames; both or none.
            window_prompts: what each window shows in place of `prompt`, the last one for all after it.
            tea_cache_l1_thresh, tea_cache_model_id: leave out steps (TeaCache); the template is that of the model's
                catalog row unless one is named.
            progress_bar_cmd: wraps the steps, such as `tqdm` (the default).
            output_type: `pil` for a list of images, `stream` for one after another while the video is decoded (for
                `save_video`), `tensor` for pixels (B, 3, T, H, W) in [-1, 1], `latent` for normalised latents
                (B, 16, F, h, w).

        Raises:
            ValueError: an argument is out of range, or is not one that this model can use.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        if output_type == "stream" and len(as_prompts(prompt)) > 1:
            raise ValueError("output_type 'stream' gives the frames of one video; give one prompt, or take 'pil'.")
        size = VideoSize.rounded(width, height, num_frames)
        if camera_path is None and camera_control_direction is not None:
            camera_path = CameraPath.from_direction(
                camera_control_direction, size.num_frames, camera_control_speed, camera_control_origin
            )
        inputs = VideoInputs(
            input_image=_frames(input_image, "input_image"),
            end_image=_frames(end_image, "end_image"),
            inpaint_video=_frames(inpaint_video, "inpaint_video"),
            inpaint_mask=None if inpaint_mask is None else as_masks(inpaint_mask, "inpaint_mask"),
            control_video=_frames(control_video, "control_video"),
            reference_image=_frames(reference_image, "reference_image"),
            camera=camera_path,
            vace_video=_frames(vace_video, "vace_video"),
            vace_video_mask=None if vace_video_mask is None else as_masks(vace_video_mask, "vace_video_mask"),
            vace_reference_image=as_references(vace_reference_image, "vace_reference_image"),
            motion_bucket_id=motion_bucket_id,
            vace_scale=Curve.of(vace_scale),
        )
        settings = SamplerSettings(
            seed=random.getrandbits(32) if seed is None else seed,
            steps=num_inference_steps,
            shift=sigma_shift,
            denoise=denoising_strength if input_video is not None else 1.0,
            solver=solver,
            rand_device=rand_device,
            guidance=GuidanceSettings(
                scale=cfg_scale if isinstance(cfg_scale, (int, float)) else tuple(cfg_scale),
                mode="batched" if cfg_merge else "sequential",
            ),
            cache=cache_of_call(
                tea_cache_l1_thresh, tea_cache_model_id, self.model.row and self.model.row.preset.teacache
            ),
            windows=windows_of_call(sliding_window_size, sliding_window_stride),
        )
        tiles = TileSettings(size=tuple(tile_size), stride=tuple(tile_stride)) if tiled else AUTO
        start = _frames(input_video, "input_video")
        self._check(inputs, prompt, negative_prompt)
        window_texts = _prompts_of_windows(window_prompts, prompt, settings)
        encoder = self.text_encoder.kept_in(self.text_cache_dir)
        at_work = partial(self._at_work, encoder.model, text_bytes(encoder.model.config, encoder.dtype))
        cond = text_conditioning(encoder, prompt, negative_prompt, at_work)
        prompts = [text_conditioning(encoder, text, negative_prompt, at_work) for text in window_texts]
        cond, latents = self._encode(cond, inputs, start, size, tiles, fit)
        cond = self.model.fit(cond.to(self.device), size)
        plan = self.model.plan(cond, size.latent, settings, self.memory, self._runtime())
        with self.model.working(settings.total_steps, self.device, plan.placement) as run:
            runtime = run.follow(self._runtime(progress_bar_cmd or _tqdm, num_inference_steps))
            latents = sample(
                self.dit, cond, size.latent, plan.settings, runtime, latents, self.model.motion_controller,
                prompts=[text.to(self.device) for text in prompts],
            )  # fmt: skip
        return self._output(latents, tiles, output_type, runtime)

    def _check(self, inputs: VideoInputs, prompt: Prompt, negative_prompt: Prompt) -> None:
        as_prompts(prompt), as_prompts(negative_prompt, "negative_prompt")
        check(self.model.variant, inputs.given(), self.model.name, self.model.motion_controller is not None)
        pictures = [n for n in ("input_image", "end_image", "reference_image") if getattr(inputs, n) is not None]
        if pictures and self.image_encoder is None:
            raise ValueError(
                f"{self.model.name} reads {' and '.join(pictures)} through the CLIP image encoder too; add "
                "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth to model_configs."
            )

    def _encode(
        self,
        cond: Conditioning,
        inputs: VideoInputs,
        start: Tensor | None,
        size: VideoSize,
        tiles: Tiles,
        fit: Fit | None,
    ) -> tuple[Conditioning, Tensor | None]:
        """Conditioning with all inputs, and the latents of the video to start from."""
        if not inputs.given() and start is None:
            return cond, None
        with ExitStack() as stack:
            stack.enter_context(on_device(self.vae, self.device))
            if self.image_encoder is not None:
                stack.enter_context(self._at_work(self.image_encoder, IMAGE_ENCODER_BYTES))
            runtime = self._runtime()
            encoder = LatentEncoder(vae=self.vae, encode=partial(encode, self.vae, tiles=tiles, runtime=runtime))
            cond = condition(cond, inputs, self.model.variant, size, encoder, self.image_encoder, fit)
            latents = None if start is None else encoder.frames((fit or Fit()).clip(start, size, "input_video"))
        if latents is not None:
            latents = latents.expand(cond.text.shape[0], -1, -1, -1, -1)
        return cond, latents

    def _output(self, latents: Tensor, tiles: Tiles, output_type: str, runtime: Runtime) -> Any:
        if output_type == "latent":
            return latents
        if output_type == "stream":
            return self._frames_of(latents, tiles, runtime)
        if output_type == "tensor":
            with on_device(self.vae, self.device):
                return decode(self.vae, latents, tiles, runtime)
        videos = [list(self._frames_of(video, tiles, runtime)) for video in latents.split(1)]
        return videos[0] if len(videos) == 1 else videos

    def _frames_of(self, latents: Tensor, tiles: Tiles, runtime: Runtime) -> Iterator[Image.Image]:
        with on_device(self.vae, self.device):
            for piece in decode_pieces(self.vae, latents, tiles, runtime):
                yield from pixels_to_images(piece)

    def _at_work(self, module: torch.nn.Module, activations: int) -> AbstractContextManager[torch.nn.Module]:
        return encoder_at_work(module, self._runtime(), self.memory, activations)

    def _runtime(
        self, progress_bar_cmd: Callable[[Iterable[int]], Iterable[int]] | None = None, steps: int = 0
    ) -> Runtime:
        bar = iter(progress_bar_cmd(range(steps))) if progress_bar_cmd else iter(())
        next(bar, None)
        runtime = Runtime(
            device=self.device,
            dtype=self.torch_dtype,
            on_progress=lambda phase, done, total, latents=None: next(bar, None),
        )
        return limited(runtime, self.memory)


def _tqdm(steps: Iterable[int]) -> Iterable[int]:
    from tqdm import tqdm

    return tqdm(steps)


def _prompts_of_windows(window_prompts: Sequence[Prompt], prompt: Prompt, settings: SamplerSettings) -> list[list[str]]:
    """The prompts of each window, one for each video."""
    if isinstance(window_prompts, str):
        raise ValueError(f"window_prompts must be a list with a prompt for each window; got {window_prompts!r}.")
    if window_prompts and settings.windows is None:
        raise ValueError("window_prompts needs windows: give sliding_window_size and sliding_window_stride.")
    videos, found = len(as_prompts(prompt)), []
    for texts in (as_prompts(text, "window_prompts") for text in window_prompts):
        if len(texts) not in (1, videos):
            raise ValueError(f"window_prompts must hold one prompt or {videos}, as in prompt, for each; got {texts!r}.")
        found.append(texts * (videos // len(texts)))
    return found


def _frames(value: Pictures | None, name: str) -> Tensor | None:
    return None if value is None else as_frames(value, name)
