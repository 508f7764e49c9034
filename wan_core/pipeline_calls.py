"""What a pipeline's calls have in common: their arguments, checked, and the way from these to frames."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .call_arguments import (
    cache_of_call,
    check_parameters,
    plain_number,
    settings_of_call,
    strength,
    tiles_of_call,
    truth,
    windows_of_call,
    with_own,
)
from .checks import check_choice
from .conditioning.film import keyframe_inputs
from .conditioning.image import Fit, LatentEncoder
from .conditioning.inputs import VideoInputs, condition
from .conditioning.text import Prompt, as_prompts, text_conditioning
from .decode import DECODERS, VaeHandle
from .media import pixels_to_images
from .media.fitting import as_frames
from .model import VideoModel
from .models.preview_decoder import NAMES
from .pipeline_models import LoadedModels, PipelineModels
from .planning.encoders import IMAGE_ENCODER_BYTES, checked_size, working_encoder
from .planning.encoders import text_peak_bytes as text_bytes
from .runtime import Runtime, log
from .sampling.checkpoint import Checkpoint, RunState
from .sampling.experts import RunInputs
from .settings import MemorySettings, SamplerSettings
from .tiling import AUTO, Tiles
from .types import Conditioning, VideoSize
from .variants import READ_BY_CLIP, check

OUTPUT_TYPES = {"quantized": "pil", "floatpoint": "tensor", "pil": "pil", "stream": "stream", "tensor": "tensor",
                "latent": "latent"}  # fmt: skip
"""What a call can return; the first two are the reference's names."""

ProgressBar = Callable[[Iterable[int]], Iterable[int]]


@dataclass(frozen=True, kw_only=True)
class Call:
    """The arguments of `WanVideoPipeline.__call__`, checked.

    Attributes:
        model: with the boundary of the call.
        start: the video to start from (T, H, W, 3).
        window_prompts: the prompts of each window, one for each video.
        progress: wraps the steps.
        decoder: of `decode.DECODERS`.
    """

    model: VideoModel
    prompt: Prompt
    negative_prompt: Prompt
    window_prompts: Sequence[Prompt]
    inputs: VideoInputs
    start: Tensor | None
    size: VideoSize
    settings: SamplerSettings
    tiles: Tiles
    fit: Fit | None
    output_type: str
    progress: ProgressBar | None
    decoder: str

    @classmethod
    def of(cls, arguments: Mapping[str, Any], models: LoadedModels) -> "Call":
        """From the call's arguments by name; others, such as `self`, are ignored.

        Raises:
            ValueError: an argument is out of range or excludes another.
        """
        a, model = dict(arguments), models.video
        check_choice("output_type", a["output_type"], tuple(OUTPUT_TYPES))
        output_type = OUTPUT_TYPES[a["output_type"]]
        if output_type == "stream" and len(as_prompts(a["prompt"])) > 1:
            raise ValueError("output_type 'stream' gives the frames of one video; give one prompt, or take 'pil'.")
        check_choice("decoder", a["decoder"], DECODERS)
        if a["decoder"] != DECODERS[0] and models.tiny_autoencoder is None:
            name = NAMES[model.geometry.channels]
            raise ValueError(f"decoder {a['decoder']!r} needs the tiny autoencoder: add {name} to model_configs.")
        fit, progress = a["fit"], a["progress_bar_cmd"]
        if fit is not None and not isinstance(fit, Fit):
            raise ValueError(f"fit must be a Fit (wan_core.conditioning.image); got {fit!r}.")
        if progress is not None and not callable(progress):
            raise ValueError(f"progress_bar_cmd must wrap an iterable, such as tqdm; got {progress!r}.")
        if a["switch_DiT_boundary"] is not None:
            model = model.with_boundary(plain_number(a["switch_DiT_boundary"]))
        if a["cfg_scale_low"] is not None and len(model.experts) == 1:
            raise ValueError(f"cfg_scale_low is for models of two experts; {model.name} has one. Give cfg_scale.")
        sides = check_parameters(**{name: a[name] for name in ("width", "height", "num_frames")})
        if a["input_image"] is not None:
            a["input_image"] = as_frames(a["input_image"], "input_image")
        rule = {"rule": a["size_rule"], "start_image": a["input_image"]}
        size = checked_size(**sides, geometry=model.geometry, **rule)
        inputs = VideoInputs.of_call(
            num_frames=size.num_frames, vace_scale=strength("vace_scale", a["vace_scale"]),
            **{name: a[name] for name in CAMERA_ARGUMENTS}, **{name: a[name] for name in PICTURE_ARGUMENTS},
            **check_parameters(motion_bucket_id=a["motion_bucket_id"]),
        )  # fmt: skip
        if a["keyframes"] is not None:
            inputs = _with_keyframes(inputs, a["keyframes"], model, size, fit or Fit())
        settings = settings_of_call(
            starts_from_video=a["input_video"] is not None,
            windows=windows_of_call(a["sliding_window_size"], a["sliding_window_stride"]),
            cache=model.resolved(cache_of_call(a["tea_cache_l1_thresh"], a["tea_cache_model_id"], a["cache"])),
            **{name: a[name] for name in SETTINGS_ARGUMENTS},
        )  # fmt: skip
        settings = with_own(settings, a["guidance"], a["sigmas"])
        more_motion = truth("more_motion", a["more_motion"])
        model, settings = model.recommended(a["recommended"], settings, more_motion=more_motion)
        tile_settings = tiles_of_call(a["tile_size"], a["tile_stride"])
        return cls(
            model=model, prompt=a["prompt"], negative_prompt=a["negative_prompt"],
            window_prompts=_prompts_of_windows(a["window_prompts"], a["prompt"], settings), inputs=inputs,
            start=None if a["input_video"] is None else as_frames(a["input_video"], "input_video"), size=size,
            settings=settings, tiles=tile_settings if truth("tiled", a["tiled"]) else AUTO, fit=fit,
            output_type=output_type, progress=progress, decoder=a["decoder"],
        )  # fmt: skip


