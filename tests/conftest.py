"""Load the pack once, as ComfyUI does: from its folder, under a name that is not its own.

Tests import through the alias (`from wancore.wan_core...`), so that there is one identity of every class.
"""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _load_pack() -> None:
    spec = importlib.util.spec_from_file_location("wancore", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["wancore"] = module
    spec.loader.exec_module(module)


_load_pack()
