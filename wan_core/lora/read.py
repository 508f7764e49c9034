"""From the tensors of a LoRA file to patches by module, scaled as its dialect defines."""

import hashlib
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import regex
import torch
from torch import Tensor

from ..distilled import FewSteps
from ..files import errors_from
from .naming import Dialect, parse_key
from .patches import Decomposed, Difference, Hadamard, Kronecker, LowRank, Patch, Replacement

ADAPTER_METADATA = "lora_adapter_metadata"
"""Metadata key of diffusers for the PEFT configuration as JSON, each name behind its component's."""

MATCH_SECONDS = 2.0
"""How long the patterns of a configuration may take; those of a thousand modules take a few tenths of a second."""

MAX_PATTERN = 500
"""The longest pattern, in characters; the paths of modules have less than a hundred."""

MAX_NUMBER = 1e9
"""Above every rank and alpha."""

MAX_ELEMENTS = 2**27
"""The most elements that a patch may change; the largest matrix of Wan 2.1 14B has 2**26."""


@dataclass(frozen=True)
class Skipped:
    """A key, or the name of a parameter, that was not used, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Layer:
    """What a file holds for one module, or for a parameter that is no weight or bias.

    `path` is spelled as in the file, with underscores for dots if `joined`. Each patch comes with the name of the
    parameter of the module that it changes.
    """

    path: str
    joined: bool
    patches: tuple[tuple[str, Patch], ...]


@dataclass(frozen=True, eq=False)
class Lora:
    """A LoRA file, not yet matched with a model.

    Attributes:
        name: the file's, in messages.
        layers: in the order of the file.
        skipped: keys that could not be used, whatever the model.
        dialects: how many keys each dialect has.
        alpha: the rule that gave the scales, in words.
        metadata, few_steps: the file's own, and the settings that its authors recommend if it is known as distilled.
    """

    name: str
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...] = ()
    dialects: Mapping[str, int] = field(default_factory=dict)
    alpha: str = "none"
    metadata: Mapping[str, str] = field(default_factory=dict)
    few_steps: FewSteps | None = None

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks that occur, ascending."""
        return tuple(sorted({p.rank for layer in self.layers for _, p in layer.patches if p.rank}))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all patches, whatever the file's name."""
        total = hashlib.sha256()
        for layer in self.layers:
            for leaf, patch in layer.patches:
                total.update(f"{layer.path} {leaf}".encode())
                _digest_patch(patch, total.update)
        return total.hexdigest()

    @property
    def kinds(self) -> Mapping[str, int]:
        """How many patches there are of each kind."""
        return Counter(patch.label for layer in self.layers for _, patch in layer.patches)


class _Patterns:
    """PEFT's table from patterns of module paths to numbers. The first pattern that matches the end of a path counts;
    the match begins after a dot or at the start of the path.

    Patterns come with files, and a short one can keep Python's `re` busy for ever; `regex` takes a timeout.
    """

    def __init__(self, name: str, table: Any) -> None:
        if not isinstance(table, Mapping) or not all(isinstance(key, str) for key in table):
            raise ValueError(f"{name} must be an object of patterns; got {table!r:.80}")
        if long := next((key for key in table if len(key) > MAX_PATTERN), None):
            raise ValueError(f"{name} has a pattern of {len(long)} characters; {MAX_PATTERN} is the most")
        self._name, self._left = name, MATCH_SECONDS
        self._numbers = {key: _number(f"{name}[{key!r:.80}]", value) for key, value in table.items()}
        self._compiled: dict[str, Any] = {}

    def find(self, path: str) -> float | None:
        """The number of the module at `path`.

        Raises:
            ValueError: a pattern is none, or the patterns take too long.
        """
        for key, number in self._numbers.items():
            started = time.thread_time()
            try:
                matches = self._pattern(key).match(path, timeout=MATCH_SECONDS)
            except (re.error, regex.error, RecursionError, TimeoutError) as error:
                raise ValueError(f"{self._name} has the pattern {key!r:.80}, which cannot be used ({error})") from error
            self._left -= time.thread_time() - started
            if self._left < 0:
                raise ValueError(f"{self._name} has patterns that take more than {MATCH_SECONDS:g} s to match")
            if matches:
                return number
        return None

    def _pattern(self, key: str) -> Any:
        if key not in self._compiled:
            re.compile(key)  # refuses what only `regex` has, such as recursion and fuzzy matching
            self._compiled[key] = regex.compile(rf"(.*\.)?({key})$")
        return self._compiled[key]


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_NUMBER:
        raise ValueError(f"{name} must be a number from 0 to {MAX_NUMBER:g}; got {value!r:.80}")
    return value


