"""Published files on this machine: found under the models folder, or fetched from ModelScope or Hugging Face."""

import os
import re
import threading
from collections.abc import Callable
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path, PurePosixPath

from .paths import WEIGHT_SUFFIXES, missing_shards
from .tensor_files import CheckpointError, verify_file

BASE_PATH_VARIABLE = "DIFFSYNTH_MODEL_BASE_PATH"
SKIP_VARIABLE = "DIFFSYNTH_SKIP_DOWNLOAD"
"""Environment variables of DiffSynth-Studio; they override arguments."""

SOURCE_VARIABLE = "DIFFSYNTH_DOWNLOAD_SOURCE"
"""The environment variable for the source of downloads; an argument overrides it."""

SOURCES = {"modelscope": "https://modelscope.cn/models", "huggingface": "https://huggingface.co"}
"""The sources of published files, by name in any case, with the base address of repositories."""

NAMES = {"modelscope": "ModelScope", "huggingface": "Hugging Face"}

DEFAULT_FOLDER = Path("models")

COMMON_FILES = {
    "models_t5_umt5-xxl-enc-bf16.pth": "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan2.1_VAE.pth": "Wan-AI/Wan2.1-T2V-1.3B",
    "Wan2.2_VAE.pth": "Wan-AI/Wan2.2-TI2V-5B",
    "google/*": "Wan-AI/Wan2.1-T2V-1.3B",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth": "Wan-AI/Wan2.1-I2V-14B-480P",
}
"""Files that every repository of a kind has a copy of, and the repository that they are taken from."""

CONVERTED = "DiffSynth-Studio/Wan-Series-Converted-Safetensors"
"""The repository from which DiffSynth-Studio 2 takes the .pth files among them, as .safetensors."""

TOKENIZER_FILES = ("tokenizer.json", "spiece.model")

OnProgress = Callable[[str, int, int], None]
"""Called as (file name, bytes so far, size); from several threads, but never at the same time."""


class DownloadError(CheckpointError):
    """Published files that are not on this machine and could not be downloaded."""


def models_folder(path: str | Path | None = None) -> Path:
    """The folder of published models: that of the environment, else `path`, else `models` in the working directory."""
    return Path(os.environ.get(BASE_PATH_VARIABLE) or path or DEFAULT_FOLDER).expanduser()


def skips_download(skip: bool | None = None) -> bool:
    """Whether downloads are switched off, by the argument or by the environment."""
    return bool(skip) or os.environ.get(SKIP_VARIABLE, "").lower() in ("1", "true", "yes")


def download_source(source: str | None = None) -> str:
    """The name in `SOURCES` that `source`, else the environment says; ModelScope if neither does.

    Raises:
        ValueError: there is no such source.
    """
    given = source or os.environ.get(SOURCE_VARIABLE) or "modelscope"
    name = given.lower().replace("_", "") if isinstance(given, str) else given
    if name not in SOURCES:
        raise ValueError(f"download_source ({SOURCE_VARIABLE}) must be one of {', '.join(SOURCES)}; got {given!r}.")
    return name


