"""`accelerate launch <pack>/trainer/train.py` and `python <pack>/trainer/train.py`, from any folder; from the pack's
folder also `python -m trainer.train` and `accelerate launch -m trainer.train`.
"""

import sys
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    pack = run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))
    sys.exit(pack["command"]("trainer.run.main", sys.argv[1:]))
