"""The ComfyUI that tests of the real host run against."""

import configparser
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

CLI_SETTINGS = {
    "win32": Path("AppData", "Local", "comfy-cli"),
    "darwin": Path("Library", "Application Support", "comfy-cli"),
}
"""Where comfy-cli keeps its settings below the home folder (comfy_cli/constants.py)."""


@dataclass(frozen=True)
class ComfyUI:
    """A checkout, and the interpreter of its environment."""

    folder: Path
    python: str


def comfyui() -> ComfyUI:
    """The checkout at COMFYUI_PATH, else the default workspace of comfy-cli; the test is skipped where there is none.

    Its interpreter is COMFYUI_PYTHON, else that of an environment inside of it, else the one that runs the tests.
    """
    folder = os.environ.get("COMFYUI_PATH") or _workspace()
    if not folder or not Path(folder, "main.py").is_file():
        pytest.skip("needs a ComfyUI checkout: set COMFYUI_PATH (and COMFYUI_PYTHON), or comfy-cli's default workspace")
    inside = (
        Path(folder, env, *tail) for env in (".venv", "venv") for tail in (("bin", "python"), ("Scripts", "python.exe"))
    )
    found = next((str(python) for python in inside if python.exists()), sys.executable)
    return ComfyUI(Path(folder), os.environ.get("COMFYUI_PYTHON") or found)


def _workspace() -> str | None:
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(Path.home() / CLI_SETTINGS.get(sys.platform, Path(".config", "comfy-cli")) / "config.ini")
    return settings.defaults().get("default_workspace")
