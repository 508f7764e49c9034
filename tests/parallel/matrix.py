"""Films whose result must not depend on the number of ranks: by name, one for each feature and each structure.

The suite runs some of them. `python -m tests.parallel.matrix` runs all of them on 2, 4 and 8 ranks and prints the
largest difference from one process, relative to the largest value.
"""

import os
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

os.environ.setdefault("WANCORE_DETERMINISTIC", "1")
if __name__ == "__main__":
    from pack import register

    register()

from safetensors.torch import save_file

from tests.lora.fixtures import WRITERS, factors, linear_paths
from tests.parallel.cases import Film, film
from tests.parallel.pool import Pool
from tests.reference import filled
from wan_core import bundled
from wan_core.cache_settings import EasyCacheSettings, FirstBlockSettings, MagCacheSettings, TeaCacheSettings
from wan_core.models.dit import WanDiT
from wan_core.settings import (
    GuidanceSettings,
    MemorySettings,
    NagSettings,
    SamplerSettings,
    SkipSettings,
    WindowSettings,
)
from wan_core.types import LatentSize

GUIDED = GuidanceSettings(scale=3.0)
RUN = SamplerSettings(steps=2, seed=2, shift=3.0, guidance=GUIDED)
LONG = replace(RUN, steps=6)
ODD = LatentSize(4, 6, 10)
"""60 tokens: uneven on 8 ranks."""
UNEVEN = LatentSize(3, 2, 14)
"""21 tokens: uneven on 2, 4 and 8 ranks."""
SMALL = replace(bundled.DITS["t2v"], num_layers=3)
SMALL_VACE = replace(bundled.DITS["vace"], num_layers=3)


def guided(**changes) -> SamplerSettings:
    return replace(RUN, guidance=GuidanceSettings(**({"scale": 3.0} | changes)))


def structures() -> dict[str, Film]:
    """Every bundled structure."""
    return {name: Film(name, RUN, speed=name == "t2v") for name in bundled.DITS}


def heads(folder: Path) -> dict[str, Film]:
    """The widths of the published models, from files, whose pages the ranks share."""
    films = {}
    for name, dim in {"12 heads": 1536, "40 heads": 5120}.items():
        config, place = replace(SMALL, dim=dim, ffn_dim=256, num_layers=1), folder / name
        place.mkdir(exist_ok=True)
        films[name] = Film("t2v", RUN, UNEVEN, config, memory=MemorySettings(), folder=place)
    return films


def features() -> dict[str, Film]:
    """What a run can be asked for, each with a structure that has most kinds of inputs."""
    caches = {
        "teacache": TeaCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B", start_step=2),
        "magcache": MagCacheSettings(threshold=1000.0, template="Wan2.1-T2V-1.3B"),
        "easycache": EasyCacheSettings(threshold=0.3, start_step=2),
        "first block": FirstBlockSettings(threshold=0.3, start_step=2, max_skips=2),
    }
    runs = {
        "no guidance": guided(scale=1.0),
        "batched": guided(mode="batched"),
        "interleaved": guided(mode="interleaved"),
        "guidance for a while": replace(LONG, guidance=GuidanceSettings(scale=(3.0, 1.0), end=0.6)),
        "zero star": guided(zero_star=True, zero_steps=1),
        "nag": guided(scale=1.0, nag=NagSettings(scale=5.0)),
        "skipped blocks": guided(skip=SkipSettings(blocks=(1,))),
        "a skipping branch": guided(skip=SkipSettings(blocks=(1,), scale=2.0)),
        "a skipping branch alone": guided(scale=1.0, skip=SkipSettings(blocks=(1,), scale=2.0)),
        "heun": replace(LONG, solver="heun"),
        "dpm++": replace(LONG, solver="dpm++"),
        "er_sde": replace(LONG, solver="er_sde"),
        "windows": replace(RUN, windows=WindowSettings(size=3, stride=2)),
        "a chain": replace(RUN, windows=WindowSettings(size=3, stride=2, mode="chain")),
        **{name: replace(LONG, cache=cache) for name, cache in caches.items()},
        "easycache in windows": replace(LONG, cache=caches["easycache"], windows=WindowSettings(size=3, stride=2)),
        "first block, batched": replace(
            LONG, cache=caches["first block"], guidance=GuidanceSettings(scale=3.0, mode="batched")
        ),
    }
    films = {name: Film("vace", run, ODD, SMALL_VACE) for name, run in runs.items()}
    films["two videos"] = Film("t2v", RUN, ODD, SMALL, batch=2)
    films["two experts"] = Film("t2v", LONG, ODD, SMALL, experts=2)
    films["experts of other guidance"] = Film(
        "t2v", replace(LONG, guidance=GuidanceSettings(scale=3.0, scale_low=1.0)), ODD, SMALL, experts=2
    )
    films["uneven tokens"] = Film("t2v", RUN, UNEVEN, SMALL)
    films["one frame"] = Film("t2v", RUN, LatentSize(1, 6, 10), SMALL)
    return films


def stored(folder: Path) -> dict[str, Film]:
    """Models from files: LoRA, FP8 and streamed weights."""
    lora = folder / "lora.safetensors"
    dit = filled(WanDiT, SMALL)
    save_file(WRITERS["DiffSynth"](factors(dit, linear_paths(dit))), lora)
    plain = Film("t2v", LONG, ODD, SMALL, memory=MemorySettings(), folder=folder)
    streamed = MemorySettings(persistent_params=0)
    return {
        "lora": replace(plain, lora=lora),
        "fp8": replace(plain, weights="fp8"),
        "streamed": replace(plain, memory=streamed),
        "streamed fp8 with lora": replace(plain, memory=streamed, weights="fp8", lora=lora),
        "streamed experts": replace(plain, memory=streamed, experts=2),
    }


def everything(folder: Path) -> dict[str, Film]:
    return features() | stored(folder) | structures() | heads(folder)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, relative to the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def differences(pool: Pool, each: Film, counts: tuple[int, ...]) -> Iterator[tuple[int, float]]:
    """By the number of ranks."""
    expected = film(None, each)[0].latents
    for count in counts:
        yield count, difference(pool.run(count, "film", each)[0].latents, expected)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Path(folder))
        films = everything(Path(folder))
        for name in words or films:
            began = time.monotonic()
            found = ", ".join(f"{count}: {number:.1e}" for count, number in differences(pool, films[name], (2, 4, 8)))
            print(f"{name:28} {found}  ({time.monotonic() - began:.0f} s)", flush=True)
        pool.close()


if __name__ == "__main__":
    main(sys.argv[1:])
