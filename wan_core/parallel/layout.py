"""How the ranks of a machine share one film: rows of ranks take branches of guidance, the ranks of a row take tokens
and heads. Pure arithmetic, for runs and for plans.

P ranks in a row, S tokens, D = heads x 128 model width, z latent channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

POSITIVE = "positive"
"""The branch of the first row; the second row takes all others."""


@dataclass(frozen=True)
class Layout:
    """`cfg` rows (1 or 2) of `seq` ranks. Rank r is in row r // seq, at place r % seq.

    Raises:
        ValueError: there are no ranks, or more than two rows.
    """

    cfg: int = 1
    seq: int = 1

    def __post_init__(self) -> None:
        if self.cfg not in (1, 2) or self.seq < 1:
            raise ValueError(f"A layout has 1 or 2 rows of at least one rank; got {self.cfg} rows of {self.seq}.")

    @classmethod
    def of(cls, ranks: int, *, guided: bool) -> "Layout":
        """The layout of so many ranks. Where guidance runs, each of its branches gets half of the ranks, because that
        costs one exchange of velocities a step; the ranks of a row share tokens and heads.
        """
        return cls(2, ranks // 2) if guided and ranks % 2 == 0 else cls(1, ranks)

    @property
    def ranks(self) -> int:
        return self.cfg * self.seq

    def row_of(self, branch: str) -> int:
        """The row that runs this branch of guidance."""
        return 0 if branch == POSITIVE else self.cfg - 1

    def __str__(self) -> str:
        return f"cfg {self.cfg} x seq {self.seq}"


ALONE = Layout()


def shares(count: int, ranks: int) -> tuple[int, ...]:
    """`count` tokens or heads in `ranks` shares that differ by at most one, the larger ones first."""
    each, more = divmod(count, ranks)
    return tuple(each + (number < more) for number in range(ranks))


def spans(sizes: Sequence[int]) -> list[slice]:
    """Where consecutive shares of these sizes lie."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


WIDTH = 128
"""Channels of a head."""


@dataclass(frozen=True)
class Exchange:
    """The sizes on which depends what a rank sends in an evaluation of the model.

    Attributes:
        tokens: of the sequence, S.
        heads, blocks: of the model; blocks of VACE count for each input.
        latents: numbers in the latents, B z F h w.
        outputs: numbers that the head gives for each token.
        itemsize: bytes of a number of the tokens.
        batch: videos at a time.
    """

    tokens: int
    heads: int
    blocks: int
    latents: int
    outputs: int
    itemsize: int
    batch: int = 1

    def sent(self, layout: Layout, branches: int, rank: int = 0) -> dict[str, int]:
        """Bytes that `rank` sends for so many branches of guidance, of which the first row runs one if there are two
        rows: for attention, for velocities, and of latents.
        """
        row, place = divmod(rank, layout.seq)
        own = branches if layout.cfg == 1 else 1 if row == 0 else branches - 1
        sizes, heads = shares(self.tokens, layout.seq), shares(self.heads, layout.seq)
        there = 3 * sizes[place] * (self.heads - heads[place])
        back = (self.tokens - sizes[place]) * heads[place]
        whole = self.batch * self.itemsize
        gathered = (layout.seq - 1) * max(sizes) * self.outputs * whole
        velocity = self.latents * 4 if layout.cfg > 1 else 0
        found = {
            "heads": own * self.blocks * (there + back) * WIDTH * whole,
            "velocity": own * (gathered + velocity),
            "latents": 0 if rank else (layout.ranks - 1) * self.latents * 4,
        }
        return {name: size for name, size in found.items() if size}
