"""Whether the bundled models draw what they are asked for: `python -m tools.family judge [FOLDER]`.

Every row of the table makes films through `WanVideoPipeline` and has `trainer.data.judge` read them. Without a folder
the weights that the pack brings are judged, else those of a training, as they would be stored.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image

from wan_core import ModelConfig, WanVideoPipeline, bundled, catalog
from wan_core.decode import decode, encode
from wan_core.loading.save_gguf import save_gguf
from wan_core.model_files import inspect
from wan_core.runtime import Runtime
from wan_core.tiling import TileSettings
from wancore.trainer.data.judge import ATTRIBUTES, measure, overlap, psnr, score
from wancore.trainer.data.synthetic import CAMERAS, COLOURS, Frames, Scene

from . import store

PRESET = catalog.TINY_PRESET
SIZE = {"width": PRESET.width, "height": PRESET.height, "num_frames": PRESET.num_frames}
FIRST_SEED = 2**31 + 1000
"""Of scenes that no training draws."""
BATCH = 10
DIRECTIONS = [name for name in CAMERAS if name not in ("In", "Out")]
RUNTIME = Runtime(device=torch.device("cpu"), dtype=torch.float32)
TILES: Mapping[str, tuple[int, int]] = {"size": (6, 8), "stride": (4, 6)}
"""In latent cells; a clip has 8 x 12 of them."""
SPEEDS = (10.0, 50.0, 90.0)


@dataclass(frozen=True)
class Score:
    """One number of the table.

    Attributes:
        row, what: what was asked for, and what was measured.
        value, target: a share from 0 to 1, or decibels; the target is the least.
        count: of films.
    """

    row: str
    what: str
    value: float
    target: float
    count: int

    @property
    def error(self) -> float:
        """One standard deviation of a share of that many films; 0 of what is no share."""
        share = min(max(self.value, 0.0), 1.0)
        return float(np.sqrt(share * (1 - share) / self.count)) if self.value == share else 0.0


def scenes(count: int, held_out: bool = False, **fixed: Any) -> list[Scene]:
    """Scenes of seeds that no training has seen; with `held_out` only combinations that none has seen either."""
    found: list[Scene] = []
    seed = FIRST_SEED
    while len(found) < count:
        scene = Scene.random(seed, **fixed)
        if scene.is_held_out or not held_out:
            found.append(scene)
        seed += 1
    return found


def pictures(frames: Frames) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in frames]


class Family:
    """The bundled models in a folder, with their pipelines."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.pipe = cache(self._pipe)

    @staticmethod
    def has(*names: str) -> bool:
        """Whether all of these weights are trained."""
        return all((bundled.TRAINED / f"{name}.safetensors").exists() for name in names)

    def _pipe(self, variant: str = "t2v", is_pair: bool = False, speed: bool = False, **dit: Any) -> WanVideoPipeline:
        """The pipeline of a bundled model; `dit` are settings of its transformer's `ModelConfig`."""
        row = catalog.find_row(catalog.tiny_id(variant, is_pair))
        assert row is not None
        vae, vae_file = row.vae
        patterns = [(catalog.TINY, catalog.TEXT_ENCODER_PATTERN), (vae, vae_file)]
        patterns += [(catalog.TINY, catalog.IMAGE_ENCODER_PATTERN)] * row.needs_image_encoder
        patterns += [(catalog.TINY, catalog.MOTION_CONTROLLER_PATTERN)] * speed
        own = {"model_id": row.model_id, **dit}
        files = [ModelConfig(**own) if "path" in dit else ModelConfig(origin_file_pattern=p, **own) for p in row.files]
        files += [ModelConfig(model_id=model, origin_file_pattern=pattern) for model, pattern in patterns]
        return WanVideoPipeline.from_pretrained(torch.float32, "cpu", files, local_model_path=self.root)

    def films(self, pipe: WanVideoPipeline, shown: Sequence[Scene], **call: Any) -> list[Frames]:
        """A film of each scene's caption, several at a time; each has noise of its own."""
        made: list[Frames] = []
        for start in range(0, len(shown), BATCH):
            prompts = [scene.caption(start + i) for i, scene in enumerate(shown[start : start + BATCH])]
            made += self.film(pipe, prompts, seed=start, **call)
        return made

    @staticmethod
    def film(pipe: WanVideoPipeline, prompts: Sequence[str], **call: Any) -> list[Frames]:
        """A film of each prompt, (T, H, W, 3) in uint8."""
        settings = {"num_inference_steps": PRESET.steps, "cfg_scale": PRESET.cfg, "sigma_shift": PRESET.shift}
        call = {**SIZE, **settings, "progress_bar_cmd": None, **call}
        pixels = pipe(list(prompts), output_type="tensor", **call)
        assert isinstance(pixels, torch.Tensor)
        return as_frames(pixels)

    def each(
        self, pipe: WanVideoPipeline, shown: Sequence[Scene], inputs: Callable[[Scene], Mapping[str, Any]], **call: Any
    ) -> Iterator[tuple[Scene, Frames]]:
        """A film of each scene with inputs that are made of it."""
        for index, scene in enumerate(shown):
            given = {**inputs(scene), **call}
            prompt = given.pop("prompt", scene.caption(index))
            yield scene, self.film(pipe, [prompt], seed=index, **given)[0]


