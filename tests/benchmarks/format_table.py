"""The table of weight formats in docs/memory.md: size, error and time of each.

`python -m tests.benchmarks.format_table --write`, from the pack's folder, fills the marked part of the file; without
`--write` it is printed. Errors are those of float32 runs against the same weights in float32. The `gguf` package has no
quantiser for the K and IQ types, so these have times, measured on blocks of the reference values, and no errors.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

import pack

pack.register()

from gguf import GGMLQuantizationType  # noqa: E402

from tests.benchmarks.report import line, machine, print_or_write, replaced  # noqa: E402
from tests.loading import ggufs  # noqa: E402
from tests.loading.test_formats import blocks, per_row, velocity  # noqa: E402
from tests.reference import relative_error, tiny_dit  # noqa: E402
from wan_core import catalog  # noqa: E402
from wan_core.models.dit import WanDiT  # noqa: E402
from wan_core.offload import formats  # noqa: E402
from wan_core.offload.formats import PACKED, Packed, WeightFormat  # noqa: E402
from wan_core.offload.quant import QuantisedLinear, big_linears  # noqa: E402
from wan_core.planning.modules import published_dit  # noqa: E402
from wan_core.runtime import GIB  # noqa: E402
from wan_core.types import Conditioning  # noqa: E402

DOCUMENT = Path(pack.ROOT) / "docs" / "memory.md"
BEGIN, END = "<!-- table: python -m tests.benchmarks.format_table --write -->", "<!-- end of formats -->"
HEADER = (
    "weights", "14B, GB", "error of a linear", "error of the tiny DiT", "processor time of a linear, ms",
    "of a step of the tiny DiT, ms",
)  # fmt: skip

WIDTH, TOKENS, REPEATS = 2048, 128, 2
"""The linear layer that is timed, in bf16; the fastest of so many calls counts. Time is that of the processor, which
other programs on the machine disturb least."""
STEP = (1, 16, 5, 16, 24)
"""The latents of the step that is timed: 480 tokens."""

Pair = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Stored:
    """A way to store a weight: `quantise` gives its numbers and scale; None where nothing here can."""

    name: str
    form: WeightFormat
    quantise: Callable[[Tensor], Pair] | None


def _fp8_blocks(weight: Tensor) -> Pair:
    scale, whole = blocks(weight, 128, 128, formats.FP8_MAX)
    return (weight / whole).to(formats.FP8_MADE), scale


def _packed(kind: str) -> Callable[[Tensor], Pair]:
    return lambda weight: (torch.from_numpy(ggufs.encoded(weight, GGMLQuantizationType[kind])), None)


MADE = {kind.name for kind in ggufs.MADE}
ROWS = (
    Stored("bf16", formats.PLAIN, lambda weight: (weight.bfloat16(), None)),
    Stored("FP8, a scale per row", formats.FP8, formats.FP8.quantise),
    Stored("FP8, a scale per tensor", formats.FP8, lambda weight: formats.FP8.quantise(weight, per_row=False)),
    Stored("FP8, a scale per block of 128x128", formats.FP8, _fp8_blocks),
    Stored("int8, a scale per row", formats.INT8, per_row),
    *(
        Stored(form.name, form, _packed(kind) if kind in MADE else None)
        for kind, form in sorted(PACKED.items(), key=lambda item: -item[1].packing.nbytes / item[1].packing.numbers)
    ),
)


@cache
def _model() -> WanDiT:
    component = published_dit(catalog.published("Wan-AI/Wan2.1-T2V-14B"))
    with torch.device("meta"):
        return WanDiT(component.config)


def gigabytes_of_14b(stored: Stored) -> float:
    """T2V 14B with its big layers stored so, and all else in bf16. Scales beside numbers are not counted: they are less
    than a thousandth.
    """
    module = _model()
    big = {f"{path}.weight" for path in big_linears(module)}
    inside, outside = (
        sum(weight.numel() for name, weight in module.named_parameters() if (name in big) == among)
        for among in (True, False)
    )
    packing = stored.form.packing if isinstance(stored.form, Packed) else None
    each = packing.nbytes / packing.numbers if packing else 2 if stored.form is formats.PLAIN else 1
    return (2 * outside + each * inside) / GIB


def error_of_a_linear(stored: Stored) -> float | None:
    """Relative error of the output, for weights and inputs of normal numbers."""
    if stored.quantise is None:
        return None
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(1024, 1024, generator=draw), torch.randn(64, 1024, generator=draw)
    return relative_error(x @ _weight(stored, weight).T, x @ weight.T)


def error_of_the_tiny_dit(stored: Stored) -> float | None:
    """Relative error of a velocity of the bundled T2V model, whose weights are drawn."""
    if stored.quantise is None:
        return None
    module = tiny_dit()
    for layer in big_linears(module).values():
        layer.weight = nn.Parameter(_weight(stored, layer.weight), requires_grad=False)
    return relative_error(velocity(module), velocity(tiny_dit()))


def _weight(stored: Stored, weight: Tensor) -> Tensor:
    assert stored.quantise is not None, "the caller asked"
    numbers, scale = stored.quantise(weight.detach())
    held = None if scale is None else scale.reshape(stored.form.held_shape(tuple(scale.shape), tuple(numbers.shape)))
    return stored.form.dequantise(numbers, held)


def milliseconds(stored: Stored, width: int = WIDTH, tokens: int = TOKENS) -> float:
    """Of a call of a linear layer in bf16, the unpacking of its weight included."""
    draw = torch.Generator().manual_seed(0)
    weight, x = torch.randn(width, width, generator=draw), torch.randn(tokens, width, generator=draw).bfloat16()
    plain = nn.Linear(width, width, bias=False, dtype=torch.bfloat16)
    layer = plain if stored.form is formats.PLAIN else _layer(stored, weight)
    return _fastest(lambda: layer(x))


def step_milliseconds(stored: Stored) -> float:
    """Of a step of the tiny DiT in bf16, for one branch, with the big layers of its blocks stored so."""
    module, draw = tiny_dit().bfloat16(), torch.Generator().manual_seed(0)
    for block in module.blocks:
        block.modulation.data = block.modulation.data.float()
    if stored.form is not formats.PLAIN:
        for path, linear in big_linears(module).items():
            module.set_submodule(path, _layer(stored, linear.weight.detach().float(), linear.bias))
    latents, text = torch.randn(*STEP, generator=draw), torch.randn(1, 5, 64, generator=draw)
    cond = Conditioning(text=text)
    return _fastest(lambda: module(latents.bfloat16(), torch.tensor([500.0]), cond))


def _layer(stored: Stored, weight: Tensor, bias: Tensor | None = None) -> nn.Module:
    numbers, scale = (stored.quantise or _packed(stored.form.name.removeprefix("GGUF ")))(weight)
    held = None if scale is None else scale.reshape(stored.form.held_shape(tuple(scale.shape), tuple(numbers.shape)))
    return QuantisedLinear(numbers, held, bias, torch.bfloat16, stored.form)


def _fastest(call: Callable[[], object]) -> float:
    """Milliseconds of processor time, after a first call that does not count."""
    seconds = []
    with torch.no_grad():
        for _ in range(REPEATS + 1):
            begin = time.process_time()
            call()
            seconds.append(time.process_time() - begin)
    return 1000 * min(seconds[1:])


def table() -> str:
    """The table in Markdown, and where it was measured."""
    lines = [line(HEADER), line(["-"] * len(HEADER))]
    for stored in ROWS:
        errors = (error_of_a_linear(stored), error_of_the_tiny_dit(stored))
        cells = ["" if error is None else f"{100 * error:.2f}%" for error in errors]
        times = (f"{took(stored):.0f}" for took in (milliseconds, step_milliseconds))
        lines.append(line([stored.name, f"{gigabytes_of_14b(stored):.1f}", *cells, *times]))
    where = (
        f"Times: {machine()}, bf16; a layer from {WIDTH} to {WIDTH} numbers with {TOKENS} tokens; a step of four "
        "blocks of width 256 with 480 tokens."
    )
    return "\n".join([*lines, "", where])


def filled(document: str) -> str:
    """`document` with the table in its marked part."""
    return replaced(document, BEGIN, END, table())


if __name__ == "__main__":
    print_or_write(__doc__, DOCUMENT, table, filled)
