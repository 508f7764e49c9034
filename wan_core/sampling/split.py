"""The parts of a run that are spread over the ranks of a mesh: branches of guidance, and what step caches remember."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..parallel.layout import Layout
from ..parallel.mesh import Mesh
from ..runtime import Runtime
from ..settings import GuidanceSettings, SamplerSettings
from ..types import Conditioning, StepInfo
from .checkpoint import HasMemory
from .predictor import BranchPredictor


def layout_of(guidance: GuidanceSettings, ranks: int) -> Layout:
    """The layout in which so many ranks run an expert with this guidance."""
    return Layout.of(ranks, guided=guidance.branches > 1)


def mesh_of(runtime: Runtime, settings: SamplerSettings) -> Mesh | None:
    """The ranks of `runtime` in the layout for `settings`; None where there is one."""
    ranks = runtime.ranks
    return None if ranks is None else ranks.arranged(layout_of(settings.guidance, ranks.count))


class SplitBranches:
    """A model of which each row of the mesh runs its own branches; every rank has the velocities of all.

    A row without a branch in this step is called with none, so that it follows the decisions of the step cache.
    """

    def __init__(self, model: BranchPredictor, mesh: Mesh) -> None:
        self._model, self._mesh = model, mesh

    def __call__(self, x: Tensor, t: float, branches: Mapping[str, Conditioning], info: StepInfo) -> list[Tensor]:
        mesh = self._mesh
        rows = {name: mesh.layout.row_of(name) for name in branches}
        own = {name: cond for name, cond in branches.items() if rows[name] == mesh.row}
        found = dict(zip(own, self._model(x, t, own, info), strict=True))
        velocities = []
        for name, cond in branches.items():
            shape = (len(cond.encoded_text), *x.shape[1:])
            velocity = found[name].contiguous() if name in found else x.new_empty(shape, dtype=torch.float32)
            velocities.append(mesh.from_row(velocity, rows[name], "velocity"))
        return velocities


class SplitMemory:
    """What the step caches of all ranks remember, as that of one rank would."""

    def __init__(self, cache: HasMemory, mesh: Mesh, give: Any, take: Callable[[Mapping[str, Tensor]], Any]) -> None:
        """`give` and `take` are the messages that ask the other ranks for theirs, and that bring them all of it."""
        assert mesh.ranks is not None, "a cache is that of a run"
        self._cache, self._mesh, self._ranks, self._give, self._take = cache, mesh, mesh.ranks, give, take

    @property
    def memory(self) -> dict[str, Tensor]:
        with self._ranks.together():
            self._ranks.tell(self._give)
            return joined(self._ranks.collected(on_cpu(self._cache.memory)), self._mesh.layout)

    @memory.setter
    def memory(self, tensors: dict[str, Tensor]) -> None:
        if tensors:
            self._ranks.tell(self._take(on_cpu(tensors)))
            self._cache.memory = part_of(tensors, self._mesh)


def on_cpu(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in memory.items()}


def joined(found: Sequence[Mapping[str, Tensor]], layout: Layout) -> dict[str, Tensor]:
    """The memory of a step cache from the parts of all ranks: the rule's of rank 0, and whole residuals."""
    rows = [found[start : start + layout.seq] for start in range(0, layout.ranks, layout.seq)]
    memory = {name: value for name, value in found[0].items() if not name.startswith("residual.")}
    for row in rows:
        for name in row[0]:
            if name.startswith("residual."):
                memory[name] = torch.cat([part[name] for part in row], 1)
    return memory


def part_of(memory: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """The inverse of `joined`: what this rank needs of it."""
    own = {}
    for name, value in memory.items():
        if name.startswith("residual."):
            if mesh.layout.row_of(name.split(".")[1]) != mesh.row:
                continue
            part = mesh.part(value.shape[1])
            value = value if part is None else part.own(value)
        own[name] = value
    return own
