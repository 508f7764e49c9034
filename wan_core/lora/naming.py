"""The keys of LoRA files: the program that wrote one, the module that it changes, and which tensor of the change."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

Aliases = Callable[[str], Iterable[str]]
"""Other spellings of a dotted module path, such as the path of the same module in another library."""


@dataclass(frozen=True)
class Dialect:
    """One way to name the module of a key.

    Attributes:
        name: the program's.
        prefix: of its keys.
        joined: whether the dots of the path are written as underscores.
        foreign: the model that keys with this prefix belong to, if that is not the video transformer.
    """

    name: str
    prefix: str
    joined: bool = False
    foreign: str | None = None


DIALECTS = (
    Dialect("VideoX-Fun", "lora_unet__", joined=True),
    Dialect("kohya", "lora_unet_", joined=True),
    Dialect("LyCORIS", "lycoris_", joined=True),
    Dialect("OneTrainer", "lora_transformer_", joined=True),
    Dialect("kohya", "lora_te", joined=True, foreign="the text encoder"),
    Dialect("diffusers", "text_encoder.", foreign="the text encoder"),
    Dialect("ComfyUI", "text_encoders.", foreign="the text encoder"),
    Dialect("PEFT", "base_model.model."),
    Dialect("ComfyUI", "model.diffusion_model."),
    Dialect("ComfyUI", "diffusion_model."),
    Dialect("diffusers", "transformer."),
    Dialect("DiffSynth", "pipe.dit."),
    Dialect("DiffSynth", "pipe.vace."),
    Dialect("DiffSynth", "pipe.motion_controller."),
    Dialect("bare", ""),
)
"""Every known dialect, in the order of trial: of two prefixes that overlap, the longer stands first.

The path behind a prefix is looked up among the model's own names and their aliases, so that diffusers' names are read
behind every prefix. Keys without a prefix are DiffSynth's if they name their adapter (`lora_A.default`).
"""


def dialect_of(prefix: str) -> Dialect:
    """The dialect whose keys begin with `prefix`."""
    return next(dialect for dialect in DIALECTS if dialect.prefix == prefix)


_ADAPTER = r"(?:\.(?!weight|bias)\w+)?"

ROLES: Mapping[str, str] = MappingProxyType(
    {
        "down": rf"lora_(?:A|down){_ADAPTER}\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight",
        "up": rf"lora_(?:B|up){_ADAPTER}\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight",
        "mid": r"lora_mid\.weight",
        "up_bias": rf"lora_(?:B|up){_ADAPTER}\.bias",
        "alpha": r"alpha",
        "scalar": r"scalar",
        "magnitude": r"dora_scale|lora_magnitude_vector(?:\.\w+)*",
        "diff": r"diff|w_norm",
        "diff_b": r"diff_b|b_norm",
        "diff_m": r"diff_m",
        **{
            name: rf"{name}{_ADAPTER}"
            for name in (
                *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
                *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
            )
        },
        "base": r"base_layer\.weight|original_module\.(?:weight|bias)",
        "base_bias": r"base_layer\.bias",
        "set_weight": rf"(?:modules_to_save{_ADAPTER}\.)?weight|set_weight",
        "set_bias": rf"(?:modules_to_save{_ADAPTER}\.)?bias",
        "reshape": r"reshape_weight",
    }
)
"""The tensors of a change, and how the last part of their keys is written."""

_KEY = re.compile(r"(?P<path>.+?)\.(?:" + "|".join(f"(?P<{role}>{text})" for role, text in ROLES.items()) + ")")


@dataclass(frozen=True)
class ParsedKey:
    """The parts of a LoRA key: `path` is the module as the file spells it, without its prefix."""

    dialect: Dialect
    path: str
    role: str


def parse_key(key: str) -> ParsedKey | None:
    """The parts of `key`; None if it does not end like the key of a LoRA."""
    match = _KEY.fullmatch(key)
    if match is None or match.lastgroup is None:
        return None
    path, outer = match["path"], None
    # Prefixes are stacked, such as PEFT's around diffusers'; the outermost names the dialect.
    while True:
        dialect = next(dialect for dialect in DIALECTS if path.startswith(dialect.prefix))
        outer = outer or dialect
        if not dialect.prefix or dialect.joined or dialect.foreign:
            break
        path = path.removeprefix(dialect.prefix)
    if not outer.prefix and ".default." in key:
        outer = next(dialect for dialect in DIALECTS if dialect.name == "DiffSynth")
    if dialect.joined or dialect.foreign:
        outer, path = dialect, path.removeprefix(dialect.prefix)
    return ParsedKey(outer, path, match.lastgroup)


LORA_ROLES = (
    "down",
    "up",
    "magnitude",
    "diff",
    "diff_b",
    "diff_m",
    *(r for r in ROLES if r.startswith(("hada", "lokr"))),
)
"""Roles whose keys belong to a LoRA alone; those of other roles end like keys of models (`alpha`, `weight`)."""


def is_lora(keys: Iterable[str]) -> bool:
    """Whether a file with these keys is a LoRA; one key of `LORA_ROLES` proves it."""
    parts = (parse_key(key) for key in keys)
    return any(part is not None and part.role in LORA_ROLES for part in parts)


@dataclass(frozen=True)
class Spellings:
    """From the path in a file to the module or parameter of the model that it stands for.

    Built from the model's names, because a path with underscores for dots cannot be split (`self_attn`, `k_img`).
    """

    dotted: Mapping[str, str]
    joined: Mapping[str, str]

    @classmethod
    def of(cls, names: Iterable[str], aliases: Aliases = lambda name: ()) -> "Spellings":
        """Spellings of `names`, which are dotted paths of modules and parameters."""
        dotted = {alias: name for name in names for alias in aliases(name)} | {name: name for name in names}
        return cls(dotted, {spelling.replace(".", "_"): name for spelling, name in dotted.items()})

    def find(self, path: str, joined: bool) -> str | None:
        """The model's name for `path`; None when it has none."""
        return (self.joined if joined else self.dotted).get(path)
