"""The workflows of films that go on: more clips after a film, and a film from picture to picture."""

from dataclasses import dataclass
from typing import Any

from tools.graph import Graph, Stage, Step
from tools.templates import both, chinese
from tools.workflow_texts import loaders, recommended, uses_image_encoder
from wan_core.catalog import TI2V_BASE, CatalogRow, published
from wan_core.conditioning.film import KEPT_FRAMES

NEXT = "The ball rolls on over the hills, soft light\nIt comes to rest beside a lake at sunset"
"""What the clips show, one line each."""


@dataclass(frozen=True)
class FilmGraph:
    """One workflow: its title, what it does, and its checkpoint."""

    title: str
    what: str
    model_id: str


FILMS = {
    "extend_ti2v_5b": FilmGraph(
        "Continue a film", "Two clips follow a film; each begins with the last frames of what is before it.", TI2V_BASE
    ),
    "extend_vace_1.3b": FilmGraph(
        "Continue a film with VACE",
        "Two clips follow a film; the last frames of what is before are the kept part of each.",
        "Wan-AI/Wan2.1-VACE-1.3B",
    ),
    "segments_flf2v_720p": FilmGraph(
        "From picture to picture",
        "A clip leads from each picture to the next, and a last one back to the first.",
        "Wan-AI/Wan2.1-FLF2V-14B-720P",
    ),
}
TITLES = {name: film.title for name, film in FILMS.items()}


def describe(name: str) -> Graph:
    """The workflow called `name`, with the preset of its checkpoint."""
    film, extends = FILMS[name], name.startswith("extend")
    row = published(film.model_id)
    sources = _film(row) if extends else _pictures(row)
    links = {"model": ("Load model", 0), "conditioning": (sources[-1].title, 0), "prompts": ("Prompts", 0)}
    size = {name: getattr(row.preset, name) for name in ("width", "height", "num_frames")}
    prompts = {"text_encoder": ("Load text encoder", 0), "negative_prompt": row.preset.negative_prompt}
    text = NEXT.splitlines()[0]
    stages = [
        Stage("Models", loaders(row)),
        Stage(
            "Prompt",
            [
                Step("Prompt", "WanCoreTextEncode", {**prompts, "prompt": text}),
                Step("Prompts", "WanCoreWindowPrompts", {**prompts, "prompts": NEXT}),
            ],
        ),
        Stage("Inputs", sources[:-1]),
        Stage("Conditioning", sources[-1:]),
        Stage(
            "Sampling",
            [Step("Sampler", "WanCoreSampler", {**_sampler(links, extends=extends), **recommended(row), **size})],
        ),
        Stage("Video", _video(name, row, extends=extends)),
    ]
    return Graph(name, _note(film, extends=extends), stages)


def _sampler(links: dict[str, Any], *, extends: bool) -> dict[str, Any]:
    # The prompts of segments are in the conditioning of each.
    return links if extends else {name: link for name, link in links.items() if name != "prompts"}


def _shared(row: CatalogRow) -> dict[str, Any]:
    shared = {"model": ("Load model", 0), "conditioning": ("Prompt", 0), "vae": ("Load VAE", 0)}
    return {**shared, "image_encoder": ("Load image encoder", 0)} if uses_image_encoder(row) else shared


def _film(row: CatalogRow) -> list[Step]:
    extension = {"clips": len(NEXT.splitlines()), "clip_frames": row.preset.num_frames, "keep_frames": KEPT_FRAMES}
    return [
        Step("Film", "LoadVideo", {"file": "source.mp4"}),
        Step("Film frames", "GetVideoComponents", {"video": ("Film", 0)}),
        Step("Extend film", "WanCoreExtend", {**_shared(row), **extension, "images": ("Film frames", 0)}),
    ]


def _pictures(row: CatalogRow) -> list[Step]:
    size = {name: getattr(row.preset, name) for name in ("width", "height", "num_frames")}
    links = {"images": ("Second picture", 0), "references": ("Pictures", 0), "prompts": ("Prompts", 0)}
    return [
        Step("First picture", "LoadImage", {"image": "start.png"}),
        Step("Second picture", "LoadImage", {"image": "end.png"}),
        Step("Pictures", "WanCoreVaceReferences", {"images": ("First picture", 0)}),
        Step("Segments", "WanCoreSegments", {**_shared(row), **size, **links, "loop": True}),
    ]


def _video(name: str, row: CatalogRow, *, extends: bool) -> list[Step]:
    shared = {"film": ("Film frames", 0), "shared_frames": ("Extend film", 1)} if extends else {}
    new = ("Extend film", 2) if extends else ("Join clips", 2)
    file = {"filename_prefix": f"video/wancore_{name}", "format": "mp4", "codec": "h264"}
    return [
        Step("Decode", "WanCoreVAEDecode", {"vae": ("Load VAE", 0), "latent": ("Sampler", 0)}),
        Step("Join clips", "WanCoreJoinClips", {"images": ("Decode", 0), **shared}),
        Step("Drift meter", "WanCoreDriftMeter",
             {"images": ("Join clips", 0), "clip_frames": new, "first_frames": ("Join clips", 1)}),
        Step("Create video", "CreateVideo", {"images": ("Join clips", 0), "fps": row.preset.fps}),
        Step("Save video", "SaveVideo", {"video": ("Create video", 0), **file}),
    ]  # fmt: skip


def _note(film: FilmGraph, *, extends: bool) -> str:
    how, zh = (
        (
            "Choose your film in *Film*, and write a line of *Prompts* for each clip. A longer `keep_frames` makes "
            "joints smoother. Any image-to-video, Fun InP or VACE model does the same. Link *Long Run* to the sampler, "
            "and a run that was stopped goes on after its last finished clip.",
            "选择自己的影片，每段写一行提示词。`keep_frames` 越大，接缝越平滑。"
            "图生视频、Fun InP 和 VACE 模型都可以这样用。"
            "把“长时间运行”接到采样器，中断后会从最后完成的一段继续。",
        )
        if extends
        else (
            "Choose your pictures, and write a line of *Prompts* for each clip. More pictures: chain *Pictures*. Any "
            "image-to-video, Fun InP or VACE model does the same.",
            "选择自己的图片，每段写一行提示词。要更多图片，就串联“VACE 参考图”。"
            "图生视频、Fun InP 和 VACE 模型都可以这样用。",
        )
    )
    end = (
        "*Drift meter* shows whether joints can be seen. All about it is in `docs/films.md` of the pack. "
        "“漂移测量”显示能否看出接缝。详见本节点包的 `docs/films.md`。"
    )
    parts = [f"## {both(film.title)}", f"{film.what} {chinese(film.what)}", how, zh, end]
    return "\n\n".join(parts)
