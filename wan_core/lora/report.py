"""A report of what a LoRA is and what it does to a model, in words and numbers."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .apply import LoraUse
from .bind import EVERYWHERE, BlockStrengths
from .patches import Decomposed, LowRank, Patch, Replacement
from .read import Lora, Skipped

SAMPLED_ELEMENTS = 2**16
"""Elements of a weight that its size is estimated from; the error of the estimate is below one percent."""

OPPOSED = -0.3
"""Cosine between the changes of two LoRAs below which they undo each other noticeably."""

ALIKE = 0.7
"""Cosine above which two LoRAs do largely the same and add up to double strength."""

BaseNorm = Callable[[str], float | None]
"""The Frobenius norm of a parameter of the base by name; None when it is not known."""


@dataclass(frozen=True)
class Effect:
    """How far one block is changed at full strength: the norm of the change, and its share of the base's norm."""

    block: str
    change: float
    share: float | None


@dataclass(frozen=True)
class LoraReport:
    """What is known of a LoRA, and what it does to a model when there is one.

    Attributes:
        name: of the file.
        made_for: the model it was trained on, as far as its shapes show.
        target: the model it was matched with, None when there was none.
        applied: the parameters that change, each once, without those left as they are by a patch of zeros, a strength
            of 0 or a choice of blocks. Without a model, those that the file would change.
        skipped: keys and parameters that are not used, with the reason.
        notes: sentences for the user.
        conflicts: sentences on LoRAs that are stacked with this one.
        effects: by block.
    """

    name: str
    dialects: Mapping[str, int]
    kinds: Mapping[str, int]
    ranks: tuple[int, ...]
    alpha: str
    made_for: str
    target: str | None
    applied: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    effects: tuple[Effect, ...] = ()

    def __str__(self) -> str:
        return "\n".join(self.lines())

    @property
    def summary(self) -> str:
        """The report in one line."""
        ranks = "/".join(map(str, self.ranks)) or "none"
        parts = [f"{self.name}: {', '.join(self.dialects)}, rank {ranks}, {self.alpha}"]
        parts.append(f"{len(self.applied)} parameters changed, {len(self.skipped)} names skipped")
        return "; ".join((*parts, *self.notes, *self.conflicts))

    def lines(self) -> list[str]:
        """The report as lines of text."""
        lines = [
            self.name,
            "  dialect   " + ", ".join(f"{name} ({count} keys)" for name, count in self.dialects.items()),
            "  holds     " + ", ".join(f"{count} x {kind}" for kind, count in self.kinds.items()),
            "  rank      " + (", ".join(map(str, self.ranks)) or "none"),
            f"  alpha     {self.alpha}",
            f"  made for  {self.made_for}",
            f"  model     {self.target or 'none given'}",
            f"  {'applied ' if self.target else 'changes '}  {len(self.applied)} parameters",
            *(f"    {name}" for name in grouped(self.applied)),
            f"  skipped   {len(self.skipped)}",
        ]
        reasons = defaultdict(list)
        for skipped in self.skipped:
            reasons[skipped.reason].append(skipped.name)
        for reason, names in reasons.items():
            lines += [f"    {reason}:", *(f"      {name}" for name in grouped(names))]
        lines += [f"  note      {note}" for note in self.notes]
        lines += [f"  conflict  {conflict}" for conflict in self.conflicts]
        if self.effects:
            unit = ", and its share of the weights" if any(e.share is not None for e in self.effects) else ""
            lines.append(f"  effect    norm of the change at strength 1{unit}")
            for e in self.effects:
                share = "" if e.share is None else f"{100 * e.share:.3g} %"
                lines.append(f"    {e.block:<16}{e.change:<12.4g}{share}".rstrip())
        return lines


def grouped(names: Iterable[str]) -> list[str]:
    """`names` with those that differ only in one block number joined: blocks.0-29.self_attn.q.weight."""
    groups: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.match(r"(\D*?)(\d+)(.*)", name)
        key, number = ((match[1], match[3]), [int(match[2])]) if match else ((name, ""), [])
        groups.setdefault(key, []).extend(number)
    return [f"{start}{_ranges(numbers)}{end}" for (start, end), numbers in groups.items()]


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if first != last else f"{first}" for first, last in runs)


