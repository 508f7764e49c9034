"""Which of several kernels computes an operation: the default, or another that is clearly faster on this machine.

Several kernels often compute the same numbers up to rounding, and which is fastest depends on the processor, the
library, the number of threads and the shape. So none is assumed: the candidates are timed on the first real tensors of
each shape. The choice is stored in a file, because another choice gives other last bits: a run that is repeated or
resumed must compute the same. A run also writes its choices into its checkpoints, and `deterministic` uses the
defaults.
"""

import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import is_special
from ..runtime import log

Kernel = Callable[..., Tensor]
Arguments = tuple[Any, ...]

DETERMINISTIC = "WANCORE_DETERMINISTIC"
"""Environment variable; with 1 the whole process uses the default kernels."""

CACHE_FOLDER = "WANCORE_CACHE"
"""Environment variable; the folder for files that processes share, such as kernel choices."""

CLEARLY_FASTER = 0.9
"""A kernel replaces the default when it takes less than this share of its time: a smaller gain could be chance."""

EXTRA_ERROR = 2.0
"""How many times the default's rounding error a kernel may have."""

FEWEST_ROUNDS, MOST_ROUNDS = 3, 9
BUDGET = 0.1
"""Seconds after which no further round of timing begins."""

SHORTEST = 2e-4
"""Seconds; a shorter call is repeated, and timed as a whole."""


Key = tuple[str, tuple[int, ...], torch.dtype, str]
"""Operation, sizes, dtype and kind of device of a call."""


@dataclass(frozen=True)
class Operation:
    """An operation that several kernels compute.

    Attributes:
        name: in the file of choices.
        kernels: by name; the first is the default, and defines the result.
        sample: from the arguments of a call to those that are timed: a part of them where a call takes long, copies
            where a kernel writes into them.
        reference: the same operation in higher precision; kernels whose error against it is more than `EXTRA_ERROR`
            times the default's are not used. Without it all count as equally exact.
    """

    name: str
    kernels: Mapping[str, Kernel]
    sample: Callable[..., Arguments] = lambda *arguments: arguments
    reference: Kernel | None = None

    @property
    def default(self) -> str:
        return next(iter(self.kernels))

    def __call__(self, *arguments: Any, sizes: tuple[int, ...]) -> Tensor:
        """The operation on `arguments`, the first of them a tensor; calls of the same `sizes` use the same kernel."""
        first = arguments[0]
        key = (self.name, sizes, first.dtype, first.device.type)
        return current().kernel(self, key, arguments)(*arguments)


@dataclass
class Choices:
    """The kernels that one run uses.

    Attributes:
        deterministic: use the defaults.
        used: the kernel of each operation and size that the run has used so far or is to use, by `described` keys.
    """

    deterministic: bool = False
    used: dict[str, str] = field(default_factory=dict)
    _found: dict[Key, Kernel] = field(default_factory=dict)

    def kernel(self, operation: Operation, key: Key, arguments: Arguments) -> Kernel:
        if key not in self._found:
            self._found[key] = operation.kernels[self._name(operation, described(*key), arguments)]
        return self._found[key]

    def _name(self, operation: Operation, key: str, arguments: Arguments) -> str:
        on_meta = any(isinstance(argument, Tensor) and argument.is_meta for argument in arguments)
        if self.deterministic or on_meta or len(operation.kernels) == 1:
            return operation.default
        name = self.used.get(key)
        if name is None or name not in operation.kernels:
            with run(self.used):  # so that operations inside of a timed candidate are not recorded for this run
                name = known(arguments[0].device).choose(key, operation, arguments)
        self.used[key] = name
        return name


def described(operation: str, sizes: tuple[int, ...], dtype: torch.dtype, device: str) -> str:
    """Such as "linear 512x1536x8960 float32 cpu"."""
    return f"{operation} {'x'.join(map(str, sizes))} {str(dtype).removeprefix('torch.')} {device}"


_process = Choices(deterministic=os.environ.get(DETERMINISTIC, "") not in ("", "0"))
_current: ContextVar[Choices] = ContextVar("kernels", default=_process)


def current() -> Choices:
    """The choices of the current run, or of the process between runs."""
    return _current.get()


@contextmanager
def run(used: Mapping[str, str] | None = None, *, deterministic: bool = False) -> Iterator[Choices]:
    """Separate choices for a run inside the block, which begin with those `used` before. Inside of a deterministic run
    they are deterministic too.
    """
    choices = Choices(deterministic or current().deterministic, dict(used or {}))
    token = _current.set(choices)
    try:
        yield choices
    finally:
        _current.reset(token)


def up_to_power_of_two(count: int) -> int:
    """The next power of two: all sizes up to it share one choice."""
    return 1 << max(0, count - 1).bit_length()


