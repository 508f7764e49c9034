"""The names of this pack's modules, the same however a process was entered.

The library is the package `wan_core`; `nodes`, `headless` and `trainer` are `wancore.nodes`, `wancore.headless` and
`wancore.trainer`. ComfyUI loads the pack under a name made from its path, `python -m headless` from its folder, and pip
installs it: `register` makes both names in each of them, so that every class exists once.

`python pack.py trainer.supervised ...` runs one of its commands from anywhere, also by a Python that leaves the current
folder out of its path, as the one that comes with ComfyUI's portable build does. `python pack.py -m module ...` is
Python's own `-m` without the current folder in the path.
"""

import importlib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent
NAME, LIBRARY = "wancore", "wan_core"


def register() -> None:
    """Put `wancore`, with nothing of it imported, and `wan_core` of this folder into `sys.modules`.

    Raises:
        ImportError: another folder's copy of the pack is in this process.
    """
    if NAME not in sys.modules:
        spec = ModuleSpec(NAME, None, is_package=True)
        spec.submodule_search_locations = [str(ROOT)]
        sys.modules[NAME] = importlib.util.module_from_spec(spec)
    # In this folder it could be imported under this name as well, and would be a second copy.
    sys.modules[f"{NAME}.{LIBRARY}"] = None  # type: ignore[assignment]  # Python's own mark of what is not imported
    # pip puts the library beside `wancore`.
    library = next(folder for folder in (ROOT / LIBRARY, ROOT.parent / LIBRARY) if folder.is_dir())
    if LIBRARY not in sys.modules:
        # Not by sys.path: in ComfyUI its `nodes` must stay the module of that name.
        found_library = importlib.util.spec_from_file_location(LIBRARY, library / "__init__.py")
        assert found_library is not None and found_library.loader is not None
        sys.modules[LIBRARY] = importlib.util.module_from_spec(found_library)
        try:
            found_library.loader.exec_module(sys.modules[LIBRARY])
        except BaseException:
            del sys.modules[LIBRARY]
            raise
    for name, folder in ((NAME, ROOT), (LIBRARY, library)):
        found = [Path(place).resolve() for place in getattr(sys.modules[name], "__path__", ())]
        if folder not in found:
            raise ImportError(
                f"WanCore in {ROOT} cannot be loaded: this process already has the package {name} from "
                f"{found[0] if found else sys.modules[name]}. Keep one of the two copies."
            )


def command(module: str, words: Sequence[str]) -> int:
    """The exit code of a command of the pack, whose `main` is in `module` and takes `words`.

    A Python without the packages of requirements.txt ends here with exit code 2 and a line that says what to do.
    """
    # Python looks for packages beside a file that it runs, where `config.py` would pass for a package of that name.
    beside = ROOT / module.partition(".")[0]
    sys.path[:] = [place for place in sys.path if Path(place).resolve() != beside]
    try:
        register()
        main = importlib.import_module(f"{NAME}.{module}").main
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in (NAME, LIBRARY):
            raise
        sys.stderr.write(
            f"{sys.executable} has no package {error.name}. Use the Python in .venv, which `python quickstart.py` "
            "makes, or install requirements.txt into this one.\n"
        )
        return 2
    return main(words)


def run_file(file: str) -> NoReturn:
    """End this process as the command whose module is `file`, with the words after it on the command line.

    For files that are commands when Python runs them: they call this before their imports, which need the names above.
    """
    module = Path(file).resolve().relative_to(ROOT).with_suffix("")
    sys.exit(command(".".join(module.parts), sys.argv[1:]))


if __name__ == "__main__" and sys.argv[1] == "-m":
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
elif __name__ == "__main__":
    sys.exit(command(sys.argv[1], sys.argv[2:]))
