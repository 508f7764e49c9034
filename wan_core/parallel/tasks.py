"""What the ranks that follow do for rank 0: each loads the models that it is told of again, from the same files, and
takes part in the work.
"""

import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..conditioning.text import fingerprint
from ..offload.weights import WeightProvider
from ..runtime import Runtime
from ..sampling.checkpoint import digest_weights
from ..sampling.experts import Expert
from .mesh import RankLostError
from .processes import LOST
from .source import Source


@dataclass(eq=False)
class Desk:
    """What a rank keeps from one task to the next: where it computes, and the last model of each kind."""

    runtime: Runtime
    _loaded: dict[str, tuple[bytes, Any]] = field(default_factory=dict)

    def model(self, kind: str, source: Source) -> Any:
        key = pickle.dumps(source)
        if self._loaded.get(kind, (b"",))[0] != key:
            self._loaded.pop(kind, None)
            try:
                model = source.load(self.runtime.device, mapped=True)
            except ValueError:  # weights of another dtype than their file's cannot stay in it
                model = source.load(self.runtime.device)
            self._loaded[kind] = key, model
        return self._loaded[kind][1]


@dataclass(frozen=True, eq=False)
class FollowFilm:
    """Take part in a run of a video model.

    Attributes:
        experts: the lowest timestep and the LoRAs of each.
        digest: of the weights as rank 0 has them.
    """

    source: Source
    experts: tuple[tuple[float, tuple[Any, ...]], ...]
    digest: str
    dtype: torch.dtype
    keep: bool

    @classmethod
    def of(
        cls, source: Source | None, name: str, experts: Sequence[Expert], dtype: torch.dtype, keep: bool
    ) -> "FollowFilm":
        """The task for a model called `name`.

        Raises:
            ValueError: it was not loaded from files.
        """
        if source is None:
            raise ValueError(f"{name} was not loaded from files, so no other process can load it; use one card.")
        pairs = tuple((expert.lowest, expert.loras) for expert in experts)
        return cls(source, pairs, digest_of(experts), dtype, keep)

    def model(self, desk: Desk) -> Any:
        """The `VideoModel` with its LoRAs, loaded again.

        Raises:
            ValueError: its files have changed.
        """
        model = desk.model("video", self.source)
        pairs = zip(model.experts, self.experts, strict=True)
        experts = tuple(replace(expert, lowest=low, loras=loras) for expert, (low, loras) in pairs)
        if digest_of(experts) != self.digest:
            raise ValueError(f"The files of {model.name} have changed since it was loaded; load it again.")
        return replace(model, experts=experts, source=self.source)

    def __call__(self, desk: Desk) -> None:
        self.model(desk).follow(replace(desk.runtime, dtype=self.dtype), keep=self.keep)


def digest_of(experts: Sequence[Expert]) -> str:
    """A digest of the weights of all experts; of those that are not read yet, of their files."""
    deferred = [bool(WeightProvider.of(expert.dit).origin) for expert in experts]
    pairs = zip(experts, deferred, strict=True)
    return " ".join(fingerprint(each.files) if later else digest_weights(each.dit) for each, later in pairs)


def exit_code_of(error: Exception) -> int:
    """The exit code of a rank that ends by `error`, whose last line goes to its log."""
    sys.stderr.write(f"{type(error).__name__}: {' '.join(str(error).split())}\n")
    return LOST if isinstance(error, RankLostError) else 1


def serve(runtime: Runtime) -> None:
    """Follow rank 0 until it has no more work."""
    ranks, desk = runtime.ranks, Desk(runtime)
    assert ranks is not None, "a rank serves others"
    with ranks.together():
        while (task := ranks.hear()) is not None:
            task(desk)
