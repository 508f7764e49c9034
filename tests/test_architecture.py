"""The house rules: imports point one way, the host has one door, conditioning declares its time axes, files stay
readable.
"""

import ast
import dataclasses
from pathlib import Path

import pytest

from wan_core.types import Conditioning
from wan_core.variants import VARIANTS

ROOT = Path(__file__).parents[1]
PACKAGES = ("nodes", "wan_core", "headless", "trainer")
FILES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
HOST_MODULES = {"comfy", "folder_paths", "latent_preview", "server", "execution", "comfy_api", "comfy_extras", "nodes"}

# Packages that a package may import besides itself.
ALLOWED = {
    "wan_core": set(),
    "trainer": {"wan_core"},
    "nodes": {"wan_core", "trainer"},
    "headless": {"wan_core", "nodes", "trainer"},
}

# What the nodes know of the trainer: its settings and what it writes down. Training itself is another process.
SHOWN = {"config", "flags", "inputs", "events", "chart"}

# Inside wan_core a room imports from itself and from rooms of lower levels; rooms of one level do not know each other.
LEVELS = {
    "types": 0, "settings": 0, "runtime": 0, "atomic": 0, "tiling": 0, "folders": -1, "reading": 0,
    "media": 1, "models": 1, "memory": 1,
    "lora": 2,
    "fitting": 3, "variants": 3, "catalog": 3, "checkpoints": 3,
    "tiny": 4, "conditioning": 4, "sampling": 4, "adapters": 4,
    "budget": 5, "rest": 5,
    "prepare": 6, "decode": 6,
    "model_config": 7, "inspection": 7,
    "loading": 8, "parts": 9, "pipeline": 10,
    "__init__": 11,
}  # fmt: skip

# The same for the trainer's files.
TRAINER_LEVELS = {
    "__init__": 0, "flags": 0, "inputs": 0, "masks": 0, "video": 0, "sampler": 0, "objective": 0, "checkpointing": 0,
    "chart": 0, "stopping": 0, "recipes": 0, "optimizers": 0, "reference": 0,
    "cache": 1, "config": 1, "state": 1,
    "dataset": 2, "events": 2, "starting": 2, "task": 2, "trainable": 2, "plan": 2, "synthetic": 2,
    "recipe_command": 2, "tables": 2,
    "report": 3, "models": 3, "export": 3, "placing": 3, "sharding": 3,
    "draws": 4, "encoders": 4, "engine": 4, "estimate": 4,
    "conditions": 5, "checking": 5, "saving": 5,
    "validate": 6,
    "watching": 7,
    "loop": 8, "output": 8,
    "run": 9,
    "train": 10, "recipe": 10, "check": 10, "attended": 10, "documents": 10,
}  # fmt: skip

MAX_FILE, MAX_FUNCTION = 400, 60
LONG_FUNCTIONS = {
    "WanVideoPipeline.__call__": "half of it is the documentation of the public parameters",
}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path):
    """(is relative, dotted name from the pack's root) of every import in a file, wherever it stands."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield False, node.module
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1])
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((True, f"{base}.{name}".strip(".")) for name in names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for relative, name in imports(path):
        top = name.split(".")[0]
        if top in PACKAGES or top == "wancore":
            assert top in ALLOWED[package] | {package}, f"{package} must not import {name}"
            # The library has its own name; the others are together in `wancore`, a name that their own folder lacks.
            assert relative == (top != "wan_core" or package == "wan_core"), f"{path.name}: wrong way to import {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").glob("*.py")), ids=lambda p: p.name)
def test_nodes_know_only_settings_and_reports_of_the_trainer(path):
    assert {name.split(".")[1] for _, name in imports(path) if name.startswith("trainer.")} <= SHOWN


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent != ROOT / "headless"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_only_host_imports_comfyui(path):
    if path == ROOT / "nodes" / "host.py":
        return
    found = {name for relative, name in imports(path) if not relative and name.split(".")[0] in HOST_MODULES}
    assert not found


def room(path: Path) -> str:
    return path.relative_to(ROOT / "wan_core").with_suffix("").parts[0]


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.is_relative_to(ROOT / "wan_core")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_rooms_of_wan_core_know_only_lower_ones(path):
    own = room(path)
    for relative, name in imports(path):
        if not relative or name == "wan_core":
            continue
        other = name.split(".")[1]
        fine = other == own or LEVELS[other] < LEVELS[own]
        assert fine, f"{own} (level {LEVELS[own]}) imports {other} (level {LEVELS[other]})"


def test_every_room_has_a_level():
    assert {room(p) for p in FILES if p.is_relative_to(ROOT / "wan_core")} <= set(LEVELS)


@pytest.mark.parametrize("path", sorted((ROOT / "trainer").glob("*.py")), ids=lambda p: p.name)
def test_files_of_the_trainer_know_only_lower_ones(path):
    for relative, name in imports(path):
        if relative and name.startswith("trainer."):
            other = name.split(".")[1]
            fine = TRAINER_LEVELS[other] < TRAINER_LEVELS[path.stem]
            assert fine, f"{path.stem} (level {TRAINER_LEVELS[path.stem]}) imports {other} ({TRAINER_LEVELS[other]})"


@pytest.mark.parametrize("field", dataclasses.fields(Conditioning), ids=lambda f: f.name)
def test_conditioning_declares_its_time_axis(field):
    assert set(field.metadata) == {"time", "prefixed"}
    assert field.metadata["time"] is None or field.metadata["time"] >= 0
    assert field.default is None


def functions(tree: ast.Module):
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                owner = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield f"{owner}{child.name}", child.end_lineno - child.lineno + 1


@pytest.mark.parametrize("path", [*FILES, ROOT / "quickstart.py"], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_fit_on_a_screen_or_two(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE
    long = {name: size for name, size in functions(parse(path)) if size > MAX_FUNCTION and name not in LONG_FUNCTIONS}
    assert not long


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if p.is_relative_to(ROOT / "wan_core") and room(p) in ("models", "sampling", "memory")],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_no_variant_name_is_compared(path):
    variants = {variant.name for variant in VARIANTS}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Compare):
            compared = {c.value for c in (node.left, *node.comparators) if isinstance(c, ast.Constant)}
            assert not compared & variants


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_public_function_is_typed(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            arguments = [
                a
                for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if a.arg not in ("self", "cls")
            ]
            untyped = [a.arg for a in arguments if a.annotation is None]
            assert not untyped and node.returns is not None, f"{node.name}: {untyped or 'return'}"