def local_files(root: Path, model_id: str, pattern: str) -> list[Path]:
    """What matches `pattern` in `<root>/<model_id>`, sorted, whether complete or not.

    A pattern that ends in `/` or matches folders gives those folders.

    Raises:
        ValueError: `model_id` is not `owner/name`, or `pattern` leaves the repository.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model_id):
        raise ValueError(f"{model_id!r} is not a ModelScope model id; it looks like 'Wan-AI/Wan2.1-T2V-1.3B'.")
    path = PurePosixPath(pattern)
    if not pattern or path.is_absolute() or ".." in path.parts:
        raise ValueError(
            f"{pattern!r} is not a pattern inside a repository; it looks like '*.safetensors' or 'google/*'."
        )
    try:
        found = sorted(Path(root, model_id).glob(pattern.rstrip("/")))
    except OSError as error:
        raise ValueError(f"{pattern!r} cannot be looked for in {root}/{model_id}: {error.strerror}.") from error
    folders = [path for path in found if path.is_dir()]
    return folders if folders or pattern.endswith("/") else found


def redirect(model_id: str, pattern: str, root: Path) -> tuple[str, str]:
    """The repository and pattern to take a shared file from: its one source, unless only the repository's own copy, or
    the converted one, is on this machine.
    """
    source = next((source for name, source in COMMON_FILES.items() if fnmatchcase(pattern, name)), None)
    if source is None or local_files(root, model_id, pattern):
        return model_id, pattern
    converted = f"{pattern.removesuffix('.pth')}.safetensors"
    if pattern.endswith(".pth") and not local_files(root, source, pattern) and local_files(root, CONVERTED, converted):
        return CONVERTED, converted
    return source, pattern


def fetch(
    model_id: str,
    pattern: str,
    *,
    root: Path,
    skip_download: bool,
    on_progress: OnProgress | None = None,
    source: str | None = None,
) -> list[Path]:
    """The files of `model_id` that match `pattern`, as one model in `<root>/<model_id>`; downloaded when not complete.

    A complete copy is used without the network. An exception of `on_progress` stops the download and is raised; the
    next call resumes it. Hugging Face reports no progress. `source` is that of `download_source`.

    Raises:
        ValueError: the id, the pattern or the source is not one.
        DownloadError: the files are absent and may not be downloaded, or the download failed.
    """
    source = download_source(source)
    found = local_files(root, model_id, pattern)
    folder = Path(root, model_id)
    defect = _defect(found) if found else f"nothing matches {pattern!r} in {folder}"
    if defect is None:
        return found
    if skips_download(skip_download):
        raise DownloadError(f"Downloads are switched off, and {defect}. {_by_hand(model_id, pattern, folder, source)}")
    (_from_modelscope if source == "modelscope" else _from_huggingface)(model_id, pattern, folder, on_progress)
    found = local_files(root, model_id, pattern)
    defect = _defect(found) if found else f"the repository has no file that matches {pattern!r}"
    if defect:
        raise DownloadError(
            f"The download of {model_id} ended, but {defect}. {_by_hand(model_id, pattern, folder, source)}"
        )
    return found


def _defect(found: list[Path]) -> str | None:
    """What is missing or wrong in local files; None if they are a complete model."""
    for path in found:
        if path.is_dir():
            if not any((path / name).is_file() for name in TOKENIZER_FILES):
                return f"the tokenizer folder {path} holds neither {' nor '.join(TOKENIZER_FILES)}"
        elif path.suffix in WEIGHT_SUFFIXES:
            missing = missing_shards(path)
            if missing:
                return f"{', '.join(missing)} is missing in {path.parent}"
            try:
                verify_file(path)
            except CheckpointError as error:
                return str(error).rstrip(".")
    return None


def _from_modelscope(model_id: str, pattern: str, folder: Path, on_progress: OnProgress | None) -> None:
    try:
        from modelscope import snapshot_download
        from modelscope.hub.callback import ProgressCallback
    except ImportError as error:
        raise DownloadError(
            f"Downloading needs the modelscope package ({error}); run `pip install modelscope`. "
            f"{_by_hand(model_id, pattern, folder)}"
        ) from error
    try:
        snapshot_download(
            model_id,
            local_dir=str(folder),
            allow_file_pattern=[_wanted(pattern)],
            ignore_file_pattern=_complete(model_id, pattern, folder) or None,
            progress_callbacks=[_progress(ProgressCallback, on_progress)] if on_progress else None,
        )
    except _StoppedByCallerError as stop:
        raise stop.reason from None
    except Exception as error:
        raise _failed(model_id, pattern, folder, "modelscope", error) from error


def _from_huggingface(model_id: str, pattern: str, folder: Path, on_progress: OnProgress | None) -> None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise DownloadError(
            f"Downloading from Hugging Face needs the huggingface_hub package ({error}); run `pip install "
            f"huggingface_hub`. {_by_hand(model_id, pattern, folder, 'huggingface')}"
        ) from error
    complete = _complete(model_id, pattern, folder)
    try:
        snapshot_download(
            model_id, local_dir=str(folder), allow_patterns=[_wanted(pattern)], ignore_patterns=complete or None
        )
    except Exception as error:
        raise _failed(model_id, pattern, folder, "huggingface", error) from error


def _wanted(pattern: str) -> str:
    return f"{pattern}*" if pattern.endswith("/") else pattern


def _complete(model_id: str, pattern: str, folder: Path) -> list[str]:
    """Patterns of the files that need no download."""
    here = (path for path in local_files(folder.parents[1], model_id, pattern) if path.is_file())
    return [escape(path.relative_to(folder).as_posix()) for path in here if _file_is_whole(path)]


def _failed(model_id: str, pattern: str, folder: Path, source: str, error: Exception) -> DownloadError:
    return DownloadError(
        f"Could not download {pattern!r} of {model_id} from {NAMES[source]}: {_reason(error)}. Check the connection "
        f"and try again; what is already here is kept. {_by_hand(model_id, pattern, folder, source)}"
    )


def _file_is_whole(path: Path) -> bool:
    """Whether one file needs no download, apart from other shards of its series."""
    if path.suffix not in WEIGHT_SUFFIXES:
        return False
    try:
        verify_file(path)
    except CheckpointError:
        return False
    return True


class _StoppedByCallerError(BaseException):
    """Carries an exception of `on_progress` through the client, which would retry after an `Exception`."""

    def __init__(self, reason: BaseException) -> None:
        super().__init__(reason)
        self.reason = reason


def _progress(base: type, on_progress: OnProgress) -> type:
    """A callback class, as the client wants it, that reports the bytes of each file to `on_progress`."""
    lock = threading.Lock()

    class Progress(base):
        done = 0

        def update(self, size: int) -> None:
            self.done += size
            with lock:
                try:
                    on_progress(self.filename, self.done, self.file_size)
                except BaseException as reason:
                    raise _StoppedByCallerError(reason) from reason

    return Progress


def _reason(error: Exception) -> str:
    """The error in one line, with the first file that failed when the client lists them."""
    failed = getattr(error, "failed_files", None)
    if failed:
        name, cause = next(iter(failed.items()))
        return f"{name}: {_reason(cause)}" if isinstance(cause, Exception) else f"{name}: {cause}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _by_hand(model_id: str, pattern: str, folder: Path, source: str = "modelscope") -> str:
    return f"You can also put the files ({pattern}) of {SOURCES[source]}/{model_id} into {folder} by hand."