@dataclass(frozen=True)
class AdapterConfig:
    """PEFT's configuration, which has the alpha of adapters that is not among their tensors.

    Raises:
        ValueError: `values` are no such configuration; the message names the wrong one.
    """

    values: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise ValueError(f"an object is expected; got {self.values!r:.80}")
        for name in ("r", "lora_alpha", "alpha"):
            if self.values.get(name) is not None:
                _number(name, self.values[name])
        _ = self._ranks, self._alphas  # they check themselves

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "AdapterConfig | None":
        """The configuration that diffusers writes into a file's metadata, None when there is none.

        Raises:
            ValueError: it is no JSON object, or no such configuration.
        """
        if ADAPTER_METADATA not in metadata:
            return None
        with errors_from(f"The metadata {ADAPTER_METADATA!r} of the LoRA", "cannot be used"):
            values = json.loads(metadata[ADAPTER_METADATA])
            return cls({name.removeprefix("transformer."): value for name, value in values.items()})

    def scale(self, path: str) -> float | None:
        """The factor on up @ down of the module that the file calls `path`; None where there is no rank or alpha."""
        rank, alpha = self._ranks.find(path), self._alphas.find(path)
        rank = self.values.get("r") if rank is None else rank
        alpha = self._alpha if alpha is None else alpha
        if not rank or alpha is None:
            return None
        return alpha / (rank**0.5 if self.values.get("use_rslora") else rank)

    @cached_property
    def _ranks(self) -> _Patterns:
        return _Patterns("rank_pattern", self.values.get("rank_pattern") or {})

    @cached_property
    def _alphas(self) -> _Patterns:
        return _Patterns("alpha_pattern", self.values.get("alpha_pattern") or {})

    @property
    def _alpha(self) -> float | None:
        return self.values.get("lora_alpha", self.values.get("alpha"))

    @property
    def trains_biases(self) -> bool:
        """Whether the biases in the file are trained ones."""
        return self.values.get("bias", "none") != "none"

    def rule(self) -> str:
        """The rule in words."""
        root = "the root of " if self.values.get("use_rslora") else ""
        return f"PEFT configuration: alpha {self._alpha} over {root}rank {self.values.get('r')}"


