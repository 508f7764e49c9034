"""quickstart.py as a user meets it: copied to a folder of its own, with real Pythons and pip on stand-in wheels."""

import argparse
import ast
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.programs import PATIENCE
from wancore import quickstart

SOURCE = Path(quickstart.__file__)
HEADLESS = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_DFL)
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
if "Prompt.prompt=fail" in sys.argv:
    sys.exit("headless: no such prompt")
if "Prompt.prompt=wait" in sys.argv:
    print("waiting", flush=True)
    time.sleep(60)
out.mkdir(exist_ok=True)
(out / "film.mp4").touch()
print("step 1/1", file=sys.stderr)
print(out / "film.mp4")
"""


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A pack whose requirements the running Python has, and whose headless runner writes an empty film."""
    folder = tmp_path / "the pack"
    (folder / "headless").mkdir(parents=True)
    (folder / "headless/__main__.py").write_text(HEADLESS)
    (folder / "requirements.txt").write_text("pytest>=7\n")
    (folder / "requirements-dev.txt").write_text("-r requirements.txt\npytest-xdist>=2\n")
    shutil.copy(SOURCE, folder)
    return folder


def run(pack: Path, *arguments: str, python: str = sys.executable, **env: str) -> subprocess.CompletedProcess:
    """quickstart.py of `pack`, run from elsewhere, with pip cut off from the network and from its settings."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "WANCORE_"))}
    offline = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(pack.parent)}
    command = [python, str(pack / "quickstart.py"), *arguments]
    settings = {"env": {**kept, **offline, **env}, "cwd": pack.parent, "stdin": subprocess.DEVNULL}
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PATIENCE, **settings)


def make_wheel(folder: Path, name: str, version: str) -> None:
    """An installable wheel with one empty module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


def empty_venv(folder: Path) -> Path:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder


def test_an_old_python_can_read_the_file_up_to_the_version_check() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 6))
    check = next(index for index, node in enumerate(tree.body) if isinstance(node, ast.If))
    assert not [node for node in tree.body[:check] if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    program = ast.unparse(ast.Module(tree.body[: check + 1], []))
    old = f"import sys; sys.version_info = (3, 9, 18)\n{program}"
    done = subprocess.run([sys.executable, "-c", old], capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1) and "3.10 or newer; this is 3.9" in done.stderr


def test_help_names_every_option_and_command(pack: Path) -> None:
    done = run(pack, "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("--model", "--prompt", "--seed", "--out", "--venv", "test", "install"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--seed", "x"], "'x'"),
        (["--seed=-1"], "'-1'"),
        (["--seed", str(2**64)], "2**64"),
        (["--modle", "m"], "--modle"),
        (["tset"], "tset"),
        (["install", "-k", "x"], "-k"),
        (["--prompt"], "--prompt"),
    ],
)
def test_a_mistyped_command_line_is_refused_before_anything_runs(pack: Path, arguments: list[str], named: str) -> None:
    done = run(pack, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr.splitlines()[-1]


def test_test_passes_its_arguments_on_in_order() -> None:
    options = quickstart.parse(["test", "tests/models", "-k", "rope and not slow", "--venv", "v", "-x", "--seed"])
    assert options.pytest == ["tests/models", "-k", "rope and not slow", "-x", "--seed"]
    assert (options.run, options.venv) == (quickstart.run_tests, Path("v"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ["--tiny"]),
        (["--prompt", "a cat = a dog"], ["--tiny", "--set", "Prompt.prompt=a cat = a dog"]),
        (["--seed", "0"], ["--tiny", "--set", "Sampler.seed=0"]),
        (
            ["--model", "Wan-AI/Wan2.1-T2V-1.3B", "--seed", "7"],
            [
                *["--set", "Load model.model=Wan-AI/Wan2.1-T2V-1.3B", "--set", "Load model.download=true"],
                *["--set", "Load text encoder.download=true", "--set", "Load VAE.download=true"],
                *["--set", "Sampler.seed=7"],
            ],
        ),
    ],
)
def test_options_become_inputs_of_the_workflow(arguments: list[str], expected: list[str]) -> None:
    options: argparse.Namespace = quickstart.parse(arguments)
    command = quickstart.workflow_command(Path("py"), Path("o"), options.model, options.prompt, options.seed)
    assert command == ["py", "-m", "headless", "run", "workflows/api/t2v.json", "--out", "o", *expected]


@pytest.mark.skipif(os.name == "nt", reason="a program without a suffix is none on Windows")
def test_a_driver_program_on_the_path_means_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert quickstart.accelerator() == "cuda"


def test_the_active_python_is_used_when_it_has_everything(pack: Path) -> None:
    done = run(pack)
    assert (done.returncode, done.stderr) == (0, "step 1/1\n")
    assert done.stdout.splitlines()[0].endswith(sys.executable)
    assert done.stdout.splitlines()[-1] == str(pack / "output/film.mp4")
    assert not (pack / ".venv").exists()


def test_out_is_relative_to_where_the_user_stands(pack: Path) -> None:
    done = run(pack, "--out", "films")
    assert done.stdout.splitlines()[-1] == str(pack.parent / "films/film.mp4")


def test_out_that_is_a_file_is_refused_before_anything_runs(pack: Path) -> None:
    (pack.parent / "films").write_text("mine")
    done = run(pack, "--out", "films")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "is a file" in done.stderr
    assert (pack.parent / "films").read_text() == "mine"


