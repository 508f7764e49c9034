"""The services that the library asks of its host: device, dtype, progress, cancellation, memory."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .parallel.mesh import Ranks

log = logging.getLogger("wancore")

GIB = 1024**3
"""Bytes in a GB, as cards are sold and as limits are typed; every size of memory and of files is shown in it."""

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Dtypes by the names that users choose from."""


def gigabytes(size: float, places: int = 1) -> str:
    """`size` in bytes as text: "9.1 GB", or "12.3 MB" where it is small."""
    if 0 < size < 50 * 2**20:
        return f"{size / 2**20:.1f} MB"
    return f"{size / GIB:,.{places}f} GB"


class Cancelled(Exception):
    """The user stopped the run."""


class OutOfMemoryError(ValueError):
    """The device is too small for the work; the message says what to change.

    Attributes:
        latents: the result so far, on the CPU, or None.
    """

    def __init__(self, message: str, latents: torch.Tensor | None = None) -> None:
        super().__init__(message)
        self.latents = latents


def is_out_of_memory(error: Exception) -> bool:
    """Whether `error` is a device's report that it has no memory left."""
    # MPS and some libraries of CUDA raise a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error).lower()
    )


def default_device() -> torch.device:
    """CUDA (or ROCm), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def usable_device(name: str, value: "str | torch.device") -> torch.device:
    """`value` as a device of this machine; `name` is the parameter's.

    Raises:
        ValueError: it names no device, or one that this machine lacks.
    """
    try:
        device = torch.device(value)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        known = "'cuda', 'cuda:1', 'mps' or 'cpu'"
        raise ValueError(f"{name} must name a device, such as {known}; got {value!r}.") from error
    try:
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        # Only using it proves a device: a card that is not there has a valid name, too.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
        raise ValueError(
            f"{name}: {str(value)!r} cannot be used on this machine ({reason}); {default_device().type!r} can."
        ) from error
    return device


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still use on `device`, with those that PyTorch holds for reuse.

    None where no limit is known, such as on the CPU.
    """
    if device.type == "cuda":
        # What PyTorch's allocator keeps for reuse counts as used in `mem_get_info`.
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "mps" and hasattr(torch.mps, "recommended_max_memory"):
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return None


def _ignore_progress(phase: str, done: int, total: int, latents: torch.Tensor | None = None) -> None:
    pass


class Pace:
    """The time that a phase still takes, estimated from its steps so far."""

    def __init__(self) -> None:
        self._started: dict[str, tuple[float, int]] = {}

    def left(self, phase: str, done: int, total: int) -> str:
        """Such as ", about 3 min left"; empty before the first step is done, and at the end."""
        now = time.monotonic()
        since, first = self._started.setdefault(phase, (now, done))
        if done <= first:
            self._started[phase] = (now, done)
            return ""
        if done >= total:
            return ""
        seconds = (now - since) / (done - first) * (total - done)
        return f", about {seconds:.0f} s left" if seconds < 100 else f", about {seconds / 60:.0f} min left"


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Services of the host. The default runs silently on the best device of this machine.

    Attributes:
        device: where models compute.
        dtype: compute dtype of the models; latents and solver arithmetic are float32 whatever it is.
        on_progress: called as (phase, done, total, latents); while sampling, latents (B, z, F, h, w) are the model's
            current estimate of the clean ones, else None.
        before_step: called as (index, total) before every step of a sampling run, wherever the run begins.
        check_cancelled: raises `Cancelled`, or an exception of the host, when the user wants to stop.
        free_memory: asks the host to have that many bytes of `device` free.
        memory_left: bytes that work may still use on a device; None where no limit is known.
        ranks: the processes that share the work with this one; None where it works alone.
    """

    device: torch.device
    dtype: torch.dtype
    on_progress: Callable[[str, int, int, torch.Tensor | None], None] = _ignore_progress
    before_step: Callable[[int, int], None] = lambda index, total: None
    check_cancelled: Callable[[], None] = lambda: None
    free_memory: Callable[[int], None] = lambda _: None
    memory_left: Callable[[torch.device], float | None] = free_bytes
    ranks: Ranks | None = None

    @classmethod
    def default(cls, device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> "Runtime":
        return cls(device=torch.device(device) if device else default_device(), dtype=dtype)

    @property
    def unbounded(self) -> bool:
        """Whether no limit is known of the memory of `device`."""
        return self.memory_left(self.device) is None

    def request_memory(self, wanted: float) -> float | None:
        """Bytes that work may use on `device`, after the host was asked to free memory if they are fewer than `wanted`.

        None where no limit is known.
        """
        left = self.memory_left(self.device)
        if left is not None and left < wanted:
            self.free_memory(int(wanted))
            left = self.memory_left(self.device)
        return left

    def chunks(self, phase: str) -> Callable[[int, int], None]:
        """A callback for work in pieces: it reports (done, total) as progress of `phase`, and may be cancelled."""

        def report(done: int, total: int) -> None:
            self.on_progress(phase, done, total, None)
            self.check_cancelled()

        return report