def read_lora(
    name: str,
    keys: Iterable[str],
    tensor: Callable[[str], Tensor],
    metadata: Mapping[str, str],
    config: AdapterConfig | None = None,
) -> Lora:
    """The LoRA in a file of these `keys`; `tensor` reads the tensor of one.

    Raises:
        ValueError: none of the keys belongs to a LoRA, or the factors of a module do not fit each other.
    """
    if config is None:
        with errors_from(name, "cannot be read"):
            config = AdapterConfig.from_metadata(metadata)
    groups: dict[tuple[Dialect, str], dict[str, str]] = defaultdict(dict)
    skipped: list[Skipped] = []
    dialects: Counter[str] = Counter()
    for key in keys:
        parts = parse_key(key)
        if parts is None:
            skipped.append(Skipped(key, "no key of a LoRA"))
            continue
        reason = UNUSED.get(parts.role)
        # Only PEFT's configuration says whether such a bias was trained.
        if parts.role == "base_bias" and not (config and config.trains_biases):
            reason = UNUSED["base"]
        if parts.dialect.foreign:
            reason = f"belongs to {parts.dialect.foreign}"
        if reason:
            skipped.append(Skipped(key, reason))
            continue
        dialects[parts.dialect.name] += 1
        groups[parts.dialect, parts.path][parts.role] = key
    layers: list[Layer] = []
    rules: Counter[str] = Counter()
    fitting: set[Hashable] = set()  # a file has few kinds of modules
    for (dialect, path), roles in groups.items():
        stored = {role: tensor(key) for role, key in roles.items()}
        with errors_from(name, f"is damaged at {path}"):
            patches, used, rule = _patches(path, stored, config)
            for _, patch in patches:
                if (kind := _structure(patch)) not in fitting:
                    _check_shapes(patch)
                    fitting.add(kind)
        skipped += [Skipped(roles[r], "its counterpart is missing from the file") for r in roles.keys() - used]
        rules.update([rule] if rule else [])
        if patches:
            layers.append(Layer(path, dialect.joined, tuple(patches)))
    if not layers:
        why = f"{skipped[0].name}: {skipped[0].reason}" if skipped else "it is empty"
        raise ValueError(f"{name} holds no LoRA that can be read ({why}).")
    alpha = "; ".join(rule for rule, _ in rules.most_common()) or "no factors, so no alpha"
    return Lora(name, tuple(layers), tuple(skipped), dict(dialects.most_common()), alpha, dict(metadata))


def _digest_patch(patch: Patch, update: Callable[[bytes], None]) -> None:
    update(patch.label.encode())
    for f in fields(patch):
        value = getattr(patch, f.name)
        if isinstance(value, Patch):
            _digest_patch(value, update)
        elif isinstance(value, Tensor):
            update(f"{f.name} {value.dtype} {tuple(value.shape)}".encode())
            # As bytes, because numpy has no bfloat16.
            update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            update(f"{f.name} {value}".encode())


StoredTensors = Mapping[str, Tensor]
"""The tensors of one module by role."""

UNUSED = {
    "base": "a weight of the base model, which adapters leave as it is",
    "reshape": "changes the number of input channels, which is not supported",
}
"""Roles that are not used, and why."""

WHOLE: Mapping[str, tuple[str, Callable[[Tensor], Patch]]] = {
    "diff": ("weight", Difference),
    "diff_b": ("bias", Difference),
    "diff_m": ("modulation", Difference),
    "set_weight": ("weight", Replacement),
    "set_bias": ("bias", Replacement),
    "base_bias": ("bias", Replacement),
}
"""Roles that hold a whole tensor: the parameter they change, and how."""


def _low_rank(t: StoredTensors) -> tuple[LowRank, set[str]] | None:
    if not {"down", "up"} <= t.keys():
        return None
    if t["down"].shape[0] != t["up"].shape[1]:
        raise ValueError(f"lora_A {list(t['down'].shape)} and lora_B {list(t['up'].shape)} have different ranks")
    return LowRank(t["down"], t["up"], mid=t.get("mid")), {"down", "up", "mid"}


def _hadamard(t: StoredTensors) -> tuple[Hadamard, set[str]] | None:
    names = [f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b")]
    if not all(name in t for name in names):
        return None
    w1_a, w1_b, w2_a, w2_b = (t[name] for name in names)
    patch = Hadamard(w1_a, w1_b, w2_a, w2_b, t1=t.get("hada_t1"), t2=t.get("hada_t2"))
    return patch, {*names, "hada_t1", "hada_t2"}


def _kronecker(t: StoredTensors) -> tuple[Kronecker, set[str]] | None:
    first, second = (_kronecker_factor(t, name) for name in ("lokr_w1", "lokr_w2"))
    if first is None or second is None:
        return None
    rank = next((t[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in t), None)
    return Kronecker(first, second, dim=rank), {name for name in t if name.startswith("lokr_")}


def _kronecker_factor(t: StoredTensors, name: str) -> Tensor | None:
    if name in t:
        return t[name]
    if f"{name}_a" not in t or f"{name}_b" not in t:
        return None
    a, b, core = t[f"{name}_a"].float(), t[f"{name}_b"].float(), t.get("lokr_t2")
    # Before the product is made: small factors can stand for a matrix of any size.
    _check_elements(a.shape[0], *b.shape[1:])
    if core is not None and name == "lokr_w2":
        return torch.einsum("st...,so,ti->oi...", core.float(), a, b)
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:])