def effects(patches: Iterable[tuple[str, Patch]], blocks: BlockStrengths, base_norm: BaseNorm) -> tuple[Effect, ...]:
    """The size of the change in every block, in the order of the blocks; parameters outside of blocks by their part.

    The magnitude of a DoRA does not count, only its direction; replacements have no size of their own.
    """
    changes: dict[str, float] = defaultdict(float)
    bases: dict[str, float | None] = defaultdict(float)
    for name, patch in patches:
        match = re.match(r"\w+\.\d+(?=\.\w+\.)|\w+", name)
        block, size = match[0] if match else name, patch.norm() * abs(blocks.factor(name))
        # NaN: a replacement has no size of its own.
        if size != size:
            continue
        base = base_norm(name)
        changes[block] += size**2
        so_far = bases[block]
        bases[block] = None if base is None or so_far is None else so_far + base**2
    return tuple(
        Effect(block, total**0.5, (total / base) ** 0.5 if (base := bases[block]) else None)
        for block, total in sorted(changes.items(), key=lambda item: _natural(item[0]))
    )


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(piece), "") if piece.isdigit() else (0, piece) for piece in name.split(".")]


def estimated_norm(weight: Tensor) -> float:
    """The Frobenius norm of `weight`, from evenly spaced elements of it."""
    flat = weight.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // SAMPLED_ELEMENTS)].float()
    return (sample.square().mean() * flat.numel()).sqrt().item()


def conflicts(uses: Sequence[LoraUse]) -> tuple[str, ...]:
    """What two LoRAs that are stacked do to each other, a sentence each; empty when they go together."""
    found: list[str] = []
    for i, first in enumerate(uses):
        for second in uses[i + 1 :]:
            found += _between(first, second)
    return tuple(found)


def _between(first: LoraUse, second: LoraUse) -> Iterable[str]:
    a, b = first.bound.lora.name, second.bound.lora.name
    mine: dict[str, list[Patch]] = defaultdict(list)
    for name, patch in first.bound.patches:
        mine[name].append(patch)
    shared = [(name, p, q) for name, q in second.bound.patches for p in mine.get(name, ())]
    both = [name for name, p, q in shared if isinstance(p, Replacement) and isinstance(q, Replacement)]
    if both:
        yield f"{a} and {b} both replace {len(both)} parameters ({', '.join(grouped(both)[:3])}); the changes add up."
    dora = [name for name, p, q in shared if isinstance(p, Decomposed) or isinstance(q, Decomposed)]
    if dora:
        yield (
            f"{a} and {b} meet in {len(dora)} weights where one is a DoRA; its rescaling is computed from the base "
            "alone, as it was trained."
        )
    cosines = {name: cosine(p, q) for name, p, q in shared if isinstance(p, LowRank) and isinstance(q, LowRank)}
    sign = _sign(first) * _sign(second)
    opposed = [name for name, value in cosines.items() if sign * value < OPPOSED]
    alike = [name for name, value in cosines.items() if sign * value > ALIKE]
    if opposed:
        yield f"{a} and {b} pull {len(opposed)} weights in opposite directions: {', '.join(grouped(opposed)[:3])}."
    if alike:
        yield f"{a} and {b} change {len(alike)} weights in the same way, which doubles their effect."


def _sign(use: LoraUse) -> float:
    return -1.0 if sum(use.strength.values) < 0 else 1.0


def cosine(first: LowRank, second: LowRank) -> float:
    """The cosine between two low-rank changes of one weight, from their factors."""
    (down, up), (other_down, other_up) = first.factors(), second.factors()
    # tr((up down)^T (up' down')), from matrices of the ranks alone.
    inner = ((up.T @ other_up) * (down @ other_down.T)).sum().item()
    size = first.norm() * second.norm()
    return inner / size if size else 0.0


def describe(
    lora: Lora,
    made_for: str,
    *,
    target: str | None = None,
    patches: Sequence[tuple[str, Patch]] = (),
    skipped: Sequence[Skipped] = (),
    notes: Sequence[str] = (),
    stacked: Sequence[LoraUse] = (),
    blocks: BlockStrengths = EVERYWHERE,
    base_norm: BaseNorm = lambda name: None,
) -> LoraReport:
    """The report of `lora`, with `patches` as what is applied."""
    if lora.few_steps is not None:
        notes = (*notes, f"Recommended with it: {lora.few_steps.summary}.")
    with torch.no_grad():
        return LoraReport(
            name=lora.name,
            dialects=lora.dialects,
            kinds=lora.kinds,
            ranks=lora.ranks,
            alpha=lora.alpha,
            made_for=made_for,
            target=target,
            applied=tuple(dict.fromkeys(name for name, patch in patches if blocks.factor(name) and patch.norm() != 0)),
            skipped=tuple(skipped),
            notes=tuple(notes),
            conflicts=conflicts(stacked),
            effects=effects(patches, blocks, base_norm),
        )
