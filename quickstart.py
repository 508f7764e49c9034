"""From a fresh clone to a video: makes `.venv` beside this file, installs the requirements, runs the shipped workflow.

It does what pip cannot: the environment, and torch in the build that fits the machine. Standard library only, in syntax
that Python 3.6 can read, so that an old interpreter gets one clear line.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

# Before anything below is defined: its annotations are already too new for the interpreters this turns away.
if sys.version_info < (3, 10):
    sys.exit(f"quickstart: WanCore needs Python 3.10 or newer; this is {sys.version_info[0]}.{sys.version_info[1]}.")

ROOT = Path(__file__).resolve().parent
REQUIREMENTS, DEV_REQUIREMENTS = ROOT / "requirements.txt", ROOT / "requirements-dev.txt"
WORKFLOW = "workflows/api/t2v.json"
LOADERS = ("Load model", "Load text encoder", "Load VAE")

# Where PyPI's own torch is the wrong build. Elsewhere it is right: CUDA on Linux, plain on Windows, Metal on macOS.
TORCH_INDEXES = {
    ("linux", "cpu"): "https://download.pytorch.org/whl/cpu",
    ("linux", "rocm"): "https://download.pytorch.org/whl/rocm6.4",
    ("win32", "cuda"): "https://download.pytorch.org/whl/cu128",
}


class QuickstartError(Exception):
    """A failure in one line: what went wrong, what to do."""


def call(*command: object, **options: object) -> int:
    """The exit code of `command`, run with Popen's `options`.

    When Ctrl-C ends the wait, the terminal has sent it to the command too, which gets five seconds to tidy up.
    """
    # A user's `pip install --user` habit, kept in pip's settings, fails inside a virtual environment.
    env = {**os.environ, "PIP_USER": "0", "PYTHONUTF8": "1", **options.pop("env", {})}
    with subprocess.Popen([str(word) for word in command], env=env, **options) as process:
        try:
            return process.wait()
        except BaseException:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.terminate()
            raise


def succeeds(*command: object, **options: object) -> bool:
    """Whether `command` can be run and exits with 0; its output is not shown."""
    try:
        return call(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **options) == 0
    except OSError:
        return False


def pip(python: Path) -> list[object]:
    """The beginning of a pip command for `python`."""
    return [python, "-m", "pip", "--disable-pip-version-check", "--no-input"]


def has_all(python: Path, requirements: Path) -> bool:
    """Whether `python` has pip and all of `requirements`; nothing is installed or fetched for this."""
    return succeeds(*pip(python), "--isolated", "install", "--dry-run", "--no-index", "-r", requirements)


def pip_install(python: Path, what: str, *arguments: str, index: str | None = None) -> None:
    """Install with pip, whose own lines are shown; `index` takes the place of every other."""
    print(f"Installing {what} ...", flush=True)
    # An extra index in the user's settings would offer other builds beside the one that is wanted.
    env = {"PIP_INDEX_URL": index, "PIP_EXTRA_INDEX_URL": index} if index else {}
    if call(*pip(python), "install", *arguments, stdin=subprocess.DEVNULL, env=env):
        raise QuickstartError(f"pip could not install {what}; its output above says why. Fix that and run this again.")


def accelerator() -> str:
    """`cuda`, `rocm` or `cpu`: what the machine has, as far as its drivers show."""
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        return "cuda"
    return "rocm" if Path("/opt/rocm").exists() else "cpu"


def install_torch(python: Path) -> None:
    """Install torch in the build that fits the machine, where PyPI's would not, or what WANCORE_TORCH asks for.

    WANCORE_TORCH is a pip requirement. Where the build cannot be reached, PyPI's comes with the other requirements.
    """
    chosen = os.environ.get("WANCORE_TORCH")
    if chosen:
        pip_install(python, chosen, chosen)
        return
    kind = accelerator()
    index = TORCH_INDEXES.get((sys.platform, kind))
    if index is None or succeeds(python, "-c", "import torch"):
        return
    probe = ("index", "versions", "torch", "--index-url", index, "--retries", "0", "--timeout", "5")
    if not succeeds(*pip(python), *probe):
        print(f"{index} is out of reach: taking PyPI's torch, which may be large, or not for your GPU.")
        return
    wanted = next(line for line in REQUIREMENTS.read_text(encoding="utf-8").split() if line.startswith("torch>="))
    # Its dependencies come with the requirements, from the ordinary index.
    pip_install(python, f"torch's {kind} build", "--no-deps", wanted, index=index)


def venv_python(venv: Path) -> Path:
    """The path of the interpreter in `venv`."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path) -> None:
    """Make `venv`, looking through to this interpreter's packages when a torch that works is among them."""
    # A new environment looks through to the base interpreter, never into the environment that it is made from.
    is_base = sys.prefix == sys.base_prefix
    share = is_base and not os.environ.get("WANCORE_TORCH") and succeeds(sys.executable, "-c", "import torch")
    print(f"Making {venv}{' around the torch you have' if share else ''} ...", flush=True)
    fresh = not venv.exists()
    try:
        if call(sys.executable, "-m", "venv", *(["--system-site-packages"] if share else []), venv):
            raise QuickstartError(f"Python could not make {venv}; its output above says why.")
    except BaseException:
        if fresh:
            shutil.rmtree(venv, ignore_errors=True)
        raise