def as_frames(pixels: torch.Tensor) -> list[Frames]:
    """Clips (T, H, W, 3) in uint8 of pixels (B, 3, T, H, W) in [-1, 1]."""
    return [clip.permute(1, 2, 3, 0).add(1).mul(127.5).round().byte().numpy() for clip in pixels]


def drawn(scene: Scene) -> Any:
    """The scene at the size of the bundled models."""
    return scene.drawn(*SIZE.values())


def shares(row: str, films: Sequence[Frames], shown: Sequence[Scene], targets: Mapping[str, float]) -> Iterator[Score]:
    found = score([measure(film) for film in films], shown)
    yield from (Score(row, what, found[what], target, len(shown)) for what, target in targets.items())


def autoencoder(family: Family, count: int) -> Iterator[Score]:
    """Clips through the VAE and back, whole and in tiles."""
    vae = family.pipe().models.vae
    clips = [drawn(scene).video for scene in scenes(count)]
    pixels = torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    latents = encode(vae, pixels, None, RUNTIME)
    whole, tiled = (as_frames(decode(vae, latents, tiles, RUNTIME)) for tiles in (None, TileSettings(**TILES)))
    yield Score("VAE", "PSNR, dB", mean(map(psnr, whole, clips)), 32, count)
    yield Score("VAE", "the same in tiles, dB", mean(map(psnr, tiled, clips)), 32, count)


TEXT_TARGETS = {"colour": 0.95, "ground": 0.98, "shape": 0.85, "motion": 0.85, "all": 0.75}


def text(family: Family, count: int) -> Iterator[Score]:
    """Text to video, of scenes that no training has seen."""
    shown = scenes(count)
    yield from shares("T2V", family.films(family.pipe(), shown), shown, TEXT_TARGETS)


def unseen(family: Family, count: int) -> Iterator[Score]:
    """The same of combinations that no training has seen."""
    shown = scenes(count, held_out=True)
    yield from shares("T2V, new combinations", family.films(family.pipe(), shown), shown, TEXT_TARGETS)


def guidance(family: Family, count: int) -> Iterator[Score]:
    """What a negative prompt, the scale and the seed change."""
    pipe, shown = family.pipe(), scenes(count)
    avoided = [scene.caption(i) for i, scene in enumerate(shown)]
    films = [family.film(pipe, [""], negative_prompt=text, seed=i)[0] for i, text in enumerate(avoided)]
    other = np.mean([measure(f).colour != s.colour or measure(f).ground != s.ground
                     for f, s in zip(films, shown, strict=True)])  # fmt: skip
    yield Score("Negative prompt alone", "not what it names", float(other), 0.95, count)
    plain, weak = (
        score([measure(f) for f in family.films(pipe, shown, cfg_scale=scale)], shown)["all"] for scale in (5.0, 1.0)
    )
    yield Score("cfg 5 against 1", "gain of all four", plain - weak, 0.1, count)
    one, two = (family.film(pipe, [shown[0].caption(0)], seed=seed)[0] for seed in (1, 2))
    yield Score("Seeds", "1 where films of two differ", float(psnr(one, two) < 30), 1, 1)


def image(family: Family, count: int) -> Iterator[Score]:
    """A start picture becomes the first frame, and moves as prompted."""
    films = list(family.each(family.pipe("i2v"), scenes(count), lambda s: {"input_image": pictures(drawn(s).video)[0]}))
    yield Score("I2V", "first frame, dB", mean(psnr(f[0], drawn(s).video[0]) for s, f in films), 28, count)
    yield Score("I2V", "motion", mean(measure(f).motion == s.motion for s, f in films), 0.8, count)


def first_last(family: Family, count: int) -> Iterator[Score]:
    def ends(scene: Scene) -> dict[str, Any]:
        first, *_, last = pictures(drawn(scene).video)
        return {"input_image": first, "end_image": last}

    films = list(family.each(family.pipe("i2v"), scenes(count), ends))
    for what, place in (("first", 0), ("last", -1)):
        value = mean(psnr(f[place], drawn(s).video[place]) for s, f in films)
        yield Score("FLF2V", f"{what} frame, dB", value, 28, count)


