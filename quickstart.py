"""From a fresh clone to a video: makes `.venv` beside this file, installs the requirements, runs the shipped workflow.

Standard library only, and written in syntax that Python 3.6 can read, so that an old interpreter gets one clear line.
"""

import argparse
import errno
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def version_problem(version: tuple) -> str:
    """What is wrong with running under Python `version` (major, minor, ...); empty when nothing is."""
    if tuple(version[:2]) >= (3, 10):
        return ""
    return f"quickstart: WanCore needs Python 3.10 or newer; this is {version[0]}.{version[1]}."


# Before anything below is defined: its annotations are already too new for the interpreters this turns away.
if version_problem(sys.version_info):
    sys.exit(version_problem(sys.version_info))


ROOT = Path(__file__).resolve().parent
REQUIREMENTS = ROOT / "requirements.txt"
DEV_REQUIREMENTS = ROOT / "requirements-dev.txt"
WORKFLOW = Path("workflows", "api", "t2v.json")
LOADERS = ("Load model", "Load text encoder", "Load VAE")
STAMP = "wancore-requirements.sha256"

# Where PyPI's own torch is the wrong build. Elsewhere it is right: CUDA on Linux, plain on Windows, Metal on macOS.
TORCH_INDEXES = {
    ("linux", "cpu"): "https://download.pytorch.org/whl/cpu",
    ("linux", "rocm"): "https://download.pytorch.org/whl/rocm6.4",
    ("win32", "cuda"): "https://download.pytorch.org/whl/cu128",
}
SMALLEST_VENV = 2**30  # bytes; measured: 1.4 GiB with a CPU build of torch
DISK_FULL = "The disk is full. Free some space (pip also unpacks into TMPDIR) and run this again."


class QuickstartError(Exception):
    """A failure told in one line: what went wrong, what to do. `output` ends what the failed program said of it."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


def read_requirements(path: Path) -> list[str]:
    """The requirement lines of `path` and of the files it names with `-r`, in order."""
    requirements = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].split()
        if words[:1] == ["-r"]:
            requirements += read_requirements(path.parent / words[1])
        elif words:
            requirements.append(" ".join(words))
    return requirements


def unmet(requirements: list[str]) -> list[str]:
    """Those of `requirements` (`name>=version` lines) that the running interpreter does not have installed."""
    from importlib import metadata  # Python 3.8: out of reach for the interpreters that the version check answers

    def numbers(version: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))

    missing = []
    for requirement in requirements:
        name, _, lowest = requirement.partition(">=")
        try:
            if numbers(metadata.version(name.strip())) < numbers(lowest):
                missing.append(requirement)
        except metadata.PackageNotFoundError:
            missing.append(requirement)
    return missing


def digest(requirements: Path) -> str:
    """SHA-256 of the requirement lines, hexadecimal; comments do not count."""
    return hashlib.sha256("\n".join(read_requirements(requirements)).encode()).hexdigest()


def is_installed(venv: Path, requirements: Path) -> bool:
    """Whether the stamp in `venv` says that these very requirements were installed there."""
    stamp = venv / STAMP
    return stamp.is_file() and digest(requirements) in stamp.read_text(encoding="utf-8").split()


def write_stamp(venv: Path, requirements: Path) -> None:
    """Note in `venv` that `requirements` are installed; the developer's file includes the user's."""
    installed = {REQUIREMENTS, requirements}
    (venv / STAMP).write_text("".join(f"{digest(path)}\n" for path in sorted(installed)), encoding="utf-8")


def accelerator() -> str:
    """`cuda`, `rocm` or `cpu`: what the machine has, as far as its drivers show."""
    if shutil.which("nvidia-smi") or Path("/proc/driver/nvidia").exists():
        return "cuda"
    return "rocm" if Path("/opt/rocm").exists() else "cpu"


@contextmanager
def child(command: list[str], **options: object) -> Iterator[subprocess.Popen]:
    """The running `command`, with Popen's `options`; it has ended when the block is left.

    When Ctrl-C ends the block, the terminal has told the command too: it gets five seconds to tidy up, then a signal.
    """
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        except BaseException:
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.terminate()
            raise


def run_step(what: str, command: list[str], failure: str, settings: dict[str, str] | None = None) -> None:
    """Run `command` silently, with `settings` in its environment, showing `what` it is and the seconds it takes.

    Raises QuickstartError with the line `failure` and the end of the output when the command does not exit with 0.
    """
    # A user's `pip install --user` habit, kept in pip's settings, fails inside a virtual environment.
    env = {**os.environ, "PIP_USER": "0", **(settings or {})}
    started = time.monotonic()
    print(f"{what} ...", end="", flush=True)
    with tempfile.TemporaryFile() as output:
        with child(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=env) as process:
            while process.poll() is None:
                try:
                    process.wait(timeout=1)
                except subprocess.TimeoutExpired:
                    if sys.stdout.isatty():
                        print(f"\r{what} ... {time.monotonic() - started:.0f} s", end="", flush=True)
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    clear = f"\r{what} ..." if sys.stdout.isatty() else ""
    print(f"{clear} {'failed after ' if process.returncode else ''}{time.monotonic() - started:.1f} s", flush=True)
    if process.returncode and os.strerror(errno.ENOSPC) in text:
        raise QuickstartError(DISK_FULL)
    if process.returncode:
        raise QuickstartError(failure, "\n".join(text.strip().splitlines()[-12:]))


def venv_python(venv: Path) -> Path:
    """The path of the interpreter in `venv`."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def modules_of(venv: Path) -> set[str]:
    """Which of pip and torch the Python of `venv` can import.

    Raises QuickstartError when the folder is no virtual environment, when its Python does not run, or is too old.
    """
    if not (venv / "pyvenv.cfg").is_file():
        raise QuickstartError(f"{venv} is there but is no virtual environment. Delete it, or name another with --venv.")
    code = (
        "import importlib.util as u, sys; sys.exit(3) if sys.version_info < (3, 10) else "
        "print(*[m for m in ('pip', 'torch') if u.find_spec(m)])"
    )
    try:
        done = subprocess.run([str(venv_python(venv)), "-c", code], capture_output=True, encoding="utf-8")
    except OSError:
        done = None
    if done is None or done.returncode:
        raise QuickstartError(f"{venv} is broken: its Python is gone or too old. Delete the folder and run this again.")
    return set(done.stdout.split())


