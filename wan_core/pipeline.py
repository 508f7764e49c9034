"""The call surface of the reference README: load with `from_pretrained`, generate with a call."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .cache_settings import CacheSettings
from .call_arguments import memory_of_call, truth
from .conditioning.camera import CameraPath
from .conditioning.image import Fit
from .conditioning.pose_rows import DEFAULT_ORIGIN
from .conditioning.text import Prompt
from .films import Films
from .media.fitting import Pictures, SizeRule
from .model_config import TOKENIZER_CONFIG, ModelConfig, compute_dtype
from .offload.weights import WeightProvider
from .parallel.cards import Cards
from .pipeline_calls import Call
from .pipeline_models import LoadedModels, load_models
from .recommend import OFF
from .runtime import default_device, usable_device
from .settings import GuidanceSettings, MemorySettings
from .tiling import TileSettings
from .types import Curve

DEVICE = default_device().type
"""Where pipelines compute unless another device is named."""


@dataclass(eq=False)
class WanVideoPipeline(Films):
    """Every Wan model in one object. Build it with `from_pretrained`, then call it.

    Models whose `offload_device` differs from `device` are on `device` only while they work; blocks that do not fit are
    streamed.
    """

    device: torch.device
    torch_dtype: torch.dtype
    models: LoadedModels
    text_cache_dir: str | Path | None = None
    """Where encoded prompts are kept from one process to the next; None keeps them in memory only."""
    memory: MemorySettings = MemorySettings()
    """What may be used of the device; see `enable_vram_management`."""

    @classmethod
    def from_pretrained(
        cls,
        torch_dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device = DEVICE,
        model_configs: Sequence[ModelConfig] = (),
        tokenizer_config: ModelConfig | None = TOKENIZER_CONFIG,
        local_model_path: str | Path = "./models",
        skip_download: bool = False,
        redirect_common_files: bool = True,
        use_usp: bool = False,
        vram_limit: float | None = None,
        *,
        torch_compile: bool = False,
        deterministic: bool = False,
        devices: Sequence[str | torch.device] | None = None,
    ) -> "WanVideoPipeline":
        """Find, check and load the models.

        Every file's header is read and checked before the first weight is.

        Args:
            torch_dtype: what the models compute in, unless a `ModelConfig` says otherwise.
            device: where they compute.
            model_configs: a DiT, a text encoder and a VAE, and what else the model needs.
            tokenizer_config: where the tokenizer is, when the text encoder's file and folder have none.
            local_model_path: folder of the downloaded models.
            skip_download: use local files only.
            redirect_common_files: take files that all repositories share from one of them.
            use_usp: not available; see `devices`.
            vram_limit: as of `enable_vram_management`.
            torch_compile: fuse the elementwise steps of the video model, see `model_files.DiTSettings`.
            deterministic: use fixed kernels instead of those that are fastest here, see `models.kernels`.
            devices: two or more, which make each film together, in processes of their own that start with the first
                film; prompts and pictures are encoded on the first. Weights wait in host memory. Docs: scaling.md.

        Raises:
            ValueError: a model is missing, given twice, unknown or broken, or an argument has a value that it cannot
                have.
        """
        torch_dtype = compute_dtype("torch_dtype", torch_dtype)
        cards = None if devices is None else Cards(tuple(str(usable_device("devices", each)) for each in devices))
        device = usable_device("device", device if cards is None else cards.devices[0])
        memory = memory_of_call(vram_limit=vram_limit)
        if use_usp is not False:
            raise ValueError("use_usp is not available; devices=['cuda:0', 'cuda:1'] makes a film on several cards.")
        if cards is not None:  # the processes copy them to their own devices
            model_configs = [replace(each, offload_device=each.offload_device or "cpu") for each in model_configs]
        defaults = ModelConfig(local_model_path=local_model_path, skip_download=skip_download)
        models = load_models(
            model_configs, torch_dtype, device, tokenizer_config, defaults,
            redirect_common_files=truth("redirect_common_files", redirect_common_files),
            torch_compile=truth("torch_compile", torch_compile), deterministic=truth("deterministic", deterministic),
        )  # fmt: skip
        return cls(device, torch_dtype, models.on_cards(cards), memory=memory)

    def enable_vram_management(
        self,
        num_persistent_param_in_dit: int | None = None,
        vram_limit: float | None = None,
        vram_buffer: float | None = None,
    ) -> None:
        """Keep what is in use on the device within a limit, in every call from now on.

        Models are on the device only while they work; those that are kept there now are moved to host memory. Blocks
        that do not fit are copied to it one ahead of their turn. A run that needs more than the limit even with every
        block streamed is run so, with a warning.

        Args:
            num_persistent_param_in_dit: keep that many parameters of the DiT on the device and stream the others,
                whatever the limit; 0 streams all blocks.
            vram_limit: GiB in use on the device by all programs; all that is free if None. 0 streams everything.
            vram_buffer: GiB of it that are left for everything but weights; computed from the video's size if None.

        Raises:
            ValueError: a number is out of range.
        """
        self.memory = memory_of_call(num_persistent_param_in_dit, vram_limit, vram_buffer)
        for module in self.models:
            if self.device.type != "cpu":
                WeightProvider.of(module).offload_to(torch.device("cpu"))

    def __call__(
        self,
        prompt: Prompt = "",
        negative_prompt: Prompt = "",
        input_image: Pictures | None = None,
        end_image: Pictures | None = None,
        input_video: Pictures | None = None,
        denoising_strength: float = 1.0,
        control_video: Pictures | None = None,
        reference_image: Pictures | None = None,
        camera_control_direction: str | None = None,
        camera_control_speed: float = 1 / 54,
        camera_control_origin: Sequence[float] | None = DEFAULT_ORIGIN,
        vace_video: Pictures | None = None,
        vace_video_mask: Pictures | None = None,
        vace_reference_image: Pictures | None = None,
        vace_scale: float | Sequence[float] | Curve = 1.0,
        seed: int | None = None,
        rand_device: str = "cpu",
        height: int = 480,
        width: int = 832,
        num_frames: int = 81,
        cfg_scale: float | Sequence[float] = 5.0,
        cfg_merge: bool = False,
        num_inference_steps: int = 50,
        sigma_shift: float = 5.0,
        motion_bucket_id: float | None = None,
        tiled: bool = False,
        tile_size: tuple[int, int] = TileSettings.size,
        tile_stride: tuple[int, int] = TileSettings.stride,
        sliding_window_size: int | None = None,
        sliding_window_stride: int | None = None,
        tea_cache_l1_thresh: float | None = None,
        tea_cache_model_id: str = "",
        progress_bar_cmd: Callable[[Iterable[int]], Iterable[int]] | None = tqdm,
        output_type: str = "quantized",
        *,
        inpaint_video: Pictures | None = None,
        inpaint_mask: Pictures | None = None,
        camera_path: CameraPath | None = None,
        fit: Fit | None = None,
        solver: str = "euler",
        switch_DiT_boundary: float | None = None,  # noqa: N803 - the reference's name
        cfg_scale_low: float | Sequence[float] | None = None,
        size_rule: SizeRule = "exact",
        window_prompts: Sequence[Prompt] = (),
        guidance: GuidanceSettings | None = None,
        sigmas: Sequence[float] | None = None,
        recommended: str = OFF,
        more_motion: bool = False,
        cache: CacheSettings | None = None,
        keyframes: Mapping[int, Pictures] | None = None,
        decoder: str = "vae",
    ) -> list[Image.Image] | list[list[Image.Image]] | Iterator[Image.Image] | Tensor:
        """Generate a video.

        The structure of a model decides which inputs it takes; one that it cannot use is refused before anything runs.
        Pictures and clips may have any size and length (see `fit`).

        Args:
            prompt: what to show; a list makes one video of each.
            negative_prompt: what to avoid.
            input_image, end_image: first and last frame.
            input_video, denoising_strength: a video to start from, with that much noise; all steps are run.
            control_video, reference_image: for the Fun control models.
            camera_control_direction, camera_control_speed, camera_control_origin: a camera move.
            vace_video, vace_video_mask, vace_reference_image, vace_scale: a VACE input; several references make a list.
            seed: of the noise; None draws one.
            rand_device: where noise is drawn; on the CPU it is the same everywhere.
            height, width: in pixels, rounded up to multiples of 16.
            num_frames: rounded up to 4k + 1; 1 makes a still picture.
            cfg_scale: guidance; 1 leaves the negative prompt out and takes half the time. Several numbers are a curve
                over the steps.
            cfg_merge: run both branches as one batch.
            num_inference_steps: model evaluations per branch.
            sigma_shift: shift of the noise schedule.
            motion_bucket_id: speed from 0 to 100, with the speed-control adapter.
            tiled, tile_size, tile_stride: encode and decode in tiles of that many latent cells (height,
                width). Without `tiled` that happens, in tiles of fitting sizes, only where memory asks for it.
            sliding_window_size, sliding_window_stride: windows over a long video, in latent frames; both or none.
            tea_cache_l1_thresh, tea_cache_model_id: leave out steps (TeaCache); the template is that of the model's
                catalog row unless one is named. `cache` takes the settings of any step cache instead
                (`cache_settings`), such as `MagCacheSettings.preset("balanced")`.
            progress_bar_cmd: wraps the steps, such as `tqdm`; None shows nothing.
            output_type: `quantized` or `pil` for a list of images, `stream` for one after another while the video is
                decoded (for `save_video`), `floatpoint` or `tensor` for pixels (B, 3, T, H, W) in [-1, 1], `latent`
                for normalised latents (B, z, F, h, w).
            inpaint_video, inpaint_mask: a video whose parts under the white of the mask are generated again (Fun InP).
            camera_path: any path (`conditioning.camera`) in place of a camera move.
            fit: how pictures and clips are brought to the size of the video. By default as the authors of each model
                do it: stretched for the Fun control and camera models, cropped for the others; the last frame of a
                short clip is held.
            solver: see `SamplerSettings`.
            switch_DiT_boundary: of a pair of experts, the fraction of the noise from which on the first one works, 0 to
                1; that of the model's catalog row if None.
            cfg_scale_low: guidance of the second expert, where it is not `cfg_scale`.
            size_rule: how `input_image` decides the size: `exact` is `width` x `height`; `area` and `area and crop`
                keep the picture's aspect at that area, as the authors do for I2V-A14B and for TI2V-5B.
            window_prompts: what each window shows in place of `prompt`; the last one also serves all windows after it.
            guidance: with NAG, skip-layer guidance and CFG-Zero* (`settings`), in place of cfg_scale and cfg_scale_low.
            sigmas: the noise levels, from at most 1 down, in place of the steps, their shift and the strength.
            recommended: `auto` takes the steps, shift, cfg, solver and noise levels that the authors of the distilled
                LoRA or of the model publish; a name of `distilled.FEW_STEPS` takes those.
            more_motion: changes recommended few-step settings against slow motion, see docs/few-steps.md.
            keyframes: pictures by the frame that each becomes, -1 for the last one: first and last frame of
                first-last-frame models, any frames of Fun InP, image-to-video and VACE models.
            decoder: what makes the frames: `vae`, or `taew2`, the tiny autoencoder (taew2_1 or taew2_2 in
                `model_configs`), in a fraction of the time and memory, as an approximation.

        Raises:
            ValueError: an argument is out of range, or is not one that this model can use.
        """
        call = Call.of(locals(), self.models)
        self._check(call)
        cond = self._with_text(call.prompt, call)
        prompts = [self._with_text(text, call) for text in call.window_prompts]
        cond, latents = self._encode(cond, call)
        state = self._sampled(cond, latents, prompts, call)
        return self._output(state.video, call)