def control(family: Family, count: int) -> Iterator[Score]:
    """The shape is where the outline of the control clip is."""
    clips = lambda scene: {"control_video": pictures(drawn(scene).edges)}  # noqa: E731
    films = list(family.each(family.pipe("fun_v1_1_control"), scenes(count), clips))
    value = mean(overlap(measure(f).masks, drawn(s).masks > 0.5) for s, f in films)
    yield Score("Control", "overlap with the shape", value, 0.8, count)
    yield Score("Control", "colour", mean(measure(f).colour == s.colour for s, f in films), 0.9, count)


def reference(family: Family, count: int) -> Iterator[Score]:
    """The colour of the reference picture, which the prompt does not name."""

    def inputs(scene: Scene) -> dict[str, Any]:
        words = scene.caption(0, names_colour=False)
        picture = drawn(scene).reference()
        return {"control_video": pictures(drawn(scene).edges), "reference_image": picture, "prompt": words}

    films = list(family.each(family.pipe("fun_v1_1_control"), scenes(count), inputs))
    yield Score("Reference", "its colour", mean(measure(f).colour == s.colour for s, f in films), 0.9, count)
    value = mean(overlap(measure(f).masks, drawn(s).masks > 0.5) for s, f in films)
    yield Score("Reference", "overlap with the control", value, 0.8, count)


def camera(family: Family, count: int) -> Iterator[Score]:
    """The ground moves against the camera, in all eight directions."""
    shown = [replace(s, camera=DIRECTIONS[i % 8]) for i, s in enumerate(scenes(count, motion="still", pace=None))]

    def inputs(scene: Scene) -> dict[str, Any]:
        move = {"camera_control_direction": scene.camera, "camera_control_speed": scene.camera_speed}
        return {"input_image": pictures(drawn(scene).video)[0], **move}

    films = list(family.each(family.pipe("fun_camera"), shown, inputs))
    yield Score("Camera", "direction", mean(measure(f).camera == s.camera for s, f in films), 0.9, count)


def vace(family: Family, count: int) -> Iterator[Score]:
    """Another shape in place of the masked one, and the same picture around it."""
    pipe, shown = family.pipe("vace"), scenes(count)
    colours = list(COLOURS)
    wanted = [replace(s, colour=colours[(colours.index(s.colour) + 1 + i) % len(colours)]) for i, s in enumerate(shown)]
    outside, inside = [], []
    for index, (scene, target) in enumerate(zip(shown, wanted, strict=True)):
        drawing = drawn(scene)
        given = {"vace_video": pictures(drawing.masked), "vace_video_mask": pictures(drawing.mask_video)}
        film = family.film(pipe, [target.caption(index)], seed=index, **given)[0]
        kept = drawing.mask_video[..., :1] < 128
        error = ((film.astype(float) - drawing.video) ** 2)[np.broadcast_to(kept, film.shape)].mean()
        outside.append(10 * np.log10(255**2 / error))
        inside.append(measure(film).colour == target.colour)
    yield Score("VACE", "outside of the mask, dB", mean(outside), 28, count)
    yield Score("VACE", "colour inside", mean(inside), 0.9, count)


def speed(family: Family, count: int) -> Iterator[Score]:
    """A higher number moves farther."""
    pipe = family.pipe(speed=True)
    moving = [s for s in scenes(4 * count, pace=None) if s.motion in ("right", "left", "up", "down")][:count]
    ways = [[measure(film).speed for film in family.films(pipe, moving, motion_bucket_id=number)] for number in SPEEDS]
    rising = mean(slow < middle < fast for slow, middle, fast in zip(*ways, strict=True))
    yield Score("Speed 10, 50, 90", "farther each time", rising, 0.9, len(moving))


def style(family: Family, count: int, lora: Path | None = None) -> Iterator[Score]:
    """The dot of a LoRA, at three strengths."""
    shown = scenes(count)
    dots = []
    for strength in (0.0, 0.5, 1.0):
        pipe = family._pipe()
        pipe.load_lora(pipe.dit, lora or bundled.TRAINED / "lora_dotted.safetensors", alpha=strength, verbose=0)
        dots.append(mean(measure(film).dot > DOTTED for film in family.films(pipe, shown)))
    yield Score("Style LoRA", "dots at 1", dots[2], 0.9, count)
    yield Score("Style LoRA", "no dots at 0", 1 - dots[0], 0.95, count)
    yield Score("Style LoRA", "fewer at 0.5 than at 1, more than at 0", float(dots[0] <= dots[1] <= dots[2]), 1, count)


