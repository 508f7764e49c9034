"""`python -m trainer.recipe`, from the pack's folder."""

import importlib
import sys

from pack import NAME, load_pack

if __name__ == "__main__":
    load_pack()
    sys.exit(importlib.import_module(f"{NAME}.trainer.recipe_command").main())
