"""`python <pack>/trainer/recipe.py ROW lora|full`, from any folder; see `recipe_command`."""

import sys
from pathlib import Path
from runpy import run_path

if __name__ == "__main__":
    pack = run_path(str(Path(__file__).resolve().parents[1] / "pack.py"))
    sys.exit(pack["command"]("trainer.recipes", sys.argv[1:]))
