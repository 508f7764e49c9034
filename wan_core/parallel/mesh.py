"""The ranks of one film and all that they exchange, over `torch.distributed`: NCCL between cards, gloo between CPUs.

Rank 0 leads. It tells the others what to do (`tell`, `hear`), and they compute with it. Messages travel over gloo in
host memory, tensors of a step over the backend of the device.
"""

import os
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Layout, shares, spans
from .processes import DEVICE, MEETING

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

PATIENCE = timedelta(days=7)
"""How long a rank waits for the others: until they come or their process ends. Between two runs the user decides."""


LOST_WORDS = ("gloo", "Gloo", "NCCL", "Connection reset", "Connection closed", "Broken pipe")
"""What PyTorch's messages about a lost rank have in them."""


class RankLostError(RuntimeError):
    """Another rank has ended."""


# Its name from PyTorch 2.13 on, where the one before warns.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Step:
    """The control word of a step: every rank predicts for latents that follow it."""

    index: int
    evaluation: int


class Ranks:
    """The processes that work together, and this one among them.

    Attributes:
        rank, count: the number of this process, and of how many.
        device: where this process computes.
        sent: bytes of tensors that this rank has sent to others, by what they were for.
        calls: how often it exchanged them.
        broken: whether a rank failed while the others waited for it; nothing can be exchanged any more.
    """

    def __init__(self, device: torch.device, rank: int, count: int) -> None:
        self.device, self.rank, self.count = device, rank, count
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.broken = False
        self._meshes: dict[Layout, Mesh] = {}
        self._control = dist.new_group(backend="gloo", timeout=PATIENCE)

    @classmethod
    def join(cls, device: torch.device, rank: int, count: int, file: Path | None = None) -> "Ranks":
        """Meet the other processes through `file`, a path that does not exist yet, or as the environment of torchrun
        says without it.
        """
        backend = "nccl" if device.type == "cuda" else "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
        where = "env://" if file is None else f"file://{file}"
        dist.init_process_group(backend, init_method=where, rank=rank, world_size=count, timeout=PATIENCE)
        return cls(device, rank, count)

    @classmethod
    def of_environment(cls, kind: str) -> "Ranks | None":
        """The ranks that `processes` or torchrun have started, with a device of that kind for each; None in a process
        that neither has started.

        Raises:
            ValueError: there are fewer cards than ranks.
        """
        file = os.environ.get(MEETING)
        if file is None and "TORCHELASTIC_RUN_ID" not in os.environ:
            return None
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        number = int(os.environ.get("LOCAL_RANK", rank))
        device = torch.device(os.environ.get(DEVICE, f"cuda:{number}" if kind == "cuda" else kind))
        if device.type == "cuda" and (device.index or 0) >= (cards := torch.cuda.device_count()):
            raise ValueError(f"Rank {rank} is to use {device}, but this machine has {cards} cards: start fewer.")
        return cls.join(device, rank, count, None if file is None else Path(file))

    def leave(self) -> None:
        """Take leave of the others; nothing can be exchanged after it."""
        dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def arranged(self, layout: Layout) -> "Mesh":
        """The ranks in this layout; all of them have to ask for it, also those that have no place in it."""
        if layout not in self._meshes:
            numbers = [[row * layout.seq + place for place in range(layout.seq)] for row in range(layout.cfg)]
            across = list(zip(*numbers, strict=True))
            row, place = divmod(self.rank, layout.seq)
            # Every rank has to make every group, also those that it is not in.
            rows = [dist.new_group(ranks, timeout=PATIENCE) for ranks in numbers]
            columns = [dist.new_group(list(ranks), timeout=PATIENCE) for ranks in across]
            groups = (rows[row], columns[place]) if self.rank < layout.ranks else (None, None)
            self._meshes[layout] = Mesh(layout, row, place, self, *groups)
        return self._meshes[layout]

    def tell(self, message: Any) -> None:
        """Send a message to all other ranks; a `Step` is four numbers, anything else is pickled."""
        if isinstance(message, Step):
            self._word(1, message.index, message.evaluation)
            return
        content = torch.frombuffer(bytearray(pickle.dumps(message)), dtype=torch.uint8)
        self._word(0, len(content))
        dist.broadcast(content, 0, group=self._control)

    def hear(self) -> Any:
        """The next message of rank 0."""
        kind, first, second, _ = self._word()
        if kind:
            return Step(first, second)
        content = torch.empty(first, dtype=torch.uint8)
        dist.broadcast(content, 0, group=self._control)
        return pickle.loads(content.numpy().tobytes())

    def _word(self, *numbers: int) -> list[int]:
        word = torch.tensor([*numbers, *(0,) * (4 - len(numbers))], dtype=torch.int64)
        dist.broadcast(word, 0, group=self._control)
        self.calls["control"] += 1
        return word.tolist()

    def spread(self, x: Tensor, kind: str = "latents") -> Tensor:
        """`x` of rank 0, on every rank; the others give a tensor of its shape and dtype, which is overwritten."""
        self._counted(kind, x.nbytes * (self.count - 1) if self.leads else 0)
        dist.broadcast(x, 0)
        return x

    def collected(self, thing: Any) -> list[Any]:
        """On rank 0 what each rank gave, on the others nothing."""
        found: list[Any] = [None] * self.count
        dist.gather_object(thing, found if self.leads else None, group=self._control)
        return found if self.leads else []

    def least(self, number: float) -> float:
        """The least of the numbers that the ranks give."""
        found = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self._control)
        return found.item()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside the block the others wait for this rank, so an error in it leaves them waiting.

        Raises:
            RankLostError: another rank has ended.
        """
        try:
            yield
        except BaseException as error:
            self.broken = True
            if isinstance(error, RuntimeError) and any(word in str(error) for word in LOST_WORDS):
                raise RankLostError("Another rank has ended, and this one cannot go on without it.") from error
            raise

    def _counted(self, kind: str, sent: int) -> None:
        self.sent[kind] += sent
        self.calls[kind] += 1


@dataclass(frozen=True, eq=False)
class Mesh:
    """The ranks in a layout, and the place of this one in it.

    One without `ranks` is imagined: on the meta device it gives tensors of the right shapes, for plans.
    """

    layout: Layout
    row: int = 0
    place: int = 0
    ranks: Ranks | None = None
    row_group: Any = field(default=None, repr=False)
    column_group: Any = field(default=None, repr=False)

    def part(self, tokens: int) -> "Part | None":
        """This rank's share of a sequence; None where one rank has all of it."""
        return Part(self, shares(tokens, self.layout.seq)) if self.layout.seq > 1 else None

    def swapped(self, send: Tensor, sizes: Sequence[int], back: Sequence[int], kind: str) -> Tensor:
        """Pieces of the flat tensor `send`, of these sizes, go to the ranks of the row; those that came from each, of
        the sizes `back`, as a flat tensor.
        """
        found = send.new_empty(sum(back))
        if self.ranks is not None:
            self.ranks._counted(kind, (send.numel() - sizes[self.place]) * send.element_size())
            dist.all_to_all_single(found, send, list(back), list(sizes), group=self.row_group)
        return found

    def gathered(self, x: Tensor, sizes: Sequence[int], kind: str) -> Tensor:
        """The parts (B, n, ...) of the ranks of the row, of these sizes along the second axis, as one tensor."""
        # The collectives take equal sizes. What fills up the last row is dropped before anyone reads it.
        most, rest = max(sizes), x.shape[2:]
        send = x.new_zeros(x.shape[0], most, *rest)
        send[:, : x.shape[1]] = x
        found = x.new_empty(self.layout.seq * len(x), most, *rest)
        if self.ranks is not None:
            self.ranks._counted(kind, send.nbytes * (self.layout.seq - 1))
            _gather(found, send, group=self.row_group)
        return torch.cat([part[:, :size] for part, size in zip(found.split(len(x)), sizes, strict=True)], 1)

    def from_row(self, x: Tensor, row: int, kind: str) -> Tensor:
        """`x` of the rank at this place in `row`, on the ranks of every row; the others' is overwritten."""
        if self.ranks is not None and self.layout.cfg > 1:
            self.ranks._counted(kind, x.nbytes if self.row == row else 0)
            dist.broadcast(x, row * self.layout.seq + self.place, group=self.column_group)
        return x

    def agreed(self, *numbers: int) -> tuple[int, ...]:
        """The numbers of rank 0, on every rank."""
        word = torch.tensor(numbers, dtype=torch.int64)
        assert self.ranks is not None, "a decision is made in a run"
        dist.broadcast(word, 0, group=self.ranks._control)
        self.ranks._counted("decisions", word.nbytes * (self.ranks.count - 1) if self.ranks.leads else 0)
        return tuple(word.tolist())