Builder = Callable[[StoredTensors], tuple[LowRank | Hadamard | Kronecker, set[str]] | None]

BUILDERS: tuple[Builder, ...] = (_low_rank, _hadamard, _kronecker)
"""From a module's tensors to the patch of its weight and the roles it uses; None where they are of another kind."""


def _check_elements(*shape: int) -> None:
    if math.prod(shape) > MAX_ELEMENTS:
        raise ValueError(f"it would change a matrix {list(shape)}, larger than any of Wan 2.1")


def _structure(patch: Patch) -> Hashable:
    """What decides whether the tensors of a patch fit together: its kind and their shapes."""
    values = (getattr(patch, f.name) for f in fields(patch))
    shapes = (tuple(v.shape) if isinstance(v, Tensor) else _structure(v) if isinstance(v, Patch) else v for v in values)
    return (type(patch), *shapes)


def _check_shapes(patch: Patch) -> None:
    """Raise ValueError unless the shapes of `patch` fit together; on the meta device, so that nothing is computed."""
    _check_elements(*patch.shape)
    meta = torch.device("meta")
    change = patch.to(meta, torch.float32).delta(torch.empty(patch.shape, device=meta))
    if change.shape != patch.shape:
        raise ValueError(f"its tensors make a change {list(change.shape)} of a matrix {list(patch.shape)}")


def _patches(
    path: str, stored: StoredTensors, config: AdapterConfig | None
) -> tuple[list[tuple[str, Patch]], set[str], str | None]:
    """The patches of one module, the roles that they use, and the rule of the scale."""
    whole = WHOLE.keys() & stored.keys()
    patches: list[tuple[str, Patch]] = [(WHOLE[role][0], WHOLE[role][1](stored[role])) for role in sorted(whole)]
    built = next((found for build in BUILDERS if (found := build(stored))), None)
    if built is None:
        return patches, whole, None
    weight, roles = built
    scale, rule = _scale(weight, path, stored, config)
    # LyCORIS's `use_scalar`: a trained factor on the whole change.
    scale *= stored["scalar"].item() if "scalar" in stored else 1.0
    if not math.isfinite(scale):
        raise ValueError(f"its factors are scaled by {scale}")
    weight = replace(weight, scale=scale)
    patches.append(("weight", Decomposed(weight, stored["magnitude"]) if "magnitude" in stored else weight))
    if "up_bias" in stored:
        patches.append(("bias", Difference(stored["up_bias"], scale)))
    return patches, whole | roles | {"alpha", "scalar", "magnitude", "up_bias"}, rule


def _scale(weight: Patch, path: str, stored: StoredTensors, config: AdapterConfig | None) -> tuple[float, str]:
    """The factor on up @ down, and the rule that it follows.

    LyCORIS ignores the alpha of a LoKr whose factors are both stored whole. `ss_network_alpha` of the metadata is not
    read: writers that fold alpha into the factors keep it there too.
    """
    if "alpha" in stored:
        return (stored["alpha"].float().item() / weight.rank if weight.rank else 1.0), "alpha tensor over rank"
    if config and (scale := config.scale(path)) is not None:
        return scale, config.rule()
    return 1.0, "no alpha, so factor 1"
