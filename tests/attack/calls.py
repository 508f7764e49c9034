"""Wrong and odd calls of the Python surface: every argument with every value of a pool.

What must come of a call is known before it is made, from a table of what each argument takes: a value that it takes
must work and give finite numbers of the right shape, any other must be refused by an error with the argument's name.
"""

import contextlib
import functools
import itertools
import math
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests.attack import Trial
from wan_core import ModelConfig, WanVideoPipeline, load_state_dict, save_video
from wan_core.catalog import TINY

PATTERNS = ("diffusion_pytorch_model*.safetensors", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth")
CALL = {
    "height": 16, "width": 16, "num_frames": 1, "num_inference_steps": 2, "seed": 1, "progress_bar_cmd": iter,
    "output_type": "latent", "tile_size": (4, 4), "tile_stride": (1, 1),
}  # fmt: skip
PICTURE = Image.new("RGB", (20, 16), "red")

POOL: tuple[Any, ...] = (
    None, True, "", "5", "foo", b"x", [], [1], (1, 2), ["a"], {}, {"a": 1}, object(), math.nan, math.inf, -math.inf,
    0, -1, 1, 2, 0.5, 2.0, 1e300, -1e300, 10**400, -(10**30), np.float32(1), np.int64(2), np.array(1.0),
    np.bool_(True), np.array([1.0, 2.0]), torch.tensor(1.0), torch.float32, 1 + 1j, Decimal(1), Fraction(1, 2),
    Image.new("RGB", (0, 0)), PICTURE, [PICTURE, "b"], Path("nowhere"), "\0", "cuda:99", lambda: None,
    ModelConfig(), float,
)  # fmt: skip

Accepts = Callable[[Any], bool]


def _number(low: float, high: float, *, whole: bool = False, optional: bool = False) -> Accepts:
    def accepts(value: Any) -> bool:
        if value is None:
            return optional
        if isinstance(value, (np.generic, np.ndarray)) and np.ndim(value) == 0:
            value = value.item()
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            return False
        if value in (math.inf, -math.inf) or abs(value) >= 10**308:
            return False
        return not whole or value == int(value)

    return accepts


def _curve(low: float, high: float) -> Accepts:
    one = _number(low, high)

    def accepts(value: Any) -> bool:
        listed = _listed(value)
        return all(map(one, [value] if listed is None else listed)) and listed != []

    return accepts


def _one_of(*values: Any) -> Accepts:
    return lambda value: any(value is known or (isinstance(value, str) and value == known) for known in values)


def _listed(value: Any) -> list[Any] | None:
    """The members of a list, a tuple or an array of one axis."""
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim == 1 else None
    return list(value) if isinstance(value, (list, tuple)) else None


def _pair(value: Any) -> bool:
    listed = _listed(value) or []
    return len(listed) == 2 and all(
        isinstance(v, (int, np.integer)) and not isinstance(v, bool) and v > 0 for v in listed
    )


def _text(value: Any) -> bool:
    listed = [value] if isinstance(value, str) else value
    return isinstance(listed, (list, tuple)) and bool(listed) and all(isinstance(text, str) for text in listed)


NOTHING = _one_of(None)


def _may_be_a_number(value: Any) -> bool:
    kinds = (bool, str, Decimal, Fraction, np.bool_, np.ndarray, torch.Tensor)
    return isinstance(value, kinds)


ARGUMENTS: dict[str, Accepts] = {
    "prompt": _text, "negative_prompt": _text, "denoising_strength": _number(0, 1),
    "seed": _number(0, 2**64 - 1, whole=True, optional=True), "height": _number(1, 16384, whole=True),
    "width": _number(1, 16384, whole=True), "num_frames": _number(1, 100000, whole=True), "cfg_scale": _curve(0, 100),
    "num_inference_steps": _number(1, 10000, whole=True), "sigma_shift": _number(0.01, 1000),
    "rand_device": _one_of("cpu"), "tile_size": _pair, "tile_stride": _pair,
    "vace_scale": _curve(-1000, 1000), "motion_bucket_id": NOTHING, "input_image": NOTHING, "vace_video": NOTHING,
    "control_video": NOTHING, "reference_image": NOTHING, "vace_video_mask": NOTHING, "inpaint_video": NOTHING,
    "camera_control_direction": NOTHING, "camera_path": NOTHING, "fit": NOTHING, "solver": _one_of("euler"),
    "sliding_window_size": NOTHING, "sliding_window_stride": NOTHING, "output_type": _one_of("latent"),
    "tea_cache_l1_thresh": _number(0, math.inf, optional=True), "tea_cache_model_id": _one_of("", None),
    "progress_bar_cmd": NOTHING, "input_audio": _one_of(),
}  # fmt: skip
"""What each argument of a call takes, in a call of a text-to-video model that is otherwise right."""

CONFIGURATION: dict[str, Accepts] = {
    "path": NOTHING, "model_id": _one_of(), "origin_file_pattern": _one_of(), "offload_device": _one_of(None, "cpu"),
    "offload_dtype": _one_of(None, torch.float32), "onload_device": _one_of(None, "cpu"),
    "onload_dtype": _one_of(None, torch.float32), "computation_device": _one_of(None, "cpu"),
    "computation_dtype": _one_of(None, torch.float32), "quantize": NOTHING, "state_dict": NOTHING,
}  # fmt: skip
LOADING: dict[str, Accepts] = {
    "torch_dtype": _one_of(torch.float32), "device": _one_of("cpu"), "model_configs": _one_of(),
    "tokenizer_config": NOTHING, "vram_limit": _number(0, 100000, optional=True), "use_usp": _one_of(False),
}  # fmt: skip
FREE = {"progress_bar_cmd": callable, "save_video(fps=": _may_be_a_number, "save_video(quality=": _may_be_a_number}
"""Values that are not tried: a bar of the caller's own, and what the writer may take for a number or may refuse."""


@dataclass(frozen=True)
class Attempt:
    """One call: what it does, whether it must work, and what an error has to name."""

    name: str
    work: Callable[[], Any]
    must_work: bool
    named: tuple[str, ...]


def attack(count: int, seed: int) -> Iterator[Trial]:
    """Calls with one wrong or odd argument each, loads of the bundled model in between."""
    with tempfile.TemporaryDirectory() as folder:
        attempts = list(_attempts(Path(folder)))
        random.Random(seed).shuffle(attempts)
        for attempt in itertools.islice(attempts, count):
            yield _judged(attempt)


def _judged(attempt: Attempt) -> Trial:
    try:
        result = attempt.work()
    except ValueError as error:
        message = str(error)
        clear = not attempt.must_work and any(name in message for name in attempt.named) and len(message) < 2000
        return Trial(attempt.name, "clear" if clear else "raw", f"{type(error).__name__}: {message}")
    except TypeError as error:
        # Python's own answer to an argument that does not exist.
        clear = not attempt.must_work and "unexpected keyword argument" in str(error)
        return Trial(attempt.name, "clear" if clear else "raw", f"TypeError: {error}")
    except Exception as error:
        return Trial(attempt.name, "raw", f"{type(error).__name__}: {error}")
    if not attempt.must_work:
        return Trial(attempt.name, "raw", "taken without a word")
    finite = not isinstance(result, torch.Tensor) or bool(torch.isfinite(result).all())
    return Trial(attempt.name, "survived" if finite else "raw", "" if finite else "numbers that are not finite")


def _attempts(folder: Path) -> Iterator[Attempt]:
    configs = [ModelConfig(model_id=TINY, origin_file_pattern=p, local_model_path=folder) for p in PATTERNS]
    load = functools.partial(WanVideoPipeline.from_pretrained, torch.float32, local_model_path=folder)
    pipe = load(device="cpu", model_configs=configs)
    for argument, value in itertools.product(ARGUMENTS, POOL):
        if argument in FREE and FREE[argument](value):
            continue
        named = {"sliding_window_size": ("sliding_window",), "sliding_window_stride": ("sliding_window",)}
        named |= {"camera_control_direction": ("camera",), "camera_path": ("camera",), "negative_prompt": ("prompt",)}
        work = functools.partial(_film, pipe, {**CALL, "prompt": "a dog", argument: value})
        yield _attempt(f"pipe({argument}=", value, work, ARGUMENTS[argument], *named.get(argument, (argument,)))
    for argument, value in itertools.product(CONFIGURATION, POOL):
        changed = {"local_model_path": folder, "model_id": TINY, "origin_file_pattern": PATTERNS[0], argument: value}
        work = functools.partial(_loaded, load, changed, configs)
        words = (argument, argument.replace("_", " "), *_words(value))
        yield _attempt(f"ModelConfig({argument}=", value, work, CONFIGURATION[argument], *words)
    for argument, value in itertools.product(LOADING, POOL):
        given = {"torch_dtype": torch.float32, "device": "cpu", "model_configs": configs, argument: value}
        work = functools.partial(WanVideoPipeline.from_pretrained, local_model_path=folder, **given)
        yield _attempt(f"from_pretrained({argument}=", value, work, LOADING[argument], argument, "ModelConfig")
    film = functools.partial(save_video, [PICTURE] * 2, str(folder / "film.mp4"))
    refused = _one_of()
    for value in POOL:
        for name, work, accepts, *named in (
            ("pipe.dit.load_state_dict(", functools.partial(_kept, pipe, value), refused, "state_dict"),
            ("pipe.load_lora(lora_config=", functools.partial(pipe.load_lora, pipe.dit, value), refused, "lora_config",
             "ModelConfig", *_words(value)),
            ("pipe.load_lora(state_dict=", functools.partial(pipe.load_lora, pipe.dit, state_dict=value), refused,
             "state_dict"),
            ("pipe.load_lora(module=", functools.partial(pipe.load_lora, value, "x.pth"), refused, "A LoRA is applied"),
            ("load_state_dict(", functools.partial(load_state_dict, value), refused, "file_path", *_words(value)),
            ("save_video(fps=", functools.partial(film, fps=value), _number(1e-3, 1000), "fps"),
            ("save_video(quality=", functools.partial(film, fps=8, quality=value), _number(0, 10), "quality"),
            ("save_video(frames=", functools.partial(save_video, value, folder / "film.mp4", 8), refused, "frame",
             "video", "picture"),
        ):  # fmt: skip
            if not (name in FREE and FREE[name](value)):
                yield _attempt(name, value, work, accepts, *named)


def _attempt(what: str, value: Any, work: Callable[[], Any], accepts: Accepts, *named: str) -> Attempt:
    return Attempt(f"{what}{_shown(value)[:60]})", work, bool(accepts(value)), tuple(filter(None, named)))


def _words(value: Any) -> list[str]:
    """What an error about files calls `value`: the file's name."""
    return [str(name) for name in (_listed(value) or [value]) if isinstance(name, (str, Path))]


def _shown(value: Any) -> str:
    return str(value) if isinstance(value, (str, Path)) and value else repr(value).split(" at 0x")[0]


def _film(pipe: WanVideoPipeline, call: dict[str, Any]) -> Any:
    film = pipe(**call)
    videos = len(call["prompt"]) if isinstance(call["prompt"], (list, tuple)) else 1
    assert film.shape[:2] == (videos, 16), f"a film of {tuple(film.shape)}"
    return film


def _loaded(load: Callable[..., Any], changed: dict[str, Any], configs: list[ModelConfig]) -> Any:
    pipe = load(device="cpu", model_configs=[ModelConfig(**changed), *configs[1:]])
    return pipe(**CALL, prompt="a dog")


def _kept(pipe: WanVideoPipeline, value: Any) -> None:
    """Load `value` as weights; when that is refused, the weights must be those from before."""
    before = pipe.dit.head.head.weight.clone()
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: _same(before, pipe.dit.head.head.weight))
        pipe.dit.load_state_dict(value)


def _same(before: torch.Tensor, after: torch.Tensor) -> None:
    if not torch.equal(before, after):
        raise RuntimeError("the weights were changed")