DOTTED = 0.35
"""The darkness of a middle at which a shape counts as dotted: half of what is drawn."""


def fast(family: Family, count: int) -> Iterator[Score]:
    """Faster ways, against the plain one on the same prompts and noise."""
    pipe, shown = family.pipe(), scenes(count)
    gguf = family.root / "q4.gguf"
    if not gguf.exists():
        save_gguf(inspect(family.root / catalog.TINY / catalog.DIT_FILE, "dit"), gguf, "Q4_0")
    ways: dict[str, tuple[Callable[[], WanVideoPipeline], dict[str, Any]]] = {
        "TeaCache 0.05": (lambda: pipe, {"tea_cache_l1_thresh": 0.05}),
        "TeaCache 0.1": (lambda: pipe, {"tea_cache_l1_thresh": 0.1}),
        "FP8": (lambda: family.pipe(offload_dtype=torch.float8_e4m3fn), {}),
        "GGUF Q4_0": (lambda: family.pipe(path=str(gguf)), {}),
        "windows": (lambda: pipe, {"sliding_window_size": 4, "sliding_window_stride": 1}),
        "tiled VAE": (lambda: pipe, {"tiled": True, "tile_size": TILES["size"], "tile_stride": TILES["stride"]}),
        "10 steps, UniPC": (lambda: pipe, {"num_inference_steps": 10, "solver": "unipc"}),
    }
    if family.has("lora_4step"):
        few = family._pipe()
        few.load_lora(few.dit, bundled.TRAINED / "lora_4step.safetensors", verbose=0)
        ways["4 steps with their LoRA"] = (lambda: few, {"num_inference_steps": 4, "cfg_scale": 1.0})
    plain = score([measure(f) for f in family.films(pipe, shown)], shown)
    names = (*ATTRIBUTES, "all")
    for name, (make, call) in ways.items():
        found = score([measure(f) for f in family.films(make(), shown, **call)], shown)
        loss = max(plain[n] - found[n] for n in names[:-1])
        yield Score(name, "most that an attribute loses, less than 0.05", 1 - loss, 0.95, count)


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


CHECKS: dict[str, tuple[Callable[[Family, int], Iterator[Score]], tuple[str, ...]]] = {
    "vae": (autoencoder, ("vae",)),
    "text": (text, ("dit_t2v",)),
    "unseen": (unseen, ("dit_t2v",)),
    "guidance": (guidance, ("dit_t2v",)),
    "image": (image, ("dit_i2v",)),
    "first_last": (first_last, ("dit_i2v",)),
    "control": (control, ("dit_fun_v1_1_control",)),
    "reference": (reference, ("dit_fun_v1_1_control",)),
    "camera": (camera, ("dit_fun_camera",)),
    "vace": (vace, ("dit_vace",)),
    "speed": (speed, ("speed",)),
    "style": (style, ("lora_dotted",)),
    "fast": (fast, ("dit_t2v",)),
}
"""By name what is judged, and the weights that it needs."""


@contextmanager
def weights_of(folder: Path | None, root: Path) -> Iterator[None]:
    """The weights of a training, stored below `root` as the pack would store them, in the place of the pack's own."""
    if folder is None:
        yield
        return
    store.pack(folder, root / "trained")
    with mock.patch.object(bundled, "TRAINED", root / "trained"):
        yield


def main(arguments: Sequence[str]) -> None:
    """Print the table, a row at a time."""
    parser = argparse.ArgumentParser(prog="python -m tools.family judge", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of a training; by default what the pack brings is judged")
    parser.add_argument("--count", type=int, default=200, help="of films for each row (default: 200)")
    parser.add_argument("--only", choices=list(CHECKS), nargs="+", default=list(CHECKS), metavar="NAME")
    words = parser.parse_args(arguments)
    sys.stdout.write("| what is asked | what is measured | measured | target | films |\n|-|-|-|-|-|\n")
    with tempfile.TemporaryDirectory() as place, weights_of(words.folder, Path(place)):
        family = Family(Path(place, "models"))
        for name in words.only:
            check, needed = CHECKS[name]
            if not family.has(*needed):
                sys.stdout.write(f"| {name} | | not trained | | |\n")
                continue
            for one in check(family, words.count):
                error = f" ± {one.error:.2f}" if one.error else ""
                sys.stdout.write(
                    f"| {one.row} | {one.what} | {one.value:.2f}{error} | {one.target:g} | {one.count} |\n"
                )
                sys.stdout.flush()