def test_a_failed_run_speaks_for_itself(pack: Path) -> None:
    done = run(pack, "--prompt", "fail")
    assert (done.returncode, done.stderr) == (1, "headless: no such prompt\n")


def test_test_gives_back_the_exit_code_of_pytest(pack: Path) -> None:
    (pack / "test_one.py").write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    assert run(pack, "test", "-k", "good", "test_one.py").returncode == 0
    assert run(pack, "test", "test_one.py").returncode == 1


@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent differently on Windows")
def test_ctrl_c_is_one_line(pack: Path) -> None:
    command = [sys.executable, str(pack / "quickstart.py"), "--prompt", "wait"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:
        while "waiting" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=PATIENCE)[1]
    assert (process.returncode, errors.strip()) == (130, "quickstart: stopped.")


@pytest.mark.parametrize("damage", ["interpreter gone", "not a program", "no pip"])
def test_a_broken_environment_is_named_and_left_alone(pack: Path, damage: str) -> None:
    venv = empty_venv(pack / "env")
    python = quickstart.venv_python(venv)
    if damage != "no pip":
        python.unlink()
    if damage == "not a program":
        python.write_text("")
    before = sorted(venv.rglob("*"))
    done = run(pack, "--venv", str(venv))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(venv) in done.stderr
    assert "Delete" in done.stderr
    assert sorted(venv.rglob("*")) == before


@pytest.mark.parametrize("name", ["a folder", "a file"])
def test_what_is_no_environment_is_refused_and_left_alone(pack: Path, name: str) -> None:
    path = pack / "mine"
    kept = path / "notes.txt" if name == "a folder" else path
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    done = run(pack, "--venv", str(path))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "no virtual environment" in done.stderr
    assert kept.read_text() == "mine"


def test_a_half_made_environment_is_taken_away(pack: Path) -> None:
    (pack / "venv.py").write_text("import os, sys\nos.makedirs(sys.argv[-1] + '/bin')\nsys.exit('no room for bin')\n")
    done = run(pack, "--venv", str(pack / "env"), PYTHONPATH=str(pack))
    said, line = done.stderr.splitlines()
    assert (done.returncode, said) == (1, "no room for bin")
    assert line == f"quickstart: Python could not make {pack / 'env'}; its output above says why."
    assert not (pack / "env").exists()


def test_from_nothing_to_a_film_and_again_without_pip(pack: Path) -> None:
    (pack / "requirements.txt").write_text("torch>=2.4\nstand_in>=1\n")
    make_wheel(pack.parent, "torch", "2.5")
    make_wheel(pack.parent, "torch", "2.6")
    make_wheel(pack.parent, "stand_in", "1.0")

    first = run(pack, WANCORE_TORCH="torch==2.5")
    assert first.returncode == 0
    assert [line.split(" ...")[0] for line in first.stdout.splitlines() if line.endswith("...")][:3] == [
        f"Making {pack / '.venv'}",
        "Installing torch==2.5",
        "Installing requirements.txt",
    ]
    assert first.stdout.splitlines()[-1] == str(pack / "output/film.mp4")
    site = next((pack / ".venv").rglob("stand_in.py")).parent
    assert [path.name for path in site.glob("torch-*")] == ["torch-2.5.dist-info"]

    second = run(pack)
    assert second.returncode == 0
    assert "Installing" not in second.stdout

    (pack / "requirements.txt").write_text("torch>=2.4\nstand_in>=2\n")
    third = run(pack)
    assert third.returncode == 1
    assert third.stderr.splitlines()[-1].startswith("quickstart: pip could not install requirements.txt")
    assert "No matching distribution found for stand_in>=2" in third.stderr
    assert "Traceback" not in third.stderr


@pytest.mark.skipif(os.name == "nt", reason="the user's site folder is laid out differently on Windows")
def test_a_torch_outside_of_environments_is_kept(pack: Path) -> None:
    (pack / "requirements.txt").write_text("torch>=2.4\nstand_in>=1\n")
    make_wheel(pack.parent, "stand_in", "1.0")
    make_wheel(pack, "torch", "2.6")
    python, home = sys._base_executable, str(pack / "home")
    find_site = [python, "-m", "site", "--user-site"]
    site = subprocess.run(find_site, env={**os.environ, "PYTHONUSERBASE": home}, capture_output=True, encoding="utf-8")
    with zipfile.ZipFile(pack / "torch-2.6-py3-none-any.whl") as wheel:
        wheel.extractall(site.stdout.strip())

    done = run(pack, python=python, PYTHONUSERBASE=home)
    assert done.returncode == 0
    assert "around the torch you have" in done.stdout.splitlines()[0]
    assert [path.name for path in (pack / ".venv").rglob("torch*")] == []
    assert list((pack / ".venv").rglob("stand_in.py"))


def test_an_index_out_of_reach_falls_back_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    venv = empty_venv(tmp_path / "env")
    subprocess.run([quickstart.venv_python(venv), "-m", "ensurepip"], check=True, capture_output=True)
    monkeypatch.setattr(quickstart, "accelerator", lambda: "cpu")
    monkeypatch.setattr(quickstart, "TORCH_INDEXES", {(sys.platform, "cpu"): "http://127.0.0.1:9/simple"})
    for name in [name for name in os.environ if name.startswith(("PIP_", "WANCORE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    quickstart.install_torch(venv)
    assert "out of reach" in capsys.readouterr().out
    assert not list(venv.rglob("torch"))
