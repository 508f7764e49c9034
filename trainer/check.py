"""`python <pack>/trainer/check.py` with the flags of `train.py`, from any folder: look at the data alone."""

import sys
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    pack = run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))
    sys.exit(pack["command"]("trainer.checking", sys.argv[1:]))
