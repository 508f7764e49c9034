"""The bundled models draw what they are asked for, and every capability is seen in the films that it makes.

A few films of each row of `python -m tools.family judge`; docs/bundled-models.md has the whole table. `FAULTS` says
which deliberate fault each of them catches.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from unittest import mock

import pytest

import wan_core.lora.apply as lora_apply
from tools.family import judge
from tools.family.judge import Family
from wan_core import pipeline_calls
from wan_core.conditioning import camera, inputs, vace

LEAST: dict[str, tuple[int, dict[tuple[str, str], float]]] = {
    "vae": (4, {("VAE", "PSNR, dB"): 29.5, ("VAE", "the same in tiles, dB"): 28.5}),
    "text": (10, {("T2V", "colour"): 0.8, ("T2V", "ground"): 0.9, ("T2V", "shape"): 0.4, ("T2V", "motion"): 0.6}),
    "image": (4, {("I2V", "first frame, dB"): 17.0, ("I2V", "motion"): 0.4}),
    "control": (4, {("Control", "overlap with the shape"): 0.5, ("Control", "colour"): 0.4}),
    "reference": (4, {("Reference", "overlap with the control"): 0.55}),
    "camera": (8, {("Camera", "direction"): 0.7}),
    "vace": (4, {("VACE", "outside of the mask, dB"): 27.0, ("VACE", "colour inside"): 0.5}),
    "speed": (4, {("Speed 10, 50, 90", "farther each time"): 0.5}),
    "style": (4, {("Style LoRA", "dots at 1"): 0.5, ("Style LoRA", "no dots at 0"): 0.75}),
}
"""By check how many films, and the least of each number: what was measured, less three standard deviations."""


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Family:
    return Family(tmp_path_factory.mktemp("models"))


def low(family: Family, name: str) -> list[str]:
    """The numbers of a check that are below their least value."""
    check, needed = judge.CHECKS[name]
    if not family.has(*needed):
        pytest.skip(f"no weights of {' and '.join(needed)} are shipped")
    count, least = LEAST[name]
    scores = {(score.row, score.what): score.value for score in check(family, count)}
    return [f"{row}, {what}: {scores[row, what]:.2f}" for (row, what), value in least.items()
            if scores[row, what] < value]  # fmt: skip


@pytest.mark.parametrize("name", LEAST)
def test_films_show_what_was_asked_for(name, family):
    assert low(family, name) == []


@contextmanager
def _other_prompt() -> Iterator[None]:
    encode = pipeline_calls.text_conditioning

    def other(encoder, prompt, *others):
        return encode(encoder, [*prompt[1:], prompt[0]] if len(prompt) > 1 else "a white box grows", *others)

    with mock.patch.object(pipeline_calls, "text_conditioning", other):
        yield


@contextmanager
def _inverted_mask() -> Iterator[None]:
    fold = vace.fold_pixels
    with mock.patch.object(vace, "fold_pixels", lambda drawn, size: fold(1 - drawn, size)):
        yield


@contextmanager
def _swapped_axes() -> Iterator[None]:
    swapped = {name: (y, x, z, roll) for name, (x, y, z, roll) in camera.MOVES.items()}
    with mock.patch.object(camera, "MOVES", swapped):
        yield


@contextmanager
def _exchanged_clips() -> Iterator[None]:
    def control(cond, size, encoder, clip, fit):
        # The other function gives what the picture says to the image encoder; that is not what is exchanged.
        return replace(reference_of(cond, size, encoder, None, clip[:1], fit), without_tokens=None)

    def reference(cond, size, encoder, image_encoder, picture, fit):
        return control_of(cond, size, encoder, picture, fit)

    control_of, reference_of = inputs.control_conditioning, inputs.reference_conditioning
    with mock.patch.multiple(inputs, control_conditioning=control, reference_conditioning=reference):
        yield


@contextmanager
def _ignored_strength() -> Iterator[None]:
    def set_step(self, index, total):
        self.strength = self.factor

    patch = lora_apply._ScaledPatch
    with mock.patch.multiple(patch, set_step=set_step, set_mean=lambda self, total: set_step(self, 0, total)):
        yield


FAULTS: dict[str, tuple[str, Callable[[], AbstractContextManager[None]]]] = {
    "the text is that of another prompt": ("text", _other_prompt),
    "the mask is inverted": ("vace", _inverted_mask),
    "the camera's axes are swapped": ("camera", _swapped_axes),
    "control and reference are exchanged": ("reference", _exchanged_clips),
    "the strength of a LoRA is ignored": ("style", _ignored_strength),
}
"""What could go wrong without an error, and the check that sees it."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_by_its_meaning(fault, family):
    name, breaks = FAULTS[fault]
    with breaks():
        assert low(family, name), f"nobody sees that {fault}"


def test_every_check_of_the_judge_is_known():
    assert set(LEAST) <= set(judge.CHECKS) and {name for name, _ in FAULTS.values()} <= set(LEAST)
