"""`python -m trainer.documents`, from the pack's folder: write the tables of docs/training.md anew."""

import sys
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    pack = run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))
    sys.exit(pack["command"]("trainer.tables", sys.argv[1:]))