@dataclass(frozen=True, eq=False)
class Part:
    """The share of a sequence that one rank of a row holds: tokens outside of attention, heads inside of it.

    Shares are as equal as whole tokens and heads can be, so nothing is padded: no attention sees a token that is not
    one of the video (DeepSpeed-Ulysses, Jacobs et al. 2023, with uneven splits).
    """

    mesh: Mesh
    sizes: tuple[int, ...]

    @property
    def place(self) -> slice:
        """Where its tokens are in the sequence."""
        return spans(self.sizes)[self.mesh.place]

    def own(self, x: Tensor) -> Tensor:
        """Its tokens of a whole sequence (B, S, ...), as a copy: a view would keep the others in memory."""
        return x[:, self.place].clone()

    def whole(self, x: Tensor, kind: str = "velocity") -> Tensor:
        """The whole sequence (B, S, ...) of what each rank has of it."""
        return self.mesh.gathered(x, self.sizes, kind)

    def every(self, x: Tensor, stride: int) -> Tensor:
        """Every so many tokens of the whole sequence, of what each rank has of it."""
        firsts = [-place.start % stride for place in spans(self.sizes)]
        sizes = [len(range(first, size, stride)) for first, size in zip(firsts, self.sizes, strict=True)]
        return self.mesh.gathered(x[:, firsts[self.mesh.place] :: stride], sizes, "samples")

    def attention(self, attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`attend` among all tokens, of what each rank has of them (B, s, heads, 128): every rank gets all tokens of
        some heads, and gives back the result of each rank's tokens.
        """
        batch, own, count, width = q.shape
        mesh, total = self.mesh, sum(self.sizes)
        heads = shares(count, mesh.layout.seq)
        mine = heads[mesh.place]
        sizes = [3 * batch * own * each * width for each in heads]
        send = q.new_empty(sum(sizes))
        for piece, each, place in zip(send.split(sizes), heads, spans(heads), strict=True):
            shaped = piece.view(3, batch, own, each, width)
            for target, x in zip(shaped, (q, k, v), strict=True):
                target.copy_(x[:, :, place])
        del q, k, v
        back = [3 * batch * tokens * mine * width for tokens in self.sizes]
        found = mesh.swapped(send, sizes, back, "heads").split(back)
        del send
        shaped_back = [p.view(3, batch, n, mine, width) for p, n in zip(found, self.sizes, strict=True)]
        q, k, v = (torch.cat([piece[number] for piece in shaped_back], 1) for number in range(3))
        del found, shaped_back
        out = attend(q, k, v) if mine else q.new_empty(batch, total, 0, width)
        del q, k, v
        sizes = [batch * tokens * mine * width for tokens in self.sizes]
        send = torch.cat([out[:, place].flatten() for place in spans(self.sizes)])
        back = [batch * own * each * width for each in heads]
        pieces = mesh.swapped(send, sizes, back, "heads").split(back)
        parts = [p.view(batch, own, each, width) for p, each in zip(pieces, heads, strict=True)]
        return torch.cat(parts, 2)
