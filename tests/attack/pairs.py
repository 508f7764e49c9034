"""Two processes at once that want the same: neither may lose what is its own, or take what is the other's."""

import itertools
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.attack import Trial
from tests.attack.processes import ROOT, files, partial_files, scratch, start
from tests.attack.work import Bench, bench, results, training

PROMPTS = ROOT / "models" / "wancore_prompts"
"""Where runs without ComfyUI keep encoded prompts."""

Kind = Callable[[Bench, Path, float], Trial]


QUICK = 3
"""Trials in the tests: pairs of samplings and of conversions."""


def attack(count: int, seed: int) -> Iterator[Trial]:
    moments = random.Random(seed)
    with scratch("pairs") as folder:
        for number, (name, kind) in zip(range(count), itertools.cycle(KINDS.items()), strict=False):
            out = folder / f"trial_{number}"
            out.mkdir()
            apart = moments.choice((0.0, moments.random() * 0.3))
            try:
                trial = kind(bench(), out, apart)
            except TimeoutError as error:
                trial = Trial(name, "hang", str(error))
            yield Trial(f"{name}, {apart:.3f} s apart", trial.verdict, trial.detail)


def both(module: str, words: tuple, out: Path, apart: float, other: tuple | None = None) -> list[tuple[int, str]]:
    """Exit codes and outputs of two processes that start so many seconds apart."""
    first = start(module, words, out.parent / "first.log")
    time.sleep(apart)
    second = start(module, words if other is None else other, out.parent / "second.log")
    return [(process.wait(), process.output) for process in (first, second)]


def same_run(bench: Bench, out: Path, apart: float) -> Trial:
    """Both give a video and its latents, under numbers of their own."""
    expected = bench.undisturbed("sample")[0]
    ended = both(bench.jobs["sample"].module, bench.jobs["sample"].words(out), out, apart)
    if any(code for code, _ in ended):
        return Trial("", "raw", str(ended)[-400:])
    found = results(bench.jobs["sample"], out)
    for suffix in (".mp4", ".latent"):
        (content,) = (content for name, content in expected.items() if name.endswith(suffix))
        made = [own for name, own in found.items() if name.endswith(suffix)]
        # One that goes on with the other's run does not keep its latents a second time.
        if any(own != content for own in made) or (len(made) != 2 and (suffix == ".mp4" or not made)):
            return Trial("", "lost", f"{len(made)} of {suffix}: {sorted(found)}")
    return clean(out, len(found))


def same_name(bench: Bench, out: Path, apart: float) -> Trial:
    """Two different videos under one name: both are there."""
    words = bench.jobs["sample"].words(out)
    ended = both("headless.cli", words, out, apart, (*words, "--set", "Sampler.seed=6"))
    if any(code for code, _ in ended):
        return Trial("", "raw", str(ended)[-400:])
    found = results(bench.jobs["sample"], out)
    for suffix in (".mp4", ".latent"):
        if len({content for name, content in found.items() if name.endswith(suffix)}) != 2:
            return Trial("", "lost", f"{sorted(found)}")
    return clean(out, 4)


def one_new_file(name: str) -> Kind:
    """One writes the file, the other is told that it may not; or one after the other, both are told the same."""

    def run(bench: Bench, out: Path, apart: float) -> Trial:
        expected = bench.undisturbed(name)[0]
        ended = both(bench.jobs[name].module, bench.jobs[name].words(out), out, apart)
        if sorted(code for code, _ in ended) != [0, 2]:
            return Trial("", "raw", str(ended)[-400:])
        (said,) = (said for code, said in ended if code)
        if results(bench.jobs[name], out) != expected:
            return Trial("", "lost", f"{sorted(files(out))}")
        if "being written by another process" not in said and "exists already" not in said:
            return Trial("", "raw", said[-300:])
        return clean(out, 1)

    return run


def two_trainings(bench: Bench, out: Path, apart: float) -> Trial:
    """One trains as if it were alone, the other is told of it, or finds it finished."""
    expected = bench.undisturbed("train")[0]
    ended = both("trainer.train", bench.jobs["train"].words(out), out, apart)
    codes = sorted(code for code, _ in ended)
    if codes not in ([0, 2], [0, 0]):
        return Trial("", "raw", str(ended)[-400:])
    if codes == [0, 2] and "Another training is at work" not in "".join(said for code, said in ended if code == 2):
        return Trial("", "raw", str(ended)[-400:])
    if results(bench.jobs["train"], out) != expected:
        return Trial("", "lost", f"{sorted(files(out))}")
    return clean(out)


def one_cache(bench: Bench, out: Path, apart: float) -> Trial:
    """Two trainings in folders of their own fill one cache of encoded samples."""
    folders = [out / "a", out / "b"]
    words = [training(bench.folder, folder, cache_dir=str(out / "cache")) for folder in folders]
    ended = both("trainer.train", words[0], out, apart, words[1])
    if any(code for code, _ in ended):
        return Trial("", "raw", str(ended)[-400:])
    first, second = (results(bench.jobs["train"], folder) for folder in folders)
    return clean(out) if first == second else Trial("", "lost", "the two differ")


def text_cache(bench: Bench, out: Path, apart: float) -> Trial:
    """Two runs keep the same prompts in one folder; both are right, and so is what they keep."""
    shutil.rmtree(PROMPTS, ignore_errors=True)
    words = (*bench.jobs["sample"].words(out / "a"), "--set", "Prompt.cache_on_disk=true")
    other = (*bench.jobs["sample"].words(out / "b"), "--set", "Prompt.cache_on_disk=true")
    ended = both("headless.cli", words, out, apart, other)
    if any(code for code, _ in ended):
        return Trial("", "raw", str(ended)[-400:])
    made = [[v for k, v in files(out / side).items() if k.endswith(".latent")] for side in ("a", "b")]
    if made[0] != made[1] or not made[0]:
        return Trial("", "lost", "the two differ")
    return Trial("", "left over", str(left)) if (left := partial_files(PROMPTS)) else clean(out)


def clean(out: Path, count: int | None = None) -> Trial:
    """Survived when nothing stays but results, of which there are `count` files."""
    left = partial_files(out) + [name for name in files(out) if "unfinished_" in name]
    if left or (count is not None and len(files(out)) != count):
        return Trial("", "left over", f"{left or sorted(files(out))}")
    return Trial("", "survived")


KINDS: dict[str, Kind] = {
    "the same run": same_run,
    "one output name": same_name,
    "convert onto one name": one_new_file("convert"),
    "extract onto one name": one_new_file("extract"),
    "two trainings in one folder": two_trainings,
    "one cache of samples": one_cache,
    "one text cache": text_cache,
}
