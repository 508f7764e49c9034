"""Commands of the pack in processes of their own that start in milliseconds.

A new interpreter imports torch, transformers and the rest for ten seconds. Here one has imported them and forks for
each command. What is forked is a real process: it has its own signals, files and limits, runs the same `__main__`, and
dies alone. How a cold interpreter finds its way is what the tests of `pack.py`, of the commands' files and of the
installed pack are for.

`start` and `run` are `subprocess.Popen` and `subprocess.run` of such a process. `python()` is an interpreter that does
the same for programs that start `sys.executable` themselves. A system that cannot fork starts interpreters.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from tests.fork_client import NUMBER, order, read_number

ROOT = Path(__file__).resolve().parents[1]
CAN_FORK = hasattr(os, "fork")
IMPORTED = (
    "wancore.headless.cli", "wancore.trainer.train", "wancore.trainer.recipe", "wan_core.conditioning.text",
    "torch.distributed.run", "accelerate.commands.launch", "peft",
)  # fmt: skip
"""What the commands need; the rest is imported where it is used."""

SERVE = "import pack; pack.register(); from tests.fork_server import serve; serve()"


class Process:
    """A command at work, as `subprocess.Popen` shows it; its output is kept in files until `communicate`."""

    def __init__(
        self,
        words: Sequence[object],
        *,
        cwd: Path = ROOT,
        env: Mapping[str, str] | None = None,
        stdin: int = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = None,
        stderr: int | IO[Any] | None = None,
        file_limit: int | None = None,
    ) -> None:
        """Start Python with the arguments `words`.

        Args:
            stdin: DEVNULL or PIPE.
            stdout: PIPE for what is to be read while it works, or a file.
            stderr: STDOUT for one text of both outputs, or a file.
            file_limit: bytes that a file of the process may have, as on a disk that is nearly full.
        """
        self.args = [str(word) for word in words]
        self.returncode: int | None = None
        self.stdin: IO[str] | None = None
        self.stdout: IO[str] | None = None
        self._out, self._err = (tempfile.TemporaryFile() for _ in range(2))  # noqa: SIM115
        with contextlib.ExitStack() as given:
            if stdin == subprocess.PIPE:
                end, own = os.pipe()
                self.stdin = os.fdopen(own, "w")
            else:
                end = os.open(os.devnull, os.O_RDONLY)
            given.callback(os.close, end)
            if stdout == subprocess.PIPE:
                own, out = os.pipe()
                self.stdout = os.fdopen(own, encoding="utf-8", errors="replace")
                given.callback(os.close, out)
            else:
                out = (self._out if stdout is None else stdout).fileno()
            err = out if stderr == subprocess.STDOUT else (self._err if stderr is None else stderr).fileno()
            self._answers, self.pid = order(
                _address(), self.args, str(cwd), env or os.environ, (end, out, err), file_limit
            )

    def poll(self) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(BlockingIOError):
                self._end(socket.MSG_DONTWAIT)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self._answers.settimeout(timeout)
            try:
                self._end()
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.args, timeout or 0) from None
            finally:
                with contextlib.suppress(OSError):
                    self._answers.settimeout(None)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; its standard output, or what is not read of it yet, and its standard error."""
        if self.stdin is not None:
            self.stdin.close()
        unread = self.stdout.read() if self.stdout is not None else ""
        self.wait(timeout)
        return unread or _text(self._out), _text(self._err)

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.communicate()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def _end(self, flags: int = 0) -> None:
        self.returncode = read_number(self._answers, flags)
        self._answers.close()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def start(words: Sequence[object], **options: object) -> "Process | subprocess.Popen[str]":
    """`python *words` in a process of its own; see `Process`."""
    if CAN_FORK:
        return Process(words, **options)
    options.setdefault("cwd", ROOT)
    options.setdefault("stderr", subprocess.PIPE)
    return subprocess.Popen([sys.executable, *map(str, words)], stdout=subprocess.PIPE, text=True, **options)


def run(words: Sequence[object], timeout: float = 600.0, **options: object) -> subprocess.CompletedProcess:
    """The same, until its end."""
    process = start(words, **options)
    out, errors = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


@functools.cache
def python() -> str:
    """An interpreter that is forked where it is given `-m`, `-c` or a file, and a new one otherwise."""
    return str(Path(_address()).with_name("python")) if CAN_FORK else sys.executable


@functools.cache
def _address() -> str:
    """The socket of this process's server, which lives as long."""
    folder = Path(tempfile.mkdtemp(prefix="wancore_fork_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = str(folder / "socket")
    stand_in = folder / "python"
    stand_in.write_text(
        f"#!{sys.executable} -I\nimport sys\nsys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        f"from fork_client import stand_in\nstand_in({address!r}, {sys.executable!r})\n"
    )
    stand_in.chmod(0o755)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVE, address], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert server.stdout is not None and server.stdout.readline() == b"ready\n", "the fork server did not start"
    atexit.register(server.communicate)
    return address


def serve() -> None:
    """The server's own loop, until its standard input is closed."""
    for name in IMPORTED:
        importlib.import_module(name)
    warnings.filterwarnings("ignore", "(?s).*found in sys.modules", RuntimeWarning)  # runpy's, of what is imported here
    gc.collect()
    gc.freeze()  # no collection of a child has to look at, and to copy, what is imported here
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    children: dict[int, socket.socket] = {}
    os.write(1, b"ready\n")
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                for pid in children:
                    os.killpg(pid, signal.SIGKILL)
                return
            if key.fileobj is listener:
                connection, _ = listener.accept()
                pid = _fork(connection)
                children[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.fileobj is woken:
                woken.recv(4096)
                _report_ended(children, selector)
            else:  # who asked is gone
                selector.unregister(key.fileobj)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(key.data, signal.SIGKILL)


def _report_ended(children: dict[int, socket.socket], selector: selectors.BaseSelector) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            connection = children.pop(pid)
            with contextlib.suppress(KeyError):
                selector.unregister(connection)
            with contextlib.suppress(OSError), connection:
                connection.sendall(NUMBER.pack(os.waitstatus_to_exitcode(status)))


def _fork(connection: socket.socket) -> int:
    """Start what is asked for; the child's process id."""
    header, files, *_ = socket.recv_fds(connection, NUMBER.size, 3)
    (length,) = NUMBER.unpack(header)
    asked = json.loads(connection.recv(length, socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        _become(asked, files)
    for file in files:
        os.close(file)
    # Here as well, so that it has a group when it is killed at once.
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    connection.sendall(NUMBER.pack(pid))
    return pid


def _become(asked: dict[str, Any], files: list[int]) -> None:
    """Be the interpreter that is asked for, until its end."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    for own, given in enumerate(files):
        os.dup2(given, own)
    os.closerange(3, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 2**16 else 2**16)
    code = 1
    try:
        os.environ.clear()
        os.environ.update(asked["env"])
        os.chdir(asked["cwd"])
        if asked["file_limit"] is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_limit"], asked["file_limit"]))
        sys.executable = str(Path(sys.argv[1]).with_name("python"))
        sys.stdout.reconfigure(line_buffering=True)
        code = _interpret(asked["words"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        # As the interpreter ends: threads that still work, then what was registered, then what is not written yet.
        threading._shutdown()
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 255)


def _interpret(words: list[str]) -> int:
    first, rest = words[0], words[1:]
    if first == "-m":
        sys.argv, sys.path[0] = rest, str(Path.cwd())
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        program = types.FunctionType(compile(rest[0], "<string>", "exec"), sys.modules["__main__"].__dict__)
        program()
    else:
        sys.argv, sys.path[0] = words, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")
    return 0