CAMERA_ARGUMENTS = (
    "camera_control_direction", "camera_control_speed", "camera_control_origin", "camera_path"
)  # fmt: skip
PICTURE_ARGUMENTS = (
    "input_image", "end_image", "inpaint_video", "inpaint_mask", "control_video", "reference_image", "vace_video",
    "vace_video_mask", "vace_reference_image",
)  # fmt: skip
SETTINGS_ARGUMENTS = (
    "seed", "rand_device", "num_inference_steps", "sigma_shift", "denoising_strength", "cfg_scale", "cfg_scale_low",
    "cfg_merge", "solver",
)  # fmt: skip


class PipelineCalls(PipelineModels):
    """A pipeline's models at work: from checked arguments to conditioning, latents and frames."""

    device: torch.device
    torch_dtype: torch.dtype
    text_cache_dir: str | Path | None
    memory: MemorySettings

    def _check(self, call: Call) -> None:
        """Refuse all that can be refused before the first model works."""
        as_prompts(call.prompt), as_prompts(call.negative_prompt, "negative_prompt")
        model = self.models.video
        check(model.variant, call.inputs.names(), model.name, model.motion_controller is not None)
        pictures = [name for name in READ_BY_CLIP if getattr(call.inputs, name) is not None]
        self._check_image_encoder(pictures)

    def _check_image_encoder(self, pictures: Sequence[str]) -> None:
        model = self.models.video
        if pictures and self.models.image is None and model.variant.reads_images:
            raise ValueError(
                f"{model.name} reads {' and '.join(pictures)} through the CLIP image encoder too; add "
                "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth to model_configs."
            )

    def _with_text(self, prompt: Prompt, call: Call) -> Conditioning:
        encoder = self.models.text.kept_in(self.text_cache_dir)
        at_work = partial(self._at_work, encoder.model, text_bytes(encoder.model.config, encoder.dtype))
        return text_conditioning(encoder, prompt, call.negative_prompt, at_work)

    def _encode(self, cond: Conditioning, call: Call) -> tuple[Conditioning, Tensor | None]:
        """Conditioning with all inputs, and the latents of the video to start from."""
        if not call.inputs.names() and call.start is None:
            return cond, None
        with self._encoders(call) as encoder:
            variant, image = self.models.video.variant, self.models.image
            cond = condition(cond, call.inputs, variant, call.size, encoder, image, call.fit)
            start, fit = call.start, call.fit or Fit()
            latents = None if start is None else encoder.frames(fit.clip(start, call.size, "input_video"))
        if latents is not None:
            # One video to start from, for every prompt.
            latents = latents.expand(len(cond.encoded_text), -1, -1, -1, -1)
        return cond, latents

    @contextmanager
    def _encoders(self, call: Call) -> Iterator[LatentEncoder]:
        """The VAE, ready to encode, and the image encoder, if the model reads pictures, on the device."""
        with ExitStack() as stack:
            vae = stack.enter_context(self._vae(call.tiles, self._runtime()).working())
            if self.models.image is not None and self.models.video.config.has_image_input:
                stack.enter_context(self._at_work(self.models.image, IMAGE_ENCODER_BYTES))
            yield LatentEncoder(vae=self.models.vae, encode=vae.encode)

    def _sampled(
        self,
        cond: Conditioning,
        latents: Tensor | None,
        prompts: Sequence[Conditioning],
        call: Call,
        size: VideoSize | None = None,
        checkpoint: Checkpoint | None = None,
        clips: int = 1,
    ) -> RunState:
        """The state at the end of the run; `size` in place of the call's."""
        size, model = size or call.size, call.model
        cond = model.fit(cond.to(self.device), size)
        inputs = RunInputs(cond, size.latent, latents, tuple(prompts))
        runtime = self._runtime(call.progress, call.settings.total_steps * clips)
        return model.sample(inputs, call.settings, self.memory, runtime, checkpoint=checkpoint)

    def _output(self, latents: Tensor, call: Call) -> Any:
        """Normalised latents as what the call asks for."""
        vae = self._decoder(call)

        def frames(video: Tensor) -> Iterator[Image.Image]:
            return chain.from_iterable(map(pixels_to_images, vae.decode_pieces(video)))

        if call.output_type == "latent":
            return latents.to(self.device)
        if call.output_type == "stream":
            return frames(latents)
        if call.output_type == "tensor":
            return vae.decode(latents)
        videos = [list(frames(video)) for video in latents.split(1)]
        return videos[0] if len(videos) == 1 else videos

    def _decoder(self, call: Call) -> VaeHandle:
        """What makes the frames that the call returns."""
        vae = self._vae(call.tiles, self._runtime())
        if call.decoder == DECODERS[0]:
            return vae
        assert self.models.tiny_autoencoder is not None, "checked by `Call.of`"
        log.info("Decoded by the tiny autoencoder: an approximation.")
        return replace(vae, vae=self.models.tiny_autoencoder)

    def _vae(self, tiles: Tiles, runtime: Runtime) -> VaeHandle:
        return VaeHandle(vae=self.models.vae, runtime=runtime, tiles=tiles, memory=self.memory)

    def _at_work(self, module: torch.nn.Module, activations: int) -> AbstractContextManager[torch.nn.Module]:
        return working_encoder(module, self._runtime(), self.memory, activations)

    def _runtime(self, progress_bar_cmd: ProgressBar | None = None, steps: int = 0) -> Runtime:
        # A bar counts an item when the next one is asked for, so the first is taken before the first step.
        bar = iter(progress_bar_cmd(range(steps))) if progress_bar_cmd else iter(())
        next(bar, None)

        def advance(phase: str, done: int, total: int, latents: Tensor | None) -> None:
            next(bar, None)

        return Runtime(device=self.device, dtype=self.torch_dtype, on_progress=advance)


