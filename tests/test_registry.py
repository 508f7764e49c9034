"""What ComfyUI's registry and Manager read: metadata, the archive, and the rules for packs."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.programs import PATIENCE

ROOT = Path(__file__).parents[1]
SHIPPED = ("__init__.py", "pack.py", "nodes", "wan_core", "headless", "trainer", "workflows", "tools")
SOURCES = sorted(
    path
    for name in SHIPPED
    for path in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py"))
    if path.is_file()
)
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def comfy_cli() -> str:
    """comfy-cli's command; a test that needs it is skipped where it is not installed."""
    command = shutil.which("comfy", path=str(Path(sys.executable).parent)) or shutil.which("comfy")
    if command is None:
        pytest.skip("needs comfy-cli: pip install comfy-cli")
    return command


def field(name: str) -> str:
    return re.search(rf'^{re.escape(name)} = "(.+)"$', PROJECT, re.MULTILINE)[1]


def test_comfy_node_validate_passes(tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "DO_NOT_TRACK": "1", "XDG_CONFIG_HOME": str(tmp_path)}
    command = [comfy_cli(), "--skip-prompt", "--no-enable-telemetry", "node", "validate"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=PATIENCE)
    said = done.stdout + done.stderr
    assert not done.returncode, said
    assert "validation checks passed" in said and "Warning" not in said, said


def test_the_metadata_follows_the_registrys_rules():
    assert re.fullmatch(r"[a-z][a-z0-9._-]{0,99}", field("name")) and "comfyui" not in field("name").lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", field("version"))
    assert field("PublisherId") and field("DisplayName")
    assert field("requires-comfyui").startswith(">=")
    assert {"Repository", "Documentation"} <= set(re.findall(r"^(\w+) = \"https://", PROJECT, re.MULTILINE))
    icon = field("Icon")
    assert icon.startswith(
        f"https://raw.githubusercontent.com{field('Repository').removeprefix('https://github.com')}/"
    )
    assert (ROOT / icon.split("/main/")[1]).stat().st_size < 20_000


def test_comfy_cli_reads_the_metadata_as_it_is_written(tmp_path):
    script = (
        "from comfy_cli.registry.config_parser import extract_node_configuration as read; c = read();"
        "print(c.project.name, c.project.version, c.tool_comfy.publisher_id, c.tool_comfy.icon,"
        " c.project.supported_comfyui_version, *c.project.supported_accelerators, sep='\\n')"
    )
    python = Path(comfy_cli()).resolve().parent / Path(sys.executable).name
    env = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run([python, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    lines = done.stdout.splitlines()[-9:]
    for expected in (field("name"), field("version"), field("PublisherId"), field("Icon"), field("requires-comfyui")):
        assert expected in lines
    assert "GPU :: NVIDIA CUDA" in " ".join(lines)


def test_the_archive_holds_what_runs_and_what_the_editor_shows(tmp_path):
    pathspec = pytest.importorskip("pathspec", reason="comes with comfy-cli")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False).stdout
    tracked = [name.decode() for name in listed.split(b"\0") if name]
    if not tracked:
        pytest.skip("not a git checkout")
    ignored = pathspec.PathSpec.from_lines("gitignore", (ROOT / ".comfyignore").read_text().splitlines())
    includes = re.findall(r'"(.+?)"', re.search(r"^includes = \[(.*)\]", PROJECT, re.MULTILINE)[1])
    kept = {path for path in tracked if not ignored.match_file(path)} | set(includes)
    needed = ("__init__.py", "nodes/__init__.py", "wan_core/__init__.py", "web/docs/WanCoreSampler.md", "LICENSE")
    needed += ("locales/zh/nodeDefs.json", "workflows/api/t2v.json", "requirements.txt")
    assert kept.issuperset(needed)
    assert not [path for path in kept if path.startswith(("tests/", "tools/", ".ci/", "quickstart"))]
    assert all((ROOT / path).exists() for path in includes)
    named_otherwise = [path for path in kept if not path.isascii()]
    assert all(path.partition("/")[0] in includes for path in named_otherwise), "comfy-cli does not see them in git"
    assert sum((ROOT / path).stat().st_size for path in kept if (ROOT / path).is_file()) < 25_000_000


def called(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_evaluated_or_installed(path):
    assert not [(name, line) for name, line in called(path) if name in ("eval", "exec", "__import__", "compile")]
    source = path.read_text(encoding="utf-8")
    assert not re.search(r"""['"]pip['"], *['"]install""", source), "a pack must not install at run time"


WATCHED_IMPORT = """
import sys
written = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        written.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.remove", "os.rename", "subprocess.Popen", "socket.connect"):
        written.append(f"{event} {arguments[0]}")
sys.addaudithook(watch)
sys.path.insert(0, sys.argv[1])
import pack
pack.register()
import wancore.nodes
assert not [entry for entry in written if entry != "/dev/null"], written
"""


def test_importing_the_pack_writes_prints_and_fetches_nothing(tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", WATCHED_IMPORT, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


DISTRIBUTIONS = {"pillow": "PIL"}
"""Packages whose import has another name."""

OPTIONAL = {"websocket", "wandb", "deepspeed", "huggingface_hub", "ray"}
"""What is imported only where it is there; what needs it says so where it is not."""

HOST = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview"}
OWN = {"wan_core", "nodes", "headless", "trainer", "tools", "workflows", "pack", "wancore"}


def test_what_is_imported_is_required_and_nothing_else():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    required = {DISTRIBUTIONS.get(name, name) for name in (line.partition(">=")[0] for line in lines)}
    imported = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            imported |= {name.partition(".")[0] for name in names}
    assert imported - OPTIONAL - HOST - OWN - sys.stdlib_module_names == required


def test_the_packs_requirements_pin_nothing_of_the_hosts():
    for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").split("\n"):
        assert not line or re.fullmatch(r"[A-Za-z0-9_-]+>=[\d.]+", line), f"{line!r} can break another pack"
