"""What a guest in another program's process owes it: no code from text, no installing, no printing, nothing changed or
done by being imported.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("nodes", "wan_core", "headless", "trainer")
FILES = sorted({ROOT / "__init__.py", *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))})
COMMAND_LINES = ("headless", "trainer")
"""Packages that are programs too, and speak to whoever started them."""

FORBIDDEN = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_METHODS = {
    "os.system", "os.popen", "os.putenv", "os.chdir", "pip.main", "sys.path.append", "sys.path.insert", "sys.exit",
    "sys.addaudithook", "torch.set_default_dtype", "torch.set_default_device", "torch.set_num_threads",
    "torch.set_grad_enabled", "torch.use_deterministic_algorithms", "torch.manual_seed", "torch.cuda.manual_seed_all",
    "random.seed", "numpy.random.seed", "np.random.seed", "warnings.filterwarnings", "warnings.simplefilter",
    "logging.basicConfig", "importlib.reload", "builtins.eval", "builtins.exec",
}  # fmt: skip

OWN_PROCESS = {
    "logging.basicConfig", "sys.exit", "torch.manual_seed", "torch.cuda.manual_seed_all", "warnings.filterwarnings",
}  # fmt: skip
"""What programs may do to the process that they are; the graph starts training in one of its own."""


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an attribute chain, empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""


def imported(tree: ast.Module) -> set[str]:
    """The names that a file gives to modules of others."""
    plain = (alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names)
    return {alias.asname or alias.name.partition(".")[0] for alias in plain}


def written(node: ast.AST) -> Iterator[str]:
    """The attributes that a statement sets, and the objects whose items it sets."""
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    for target in targets if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Delete)) else ():
        if isinstance(target, ast.Attribute):
            yield dotted(target)
        if isinstance(target, ast.Subscript):
            yield dotted(target.value)
    if isinstance(node, ast.Call) and dotted(node.func) in ("setattr", "delattr") and node.args:
        yield f"{dotted(node.args[0])}."


def breaches(source: str, is_program: bool = False) -> list[str]:
    """What the text of a file does that a guest must not, with line numbers."""
    tree, found = ast.parse(source), []
    modules = imported(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            texts = {text.value for text in ast.walk(node) if isinstance(text, ast.Constant)}
            is_print = name in ("print", "sys.stdout.write") and not is_program
            installs = "pip" in texts and name.partition(".")[0] in ("subprocess", "os", "runpy")
            allowed = is_program and name in OWN_PROCESS
            if is_print or installs or (name in FORBIDDEN | FORBIDDEN_METHODS and not allowed):
                found.append(f"line {node.lineno} calls {name}")
        for name in written(node):
            if ("." in name and name.partition(".")[0] in modules) or name == "os.environ":
                found.append(f"line {node.lineno} changes {name}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_does_what_a_guest_must_not(path):
    is_program = path.relative_to(ROOT).parts[0] in COMMAND_LINES
    assert not breaches(path.read_text(encoding="utf-8"), is_program)


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec('x = 1')",
        "print('here')",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'pip', 'install', 'x'])",
        "import os\nos.system('ls')",
        "import os\nos.environ['A'] = '1'",
        "import torch\ntorch.load = None",
        "import torch\ntorch.backends.cudnn.benchmark = True",
        "import torch\nsetattr(torch, 'load', None)",
        "import torch.nn as nn\nnn.Linear.forward = None",
        "import sys\nsys.path.insert(0, '.')",
        "import torch\ntorch.manual_seed(1)",
        "import logging\nlogging.basicConfig()",
    ],
)
def test_breaches_are_seen(source):
    assert breaches(source)


IMPORT = """
import collections, importlib.util, json, logging, os, random, signal, sys, threading, types, warnings
sys.dont_write_bytecode = True
import numpy, torch, ftfy, safetensors.torch, PIL.Image
root, changes = sys.argv[1], []

WATCHED = {"os.mkdir", "os.rename", "os.remove", "os.system", "subprocess.Popen", "socket.connect", "shutil.copyfile"}
def watch(event, arguments):
    if watching and event in WATCHED:
        changes.append(f"{event} {arguments[:1]}")
    if watching and event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        changes.append(f"writes {arguments[0]}")
watching = False
sys.addaudithook(watch)

def state():
    return {
        "path": list(sys.path), "environment": dict(os.environ), "folder": os.getcwd(), "hooks": list(sys.meta_path),
        "logging": (logging.root.level, list(logging.root.handlers)), "warnings": list(warnings.filters),
        "interrupt": signal.getsignal(signal.SIGINT), "threads": threading.active_count(),
        "random": (random.getstate(), torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist()),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled(),
                  torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32,
                  torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()),
        "cuda": torch.cuda.is_initialized(),
    }

def contents():
    # What others made callable or a class; modules and caches appear as they are imported and used.
    kinds = (type, types.FunctionType, types.BuiltinFunctionType)
    owners = {}
    for name, module in list(sys.modules.items()):
        values = dict(vars(module)) if isinstance(module, types.ModuleType) else {}
        owners[name] = {key: value for key, value in values.items() if issubclass(type(value), kinds)}
    for cls in (torch.nn.Module, torch.nn.Linear, torch.nn.Conv3d, torch.Tensor):
        owners[cls.__qualname__] = dict(vars(cls))
    return owners

before, had = state(), contents()
watching = True
name = "a guest"
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
pack = importlib.util.module_from_spec(spec)
sys.modules[name] = pack
spec.loader.exec_module(pack)
watching = False
after, has = state(), contents()
changes += [f"state: {key}" for key in before if before[key] != after[key]]
changes += [
    f"{owner}.{key}" for owner, values in had.items() for key, value in values.items()
    if has[owner].get(key) is not value
]
print(json.dumps([len(pack.NODE_CLASS_MAPPINGS), changes]))
"""


def imported_as_a_guest(root: Path) -> tuple[int, list[str]]:
    """How many nodes the pack brings, and what its import changed in the process or on disk."""
    command = [sys.executable, "-c", IMPORT, str(root)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert not done.returncode, done.stderr
    assert not done.stderr
    *said, answer = done.stdout.splitlines()
    assert not said, "an import says nothing"
    return tuple(json.loads(answer))


def test_importing_changes_nothing():
    count, changes = imported_as_a_guest(ROOT)
    assert count and not changes


CHANGES = {
    "open(__file__ + '.log', 'w').close()": "writes",
    "torch.load = None": "torch.load",
    "torch.nn.Linear.forward = None": "Linear.forward",
    "sys.path.append('/')": "state: path",
    "torch.manual_seed(3)": "state: random",
    "subprocess.run(['true'])": "subprocess.Popen",
}
"""Bad manners, and the words for them."""


def test_what_an_import_changes_is_seen(tmp_path):
    lines = ["import subprocess, sys, torch", *CHANGES, "NODE_CLASS_MAPPINGS = {}"]
    (tmp_path / "__init__.py").write_text("\n".join(lines))
    _, changes = imported_as_a_guest(tmp_path)
    missed = [line for line, words in CHANGES.items() if not any(words in change for change in changes)]
    assert not missed
