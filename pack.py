"""Load this pack without ComfyUI, the way ComfyUI does: from its folder, under a name that is not its own.

`python pack.py trainer.attended ...` runs one of its commands from anywhere, also by a Python that leaves the current
folder out of its path, as the one that comes with ComfyUI's portable build does. `python pack.py -m module ...` is
Python's own `-m` without the current folder in the path.
"""

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent
NAME = "wancore"


def load_pack() -> ModuleType:
    """The pack as the package `wancore`, with `wancore.wan_core`, `wancore.nodes` and so on inside it.

    A Python without the packages of requirements.txt ends here with exit code 2 and a line that says what to do.
    """
    if NAME not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[NAME] = module
        try:
            spec.loader.exec_module(module)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] == NAME:
                raise
            sys.stderr.write(
                f"{sys.executable} has no package {error.name}. Use the Python in .venv, which `python quickstart.py` "
                "makes, or install requirements.txt into this one.\n"
            )
            raise SystemExit(2) from None
    return sys.modules[NAME]


def command(module: str, words: Sequence[str]) -> int:
    """The exit code of a command of the pack, whose `main` is in `module` and takes `words`."""
    # Python looks for packages beside a file that it runs, where `config.py` would pass for a package of that name.
    beside = ROOT.joinpath(*module.split(".")[:-1])
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != beside]
    load_pack()
    return importlib.import_module(f"{NAME}.{module}").main(words)


if __name__ == "__main__" and sys.argv[1] == "-m":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
elif __name__ == "__main__":
    sys.exit(command(sys.argv[1], sys.argv[2:]))