def _prompts_of_windows(window_prompts: Sequence[Prompt], prompt: Prompt, settings: SamplerSettings) -> list[list[str]]:
    """The prompts of each window, one for each video."""
    if isinstance(window_prompts, str) or not isinstance(window_prompts, Sequence):
        raise ValueError(f"window_prompts must be a list with a prompt for each window; got {window_prompts!r}.")
    if window_prompts and settings.windows is None:
        raise ValueError("window_prompts needs windows: give sliding_window_size and sliding_window_stride.")
    videos, found = len(as_prompts(prompt)), []
    for texts in (as_prompts(text, "window_prompts") for text in window_prompts):
        if len(texts) not in (1, videos):
            raise ValueError(f"window_prompts must hold one prompt or {videos}, as in prompt, for each; got {texts!r}.")
        found.append(texts * (videos // len(texts)))
    return found


def _with_keyframes(inputs: VideoInputs, keyframes: Any, model: VideoModel, size: VideoSize, fit: Fit) -> VideoInputs:
    """`inputs` with pictures at frames, in the form that the model takes."""
    whole = isinstance(keyframes, Mapping) and all(type(plain_number(frame)) is int for frame in keyframes)
    if not whole:
        raise ValueError(f"keyframes must hold a picture for each number of a frame; got {keyframes!r:.100}.")
    pictures = {int(frame): as_frames(picture, f"keyframe {frame}") for frame, picture in keyframes.items()}
    fields = keyframe_inputs(model.variant, pictures, size, fit)
    twice = [name for name in fields if getattr(inputs, name) is not None]
    if twice:
        raise ValueError(f"keyframes take the place of {', '.join(twice)}; give one of them.")
    return replace(inputs, **fields)
