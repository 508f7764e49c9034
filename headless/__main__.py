"""`python -m headless`, from the pack's folder."""

import sys
from pathlib import Path
from runpy import run_path

pack = run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))
sys.exit(pack["command"]("headless.cli", sys.argv[1:]))