def prepare(venv: Path | None, requirements: Path) -> Path:
    """The Python that has `requirements` installed.

    It is the running one when that has everything and no `venv` is asked for, else the one in `venv` (default: `.venv`
    beside this file), which is made and filled as far as it is not yet.
    """
    if venv is None and has_all(Path(sys.executable), requirements):
        print(f"Using this Python, which has all of {requirements.name}: {sys.executable}", flush=True)
        return Path(sys.executable)
    venv = (venv or ROOT / ".venv").resolve()
    if not venv.exists() or (venv.is_dir() and not any(venv.iterdir())):
        make_venv(venv)
    if not (venv / "pyvenv.cfg").is_file():
        raise QuickstartError(f"{venv} is there but is no virtual environment. Delete it, or name another with --venv.")
    python = venv_python(venv)
    if not succeeds(python, "-c", "import sys, pip; sys.exit(sys.version_info < (3, 10))"):
        raise QuickstartError(f"{venv} has no working Python of 3.10 or newer with pip. Delete it and run this again.")
    if has_all(python, requirements) and not os.environ.get("WANCORE_TORCH"):
        print(f"Using {venv}, which has all of {requirements.name}.", flush=True)
        return python
    install_torch(python)
    pip_install(python, requirements.name, "-r", str(requirements))
    return python


def workflow_command(python: Path, out: Path, model: str | None, prompt: str | None, seed: int | None) -> list[str]:
    """The command that runs the shipped text-to-video workflow: on the tiny model, or on the published `model`."""
    values = {} if model is None else {"Load model.model": model, **{f"{name}.download": "true" for name in LOADERS}}
    values |= {} if prompt is None else {"Prompt.prompt": prompt}
    values |= {} if seed is None else {"Sampler.seed": str(seed)}
    tiny = ["--tiny"] if model is None else []
    sets = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    return [str(python), "-m", "headless", "run", WORKFLOW, "--out", str(out), *tiny, *sets]


def generate(options: argparse.Namespace) -> int:
    """Make a video, whose path is the last line; the exit code of the run."""
    out = (options.out or ROOT / "output").resolve()
    if out.exists() and not out.is_dir():
        raise QuickstartError(f"--out {out} is a file. Name a folder.")
    command = workflow_command(prepare(options.venv, REQUIREMENTS), out, options.model, options.prompt, options.seed)
    print(f"Running {WORKFLOW} on {options.model or 'the bundled tiny model'} ...", flush=True)
    code = call(*command, cwd=ROOT, stdin=subprocess.DEVNULL)
    if code < 0:
        raise QuickstartError(f"The run was killed by signal {-code}; 9 mostly means out of memory.")
    return code


def run_tests(options: argparse.Namespace) -> int:
    """pytest's exit code over the tests, on up to four cores."""
    python = prepare(options.venv, DEV_REQUIREMENTS)
    return call(python, "-m", "pytest", "-n", min(4, os.cpu_count() or 1), *options.pytest, cwd=ROOT)


def install(options: argparse.Namespace) -> int:
    """Install for development and print the environment's Python as the last line; 0."""
    print(prepare(options.venv, DEV_REQUIREMENTS))
    return 0


COMMANDS = {
    "": (generate, "Install WanCore and generate a video."),
    "test": (run_tests, "Install for development and run the tests; further arguments go to pytest."),
    "install": (install, "Install for development and print the environment's Python."),
}


def seed_number(text: str) -> int:
    """The seed in `text`; ArgumentTypeError unless it is a number of 64 bits without a sign, as the sampler takes."""
    if not (text.isdecimal() and int(text) < 2**64):
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2**64 - 1 is expected; got {text!r}")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line as options: `run` is the function to call, `pytest` the arguments passed on to the tests."""
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    run, description = COMMANDS[name]
    parser = argparse.ArgumentParser(f"quickstart.py {name}".strip(), description=description, allow_abbrev=False)
    if run is generate:
        parser.epilog = "Other commands, each with its own --help: test, install."
        parser.add_argument("--model", metavar="MODEL_ID", help="published checkpoint, downloaded; default: a tiny one")
        parser.add_argument("--prompt", metavar="TEXT", help="what to show; default: the workflow's own")
        parser.add_argument("--seed", type=seed_number, metavar="N", help="noise seed; default: the workflow's own")
        parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the video; default: output/ here")
    parser.add_argument("--venv", type=Path, metavar="DIR", help="environment to use or make; default: .venv here")
    options, others = parser.parse_known_args(argv[1:] if name else argv)
    if others and run is not run_tests:
        parser.error(f"unknown argument {others[0]!r}")
    options.run, options.pytest = run, others
    return options


def main(argv: list[str]) -> int:
    """Run the command line; the exit code. Every failure of its own is one line on stderr."""
    options = parse(argv)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("\nquickstart: stopped.", file=sys.stderr)
        return 130
    except (QuickstartError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