def torch_requirement() -> str:
    """The line of requirements.txt that asks for torch."""
    return next(line for line in read_requirements(REQUIREMENTS) if line.startswith("torch>="))


def shares_torch() -> bool:
    """Whether the running interpreter has a working torch that a new environment can see.

    One inside a virtual environment is out of sight: a new one looks through to the base interpreter only.
    """
    if sys.prefix != sys.base_prefix or os.environ.get("WANCORE_TORCH"):
        return False
    if unmet([torch_requirement()]):
        return False
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0


def make_venv(venv: Path) -> None:
    """Make `venv`, looking through to this interpreter's packages when torch is among them."""
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        raise QuickstartError("This Python has no venv module. On Debian or Ubuntu: apt install python3-venv")
    place = next(path for path in (venv, *venv.parents) if path.exists())
    if shutil.disk_usage(place).free < SMALLEST_VENV:
        raise QuickstartError(DISK_FULL)
    share = shares_torch()
    fresh = not venv.exists()
    command = [sys.executable, "-m", "venv", *(["--system-site-packages"] if share else []), str(venv)]
    what = f"Making {venv}{' around the torch you have' if share else ''}"
    try:
        run_step(what, command, f"Python could not make {venv}; its own words are above.")
    except BaseException:
        if fresh:
            shutil.rmtree(venv, ignore_errors=True)
        raise


def pip(venv: Path, *arguments: str) -> list[str]:
    """A pip command for `venv`."""
    return [str(venv_python(venv)), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]


def pip_install(venv: Path, what: str, *arguments: str, settings: dict[str, str] | None = None) -> None:
    """Install into `venv` as a step named after `what`; `settings` are environment variables for pip."""
    failure = f"pip could not install {what}; its last lines are above. Check the network and run this again."
    run_step(f"Installing {what}", pip(venv, "install", *arguments), failure, settings)


def install_torch(venv: Path) -> None:
    """Install torch in the build that fits the machine, where PyPI's would not, or what WANCORE_TORCH asks for.

    WANCORE_TORCH is a pip requirement. Where the build cannot be reached, PyPI's comes with the other requirements.
    """
    chosen = os.environ.get("WANCORE_TORCH")
    if chosen:
        pip_install(venv, chosen, chosen)
        return
    kind = accelerator()
    index = TORCH_INDEXES.get((sys.platform, kind))
    if index is None:
        return
    # An extra index in the user's settings would offer other builds beside this one; the variable takes its place.
    only = {"PIP_INDEX_URL": index, "PIP_EXTRA_INDEX_URL": index}
    try:
        probe = pip(venv, "index", "versions", "torch", "--retries", "0", "--timeout", "5")
        run_step(f"Looking for torch's {kind} build", probe, "", only)
    except QuickstartError:
        print(f"{index} is out of reach: taking PyPI's torch, which may be large, or not for your GPU.")
        return
    # Its dependencies come with the requirements, from the ordinary index.
    pip_install(venv, f"torch's {kind} build", "--no-deps", torch_requirement(), settings=only)


def prepare(venv: Path | None, requirements: Path) -> Path:
    """The Python that has `requirements` installed.

    It is the running one when that has everything and no `venv` is asked for, else the one in `venv` (default: `.venv`
    beside this file), which is made and filled as far as it is not yet.
    """
    if venv is None and not unmet(read_requirements(requirements)):
        print(f"Using this Python, which has all of {requirements.name}: {sys.executable}")
        return Path(sys.executable)
    venv = (venv or ROOT / ".venv").resolve()
    if not venv.exists() or (venv.is_dir() and not any(venv.iterdir())):
        make_venv(venv)
    modules = modules_of(venv)
    if is_installed(venv, requirements):
        print(f"Using {venv}, which has all of {requirements.name}.")
        return venv_python(venv)
    if "pip" not in modules:
        raise QuickstartError(f"{venv} has no pip. Delete that folder and run this again.")
    if "torch" not in modules or os.environ.get("WANCORE_TORCH"):
        install_torch(venv)
    pip_install(venv, requirements.name, "-r", str(requirements))
    write_stamp(venv, requirements)
    return venv_python(venv)


