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
SHOWN = {"config", "flags", "data.clips", "run.events", "run.chart"}

# Inside wan_core a room imports from itself and from rooms of lower levels; rooms of one level do not know each other.
LIBRARY = {
    "checks": -2, "sampling.cache_tables": -2, "parallel": -2,
    "files": -1, "offload.packed": -1, "models.config": -1, "sampling.solvers": -1, "cache_settings": -1,
    "types": 0, "settings": 0, "drift": 0, "runtime": 0, "atomic": 0, "tiling": 0, "offload.formats": 0,
    "media": 1, "models": 1, "offload": 1, "distilled": 1, "magnitudes": 1,
    "lora": 2,
    "variants": 3, "catalog": 3, "loading": 3,
    "bundled": 4, "conditioning": 4, "sampling": 4, "call_arguments": 4, "lora.target": 4, "lora.convert": 4,
    "planning": 5, "recommend": 5, "parallel.tasks": 5, "parallel.cards": 5,
    "model": 6, "decode": 6,
    "model_files": 7,
    "model_config": 8, "inspection": 8,
    "pipeline_models": 9, "pipeline_calls": 10, "films": 11, "pipeline": 12,
    "__init__": 13,
}  # fmt: skip

# The same for the trainer.
TRAINER = {
    "flags": 0, "optimizers": 0, "objective": 0, "data.clips": 0, "run.chart": 0,
    "config": 1,
    "recipe": 2, "data": 2, "model": 2,
    "data.conditions": 3, "data.cache": 3, "export": 3,
    "run": 4,
    "check": 5, "train": 5,
    "": 6,
}  # fmt: skip
LEVELS = {"wan_core": LIBRARY, "trainer": TRAINER}

MAX_FILE, MAX_FUNCTION = 400, 60
LONG_FUNCTIONS = {
    "WanVideoPipeline.__call__": "half of it is the documentation of the public parameters",
    "Films.extend": "the same",
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
    assert {name.removeprefix("trainer.") for _, name in imports(path) if name.startswith("trainer.")} <= SHOWN


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parent != ROOT / "headless"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_only_host_imports_comfyui(path):
    if path == ROOT / "nodes" / "comfyui.py":
        return
    found = {name for relative, name in imports(path) if not relative and name.split(".")[0] in HOST_MODULES}
    assert not found


def level(name: str, levels: dict[str, int]) -> int:
    """Of a module, such as `lora.target`: its own, or that of its room."""
    return levels.get(name, levels.get(name.partition(".")[0], levels.get("", 0)))


def inside(package: str, path: Path) -> str:
    """The module of a path, without its package: `lora.target`."""
    return ".".join(path.relative_to(ROOT / package).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize(
    ("package", "path"),
    [(package, p) for package in LEVELS for p in FILES if p.is_relative_to(ROOT / package)],
    ids=lambda value: value if isinstance(value, str) else str(value.relative_to(ROOT)),
)
def test_rooms_know_only_lower_ones(package, path):
    own, levels = inside(package, path), LEVELS[package]
    for relative, name in imports(path):
        if relative and name.startswith(f"{package}."):
            other = name.removeprefix(f"{package}.")
            same = other.partition(".")[0] == own.partition(".")[0] and level(other, levels) == level(own, levels)
            fine = same or level(other, levels) < level(own, levels)
            assert fine, f"{own} (level {level(own, levels)}) imports {other} (level {level(other, levels)})"


def test_every_room_of_the_library_has_a_level():
    found = {inside("wan_core", p).partition(".")[0] for p in FILES if p.is_relative_to(ROOT / "wan_core")}
    assert found <= set(LEVELS["wan_core"])


@pytest.mark.parametrize("field", dataclasses.fields(Conditioning), ids=lambda f: f.name)
def test_conditioning_declares_its_time_axis(field):
    assert set(field.metadata) == {"time", "prefixed", "host"}
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
    [
        p
        for p in FILES
        if p.is_relative_to(ROOT / "wan_core")
        and p.relative_to(ROOT / "wan_core").parts[0] in ("models", "sampling", "offload")
    ],
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


def writes_data(path: Path) -> bool:
    """Whether code in a file gives a tensor other memory: `tensor.data = ...`."""
    targets = (t for node in ast.walk(parse(path)) if isinstance(node, ast.Assign) for t in node.targets)
    parts = (part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target]))
    return any(isinstance(part, ast.Attribute) and part.attr == "data" for part in parts)


def test_the_data_of_a_weight_is_set_in_one_place():
    found = {inside("wan_core", path) for path in FILES if path.is_relative_to(ROOT / "wan_core") and writes_data(path)}
    # The VAE's layout is chosen once, when it is loaded.
    assert found == {"offload.blocks", "models.vae"}
