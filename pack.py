"""Load this pack without ComfyUI, the way ComfyUI does: from its folder, under a name that is not its own.

`python pack.py trainer.attended ...` runs one of its commands from anywhere, also by a Python that leaves the current
folder out of its path, as the one that comes with ComfyUI's portable build does.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
NAME = "wancore"


def load_pack() -> ModuleType:
    """The pack as the package `wancore`, with `wancore.wan_core`, `wancore.nodes` and so on inside it."""
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        spec.loader.exec_module(module)
    return sys.modules[NAME]


if __name__ == "__main__":
    load_pack()
    sys.exit(importlib.import_module(f"{NAME}.{sys.argv[1]}").main(sys.argv[2:]))
