"""Files that will be needed soon, read into the system's file cache while the device computes."""

import threading
from collections.abc import Sequence
from pathlib import Path

from .blocks import available_ram

PIECE = 16 * 2**20
"""Bytes that are read at once; between two pieces the reading can be stopped."""

LEFT_FREE = 2 * 2**30
"""Bytes of host memory that reading ahead leaves to others."""


def read_ahead(files: Sequence[Path], room: float, stopped: threading.Event) -> int:
    """Read `files` from their beginnings until `room` bytes are read or `stopped` is set; the bytes that were read.

    What cannot be read is left to the code that needs it.
    """
    done, piece = 0, bytearray(PIECE)
    for file in files:
        try:
            with file.open("rb", buffering=0) as stream:
                while done < room and not stopped.is_set() and (count := stream.readinto(piece)):
                    done += count
        except OSError:
            return done
    return done


class ReadAhead:
    """Reads files in a thread of its own, at most until the end of the `with` block."""

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, files: Sequence[Path]) -> None:
        """Begin to read `files`, as far as host memory has room for them."""
        room = available_ram() - LEFT_FREE
        thread = threading.Thread(target=read_ahead, args=(tuple(files), room, self._stopped), daemon=True)
        thread.start()
        self._threads.append(thread)

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
