"""The table of docs/memory.md: what runs at the published sizes take, planned and counted.

`python -m tests.benchmarks.memory_table --write`, from the pack's folder, fills the marked part of the file; without
`--write` it is printed. Nothing is loaded: models stand on the meta device, and "counted" is what the engine allocates
there when it runs a step, plus the allowance of the plan for what cannot be counted.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from unittest import mock

import torch

import pack

pack.register()

from tests.benchmarks.report import line, print_or_write, replaced  # noqa: E402
from tests.sampling.runs import sample  # noqa: E402
from wan_core import catalog  # noqa: E402
from wan_core.models.dit import WanDiT  # noqa: E402
from wan_core.offload.blocks import weights_of  # noqa: E402
from wan_core.offload.streaming import Placement, PlainCopies  # noqa: E402
from wan_core.offload.weights import WeightProvider  # noqa: E402
from wan_core.planning.estimate import LiveBytes  # noqa: E402
from wan_core.planning.job import InputSizes, placeholder_conditioning  # noqa: E402
from wan_core.planning.modules import SizedModule, published_dit  # noqa: E402
from wan_core.planning.run import RunPlan, dit_inventory, plan_run  # noqa: E402
from wan_core.runtime import GIB, Runtime  # noqa: E402
from wan_core.settings import MemorySettings, SamplerSettings  # noqa: E402
from wan_core.types import Conditioning, VideoSize, tensors_in  # noqa: E402

DOCUMENT = Path(pack.ROOT) / "docs" / "memory.md"
BEGIN, END = "<!-- table: python -m tests.benchmarks.memory_table --write -->", "<!-- end of table -->"
META = torch.device("meta")

MODELS = {
    "T2V 1.3B": "Wan-AI/Wan2.1-T2V-1.3B",
    "T2V 14B": "Wan-AI/Wan2.1-T2V-14B",
    "I2V 14B": "Wan-AI/Wan2.1-I2V-14B-720P",
    "VACE 14B": "Wan-AI/Wan2.1-VACE-14B",
}
SIZES = {"480p": VideoSize(832, 480, 81), "720p": VideoSize(1280, 720, 81)}
WEIGHTS = {"bf16": "auto", "fp8": "fp8"}
BUDGETS = (24, 16, 12, 8, 6)
HEADER = (
    "model", "size", "weights", "card, GB", "planned peak", "counted peak", "blocks that stay", "copied per step",
    "hidden",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    model: str
    size: str
    weights: str
    gib: int


def cases() -> Iterator[Case]:
    for model in MODELS:
        for size in SIZES:
            for weights in WEIGHTS:
                yield from (Case(model, size, weights, gib) for gib in BUDGETS)


@cache
def dit(model: str, weights: str) -> WanDiT:
    module = SizedModule.planned(
        published_dit(catalog.find_row(MODELS[model])), torch.bfloat16, weights=WEIGHTS[weights]
    ).module
    module.attend = lambda q, k, v: torch.empty_like(q)
    return module


def conditioning(case: Case) -> Conditioning:
    given = InputSizes(vace=(1,)) if case.model.startswith("VACE") else InputSizes()
    return replace(
        placeholder_conditioning(dit(case.model, case.weights).config, SIZES[case.size].latent, given),
        motion_bucket=None,
    )


@cache
def unbounded(model: str, size: str, weights: str) -> tuple[RunPlan, ...]:
    """The plans between which a limit decides: without one, and with the least memory for both modes of guidance."""
    case = Case(model, size, weights, 0)
    return tuple(
        plan_run(dit(model, weights), conditioning(case), SIZES[size].latent, settings(mode), MemorySettings(), nothing)
        for mode in ("sequential", "interleaved")
    )


def nothing(wanted: float) -> None:
    """No limit."""


def settings(mode: str = "sequential") -> SamplerSettings:
    guided = SamplerSettings(steps=1)
    return replace(guided, guidance=replace(guided.guidance, mode=mode))


def planned(case: Case) -> RunPlan:
    """What `plan_run` answers for the case; the parts that do not depend on the limit are computed once."""
    sequential, interleaved = (
        plan.within(case.gib * GIB, MemorySettings()) for plan in unbounded(case.model, case.size, case.weights)
    )
    if not sequential.placement.streamed:
        return sequential
    return min(sequential, interleaved, key=lambda plan: (plan.missing, plan.copied_per_step))


class MetaCopies(PlainCopies):
    """Copies on the meta device, as if weights rested elsewhere."""

    def __init__(self) -> None:
        super().__init__(META)

    def whole(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_like(weight, dtype=dtype)


@contextmanager
def results_stay_there() -> Iterator[None]:
    """Let what a run gives back stay on the meta device."""
    with mock.patch.object(torch.Tensor, "cpu", lambda self: self):
        yield


def counted(case: Case) -> int:
    """Bytes that the engine allocates for a step of the case, with the plan's allowance."""
    plan = planned(case)
    mode = plan.settings.guidance.mode
    return allocated(replace(case, gib=0), plan.placement.streamed, mode) + plan.allowance


@cache
def allocated(case: Case, streamed: tuple[str, ...], mode: str) -> int:
    """Bytes that the engine allocates for a step with these blocks streamed, and those of the conditioning."""
    module, cond = dit(case.model, case.weights), conditioning(case)
    placement = Placement(dit_inventory(module, cond), streamed)
    provider, copies = WeightProvider.of(module), MetaCopies()
    with provider.working(META, placement, copies=copies):
        """The rows that streamed blocks rest in are made; they stand for host memory."""
    given = [*weights_of(module).values(), *tensors_in(cond)]
    with (
        results_stay_there(),
        LiveBytes(given=given) as counter,
        provider.working(META, placement, copies=copies),
    ):
        runtime = Runtime(device=META, dtype=torch.bfloat16)
        sample(module, cond, SIZES[case.size].latent, settings(mode), runtime)
    return counter.peak + sum(tensor.nbytes for tensor in tensors_in(cond))


def row(case: Case) -> tuple[str, ...]:
    """The cells of a case: what it takes, or what is missing."""
    plan = planned(case)
    named = (case.model, case.size, case.weights, str(case.gib))
    if plan.missing:
        return (*named, f"{plan.peak_bytes / GIB:.2f}", "", f"**{plan.missing / GIB:.2f} GB missing**", "", "")
    stay, blocks = len(plan.placement.resident), len(plan.placement.inventory.blocks)
    copied = f"{plan.copied_per_step / GIB:.1f} GB" if plan.placement.streamed else "-"
    hidden = f"{plan.hidden:.0%}" if plan.placement.streamed else "-"
    peaks = (f"{plan.peak_bytes / GIB:.2f}", f"{counted(case) / GIB:.2f}")
    return (*named, *peaks, f"{stay} of {blocks}", copied, hidden)


def table() -> str:
    """The whole table in Markdown."""
    return "\n".join([line(HEADER), line(("-",) * len(HEADER)), *(line(row(case)) for case in cases())])


def filled(document: str) -> str:
    """`document` with the table in its marked part."""
    return replaced(document, BEGIN, END, table())


if __name__ == "__main__":
    print_or_write(__doc__, DOCUMENT, table, filled)
