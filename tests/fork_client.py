"""What asks `tests.fork_server` for a process. It imports little, because it starts as an interpreter of its own."""

import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Mapping, Sequence

NUMBER = struct.Struct("!q")
HANDED_ON = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that an interpreter which stands in hands on to the process that it stands for."""


def order(
    address: str,
    words: Sequence[str],
    cwd: str,
    env: Mapping[str, str],
    files: tuple[int, int, int],
    file_limit: int | None = None,
) -> tuple[socket.socket, int]:
    """Have `python *words` forked with these standard files; its process id, and a socket that gives its exit code.

    The process is killed when the socket is closed before its end.
    """
    text = json.dumps({"words": list(words), "cwd": cwd, "env": dict(env), "file_limit": file_limit}).encode()
    answers = socket.socket(socket.AF_UNIX)
    answers.connect(address)
    socket.send_fds(answers, [NUMBER.pack(len(text))], files)
    answers.sendall(text)
    return answers, read_number(answers)


def read_number(answers: socket.socket, flags: int = 0) -> int:
    word = answers.recv(NUMBER.size, flags | socket.MSG_WAITALL)
    assert word, "the fork server is gone"
    return NUMBER.unpack(word)[0]


def stand_in(address: str, python: str) -> None:
    """Be an interpreter: ask for a process with this one's arguments, end as it ends; else become `python`."""
    words = sys.argv[2:] if sys.argv[1:2] == ["-u"] else sys.argv[1:]  # what is forked keeps no line back
    if not words or (words[0].startswith("-") and words[0] not in ("-m", "-c")):
        os.execv(python, [python, *words])
    here = os.getcwd()  # noqa: PTH109  # pathlib takes as long to import as all else
    answers, pid = order(address, words, here, os.environ, (0, 1, 2))
    for name in HANDED_ON:
        signal.signal(getattr(signal, name), lambda number, _: os.kill(pid, number))
    code = read_number(answers)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code & 255)