def workflow_command(python: Path, out: Path, model: str | None, prompt: str | None, seed: int | None) -> list[str]:
    """The command that runs the shipped text-to-video workflow: on the tiny model, or on the published `model`."""
    values = {}
    if model is not None:
        values["Load model.model"] = model
        values.update({f"{loader}.download": "true" for loader in LOADERS})
    if prompt is not None:
        values["Prompt.prompt"] = prompt
    if seed is not None:
        values["Sampler.seed"] = str(seed)
    command = [str(python), "-m", "headless", "run", WORKFLOW.as_posix(), "--out", str(out)]
    if model is None:
        command.append("--tiny")
    return command + [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def generate(options: argparse.Namespace) -> int:
    """Make a video and print its path as the last line; the exit code of the run."""
    out = (options.out or ROOT / "output").resolve()
    if out.exists() and not out.is_dir():
        raise QuickstartError(f"--out {out} is a file. Name a folder.")
    command = workflow_command(prepare(options.venv, REQUIREMENTS), out, options.model, options.prompt, options.seed)
    print(f"Running {WORKFLOW.as_posix()} on {options.model or 'the bundled tiny model'} ...", flush=True)
    env = {**os.environ, "PYTHONUTF8": "1", "PYTHONUNBUFFERED": "1"}
    video = None
    started = time.monotonic()
    pipe = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    with child(command, cwd=ROOT, env=env, **pipe) as process:
        for line in process.stdout:
            path = ROOT / line.strip()
            if path.suffix == ".mp4" and path.is_file():
                video = path
            else:
                print(line, end="", flush=True)
    if process.returncode < 0:
        raise QuickstartError(f"The run was killed by signal {-process.returncode}; 9 mostly means out of memory.")
    if process.returncode:
        return process.returncode
    if video is None:
        raise QuickstartError(f"The run ended well but named no .mp4 file; look in {out}.")
    print(f"Done in {time.monotonic() - started:.1f} s:\n{video}")
    return 0


def run_tests(options: argparse.Namespace) -> int:
    """pytest's exit code over the tests, on up to four cores."""
    workers = min(4, os.cpu_count() or 1)
    python = prepare(options.venv, DEV_REQUIREMENTS)
    with child([str(python), "-m", "pytest", "-n", str(workers), *options.pytest], cwd=ROOT) as process:
        return process.wait()


def install(options: argparse.Namespace) -> int:
    """Install for development and print the environment's Python as the last line; 0."""
    print(prepare(options.venv, DEV_REQUIREMENTS))
    return 0


COMMANDS = {
    "": (generate, "Install WanCore and generate a video."),
    "test": (run_tests, "Install for development and run the tests; further arguments go to pytest."),
    "install": (install, "Install for development and print the environment's Python."),
}


class Parser(argparse.ArgumentParser):
    """A parser that tells a mistake in one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"quickstart: {message} (see --help)\n")


def seed_number(text: str) -> int:
    """The seed in `text`; ArgumentTypeError unless it is a number of 64 bits without a sign, as the sampler takes."""
    if not (text.isdecimal() and int(text) < 2**64):
        raise argparse.ArgumentTypeError(f"a whole number from 0 to 2**64 - 1 is expected; got {text!r}")
    return int(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line as options: `run` is the function to call, `pytest` the arguments passed on to the tests."""
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    run, description = COMMANDS[name]
    parser = Parser(prog=f"quickstart.py {name}".strip(), description=description, allow_abbrev=False)
    if run is generate:
        parser.epilog = "Other commands, each with its own --help: test, install."
        parser.add_argument("--model", metavar="MODEL_ID", help="published checkpoint, downloaded; default: a tiny one")
        parser.add_argument("--prompt", metavar="TEXT", help="what to show; default: the workflow's own")
        parser.add_argument("--seed", type=seed_number, metavar="N", help="noise seed; default: the workflow's own")
        parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the video; default: output/ here")
    parser.add_argument("--venv", type=Path, metavar="DIR", help="environment to use or make; default: .venv here")
    options, rest = parser.parse_known_args(argv[1:] if name else argv)
    if rest and run is not run_tests:
        parser.error(f"unknown argument {rest[0]!r}")
    options.run, options.pytest = run, rest
    return options


def main(argv: list[str]) -> int:
    """Run the command line; the exit code. Every failure is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    options = parse(argv)
    try:
        return options.run(options)
    except QuickstartError as error:
        if error.output:
            print(error.output, file=sys.stderr)
        print(f"quickstart: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nquickstart: stopped.", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"quickstart: {DISK_FULL if error.errno == errno.ENOSPC else error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
