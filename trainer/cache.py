"""What encoders made of the data, kept on disk under names that follow from everything it depends on."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load
from torch import Tensor

from ..wan_core.atomic import replacing
from ..wan_core.checkpoints.write import write_safetensors
from ..wan_core.media import frame_files

log = logging.getLogger("wancore")

HASHES = "hashes.json"
READ_BYTES = 2**22


class LatentCache:
    """A folder of tensors under content keys: a changed file or option is another key, so nothing in it can be stale.

    Several processes may use one folder. A file appears under its name only when it is complete.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open the folder, and make it if it is not there.

        Raises:
            ValueError: it cannot be written to.
        """
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(f"The cache folder {folder} cannot be written to: {error}. Name another one.") from error
        self._hashes = _remembered(self.folder / HASHES)

    def key(self, parts: Mapping[str, Any]) -> str:
        """The name of what was made from `parts`, which must be JSON."""
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def file_hash(self, path: str | Path) -> str:
        """The SHA-256 of a file's content, or of the frames in a folder; remembered by path, size and time."""
        path = Path(path).resolve()
        if path.is_dir():
            named = [[file.name, self.file_hash(file)] for file in frame_files(path)]
            return hashlib.sha256(json.dumps(named).encode()).hexdigest()
        stat = path.stat()
        identity = f"{path}|{stat.st_size}|{stat.st_mtime_ns}"
        if identity not in self._hashes:
            self._hashes |= _remembered(self.folder / HASHES)
        if identity not in self._hashes:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(READ_BYTES):
                    digest.update(chunk)
            self._hashes[identity] = digest.hexdigest()
            text = json.dumps(self._hashes, indent=0, ensure_ascii=False)
            with replacing(self.folder / HASHES, sync=True) as partial:
                partial.write_text(text, encoding="utf-8")
        return self._hashes[identity]

    def __contains__(self, key: str) -> bool:
        return self._path(key).is_file()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors under `key`; None when there are none or their file is damaged, which is said in the log."""
        path = self._path(key)
        try:
            # Read, not mapped: what a run holds must not change with the file.
            return load(path.read_bytes())
        except FileNotFoundError:
            return None
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            log.warning("The cached file %s is damaged (%s); it is made anew.", path, error)
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` under `key`.

        Raises:
            OSError: the disk is full or fails; nothing appears under the key.
        """
        with replacing(self._path(key), sync=True) as partial:
            write_safetensors(partial, tensors)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"


def _remembered(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}
