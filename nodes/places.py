"""Which files and folders a workflow may name: a workflow is a stranger's file.

They are those of ComfyUI (input, output, temp, models with extra_model_paths.yaml), the assets of this pack, and the
folders that the owner of the machine names in an environment variable. Without ComfyUI they are `--input`, `--out`, the
models folder, and any path that was typed on the command line. Only the text of a name is checked: symbolic links
inside of a folder are followed, as ComfyUI does. See docs/security.md.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from wan_core.files import check_name, is_there

from . import host

ASSETS = host.PACK_FOLDER / "workflows" / "assets"
OWNERS_FOLDERS = "WANCORE_FOLDERS"
"""The environment variable: further folders, separated as in PATH."""

PLAIN = re.compile(r"""[^/\\:*?"<>|]*[^/\\:*?"<>|. ]""")
SPARE = 32
"""Bytes of numbers and suffixes that are added to a name."""

MODEL_FOLDERS = ("diffusion_models", "text_encoders", "vae", "clip_vision", "loras")


def inside(root: Path, name: str) -> Path | None:
    """The path of `name` below `root`, whether or not it exists; None when the name leads out of `root`.

    An absolute name must begin with `root`. The disk is not read.
    """
    root = Path(os.path.normpath(root.absolute()))
    if "\0" in name:
        return None
    place = Path(os.path.normpath(root / name))
    return place if place.is_relative_to(root) else None


def plain_name(label: str, name: str) -> str:
    """`name` without surrounding blanks, checked to be a valid file or folder name on every system.

    Raises:
        ValueError: it is not, or names folders; the message begins with `label`.
    """
    name = name.strip()
    if not PLAIN.fullmatch(name):
        raise ValueError(f"{label}: write a plain name such as 'my_style', without folders; got {name!r:.100}.")
    try:
        check_name(name, SPARE)
    except ValueError as error:
        raise ValueError(f"{label}: {error}.") from None
    return name


def owners_folders() -> list[Path]:
    """The folders that the owner of the machine lets workflows read."""
    return [Path(part).expanduser() for part in os.environ.get(OWNERS_FOLDERS, "").split(os.pathsep) if part.strip()]


def _first(name: str, roots: Iterable[Path], fits: Callable[[Path], bool]) -> Path | None:
    """The first path of that name below one of the folders that fits; a typed name may be any path."""
    if not name.strip():
        return None
    places = [place for root in roots if (place := inside(root, name))]
    if name in host.current.typed_names():
        places.append(Path(name).expanduser().absolute())
    return next((place for place in places if is_there(place, fits)), None)


def input_file(name: str) -> Path:
    """The file of that name: in the input folder, then among the assets that come with the workflows.

    In ComfyUI `name [output]` and `name [temp]` are files of those folders.

    Raises:
        ValueError: there is no such file.
    """
    if not isinstance(name, str):
        raise ValueError(f"An input file is named by text; got {name!r:.100}.")
    plain, folder = host.current.annotated(name)
    found = _first(plain, [folder, ASSETS], Path.is_file)
    if found is None:
        raise ValueError(f"There is no input file {name!r}. Put it into ComfyUI's input folder, or check the name.")
    return found


def model_file(folder: str, name: str) -> Path:
    """The path of the file `name` in a models folder such as "loras".

    Raises:
        ValueError: the host does not list such a file.
    """
    if name not in host.current.list_files(folder):
        raise ValueError(f"There is no file {name!r} in the models folder {folder!r}.")
    return host.current.model_path(folder, name)


def list_input_files(suffixes: tuple[str, ...]) -> list[str]:
    """Names of the files with these suffixes in the input folder and among the shipped assets, sorted."""
    found = (file for place in (host.current.input_dir(), ASSETS) if place.is_dir() for file in place.iterdir())
    return sorted({file.name for file in found if file.suffix.lower() in suffixes})


def saved_file(name: str) -> Path:
    """The file of that name below the output folder, else as `input_file`.

    Raises:
        ValueError: there is no such file.
    """
    return _first(name, [host.current.output_dir()], Path.is_file) or input_file(name)


def data_folder(name: str) -> Path:
    """The folder of that name: in the input folder, among the shipped assets, in the output folder, or in a folder of
    the owner's.

    Raises:
        ValueError: there is no such folder.
    """
    roots = [host.current.input_dir(), ASSETS, host.current.output_dir(), *owners_folders()]
    found = _first(name, roots, Path.is_dir)
    if found is None:
        raise ValueError(
            f"There is no folder {name!r} where a workflow may read. Put it, or a link to it, into ComfyUI's input "
            f"folder, or name the folder above it in {OWNERS_FOLDERS} where ComfyUI is started (docs/security.md)."
        )
    return found


def _trained_roots() -> list[Path]:
    """Where trainings write: the output folder, models folders, and the default folders of the shell's trainer."""
    here = host.current
    models = [place for folder in MODEL_FOLDERS for place in here.model_folders(folder)]
    roots = [here.output_dir(), here.models_dir(), *models, host.PACK_FOLDER / "models", *owners_folders()]
    return [*roots, *here.trainer_folders()]


def trained_file(name: str) -> Path:
    """The file of trained weights of that name: below the output folder, a models folder, the pack's own `models`, or a
    folder of the owner's.

    Raises:
        ValueError: there is no such file.
    """
    roots = _trained_roots()
    # Paths that the shell's trainer prints are relative to the pack's folder: models/train/...
    below_models = name.replace("\\", "/").removeprefix("./")
    found = _first(name, roots, Path.is_file)
    if found is None and below_models.startswith("models/"):
        found = _first(below_models.removeprefix("models/"), [r for r in roots if r.name == "models"], Path.is_file)
    if found is None:
        raise ValueError(
            f"There is no file of trained weights {name!r} where a workflow may read. Link the output of a training "
            f"node, or write a path below {roots[0]} or {roots[1]}."
        )
    return found


def trained_folder(name: str) -> Path | None:
    """The folder of a run that is named by its path; None when it is not where a workflow may read."""
    return _first(name, _trained_roots(), Path.is_dir)