class Known:
    """The choices that were made on this machine, by this and earlier processes.

    The file holds one line of JSON per choice. Lines are only ever appended, each by one write, and the first line of a
    key counts, so that processes that measure at the same time end up with the same choice.
    """

    def __init__(self, machine: str, file: Path) -> None:
        self.machine, self.file = machine, file
        self._names: dict[str, str] | None = None

    def choose(self, key: str, operation: Operation, arguments: Arguments) -> str:
        """The kernel in the file for `key`, else the one that timing finds, which is added to it.

        If the file cannot be written it is the default, because the next process could not make the same choice.
        """
        if self._names is None:
            self._names = self._read()
        if self._names.get(key) not in operation.kernels:
            name, times = fastest(operation, arguments)
            shown = ", ".join(f"{kernel} {1000 * seconds:.3g} ms" for kernel, seconds in times.items())
            log.debug("%s: %s (%s)", key, name, shown)
            self._names |= {key: name if self._append(key, name, times) else operation.default}
            self._names |= self._read()
        name = self._names[key]
        return name if name in operation.kernels else operation.default

    def _append(self, key: str, name: str, times: Mapping[str, float]) -> bool:
        milliseconds = {kernel: round(1000 * seconds, 4) for kernel, seconds in times.items()}
        line = json.dumps({"machine": self.machine, "key": key, "kernel": name, "ms": milliseconds}) + "\n"
        try:
            if is_special(self.file):
                raise OSError("it is no regular file")
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("ab", buffering=0) as stream:
                stream.write(line.encode())
        except OSError as error:
            _warn_once(f"Kernel choices cannot be kept in {self.file} ({error}), so the default kernels are used.")
            return False
        return True

    def _read(self) -> dict[str, str]:
        names: dict[str, str] = {}
        if is_special(self.file):
            return names
        try:
            lines = self.file.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return names
        for line in lines:
            try:
                entry = json.loads(line)
                if entry["machine"] == self.machine:
                    names.setdefault(str(entry["key"]), str(entry["kernel"]))
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
        return names


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)


def known(device: torch.device) -> Known:
    """The choices made on this machine for devices like `device`."""
    return _known(device, torch.get_num_threads(), cache_folder() / "kernels.jsonl")


@functools.cache
def _known(device: torch.device, threads: int, file: Path) -> Known:
    return Known(_machine(device, threads), file)


def cache_folder() -> Path:
    """Where choices are kept: `WANCORE_CACHE`, else `wancore` in the user's cache folder."""
    if folder := os.environ.get(CACHE_FOLDER):
        return Path(folder)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "wancore"


def _machine(device: torch.device, threads: int) -> str:
    """Everything that decides which kernel is fastest: processor or card, libraries, threads, and limits set by the
    user.
    """
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        runtime = torch.version.cuda or torch.version.hip
        parts = [properties.name, f"{properties.major}.{properties.minor}", runtime, torch.backends.cudnn.version()]
    elif device.type == "cpu":
        limits = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA",) if name in os.environ]
        parts = [processor(), torch.backends.cpu.get_cpu_capability(), f"{threads} threads", *limits]
    else:
        parts = [device.type, platform.machine()]
    return " / ".join(map(str, [*parts, f"torch {torch.__version__}"]))


PROCESSOR_FIELDS = ("vendor_id", "cpu family", "model", "model name", "CPU implementer", "CPU part")
"""The fields of /proc/cpuinfo that name a processor's model: the first four on x86, the last two on ARM."""


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, as the system reports it, and its vector units, which distinguish processors whose name a
    virtual machine hides.
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine()
    first = text.strip().partition("\n\n")[0]
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    names = [fields[name] for name in PROCESSOR_FIELDS if name in fields]
    units = [flag for flag in fields.get("flags", "").split() if flag.startswith(("avx", "amx"))]
    return " ".join([*names, *units]) or platform.machine()


def fastest(operation: Operation, arguments: Arguments) -> tuple[str, dict[str, float]]:
    """The kernel to use, and the seconds that each one took on a sample of `arguments`.

    In each round every kernel runs once. To replace the default, a kernel must be faster in most rounds and in its best
    one, so that a round which another program disturbs counts little. A kernel that cannot run here is left out.
    """
    with torch.no_grad():
        sample = operation.sample(*arguments)
        candidates = exact_enough(operation, sample)
        runs: dict[str, tuple[Kernel, int]] = {}
        for name in candidates:
            kernel = operation.kernels[name]
            runs[name] = kernel, max(1, min(1000, int(SHORTEST / max(1e-6, seconds(kernel, sample, 1)))))
        times: dict[str, list[float]] = {name: [] for name in runs}
        start = time.perf_counter()
        for turn in range(MOST_ROUNDS):
            if turn >= FEWEST_ROUNDS and time.perf_counter() - start > BUDGET:
                break
            for name in sorted(runs, reverse=bool(turn % 2)):
                kernel, repeats = runs[name]
                times[name].append(seconds(kernel, sample, repeats))
    default = times[operation.default]
    best = {name: min(values) for name, values in times.items()}
    name = min(best, key=best.__getitem__)
    shares = [own / others for own, others in zip(times[name], default, strict=True)]
    if best[name] > CLEARLY_FASTER * min(default) or statistics.median(shares) > CLEARLY_FASTER:
        name = operation.default
    return name, best


def exact_enough(operation: Operation, sample: Arguments) -> list[str]:
    """The kernels that run here and whose rounding error is allowed. Each has run once by then, which warms it up."""
    errors: dict[str, float] = {}
    expected = None if operation.reference is None else operation.reference(*sample).float()
    for name, kernel in operation.kernels.items():
        try:
            result = kernel(*sample)
        except RuntimeError as problem:
            if name == operation.default:
                raise
            log.debug("%s: %s does not run here: %s", operation.name, name, problem)
            continue
        errors[name] = 0.0
        if expected is not None:
            errors[name] = ((result.float() - expected).norm() / expected.norm()).item()
    allowed = EXTRA_ERROR * errors[operation.default]
    return [name for name, error in errors.items() if error <= allowed or name == operation.default]


def seconds(kernel: Kernel, arguments: Arguments, repeats: int) -> float:
    """The time of one call, by the device's own clock where it has one."""
    device = arguments[0].device
    if device.type == "cuda":
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            kernel(*arguments)
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1000 / repeats
    start = time.perf_counter()
    for _ in range(repeats):
        kernel(*arguments)
    return (time.perf_counter() - start) / repeats
