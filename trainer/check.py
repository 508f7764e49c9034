"""`python -m trainer.check`, from the pack's folder, with the flags of `trainer.train`: look at the data alone."""

import importlib
import sys

from pack import NAME, load_pack

if __name__ == "__main__":
    load_pack()
    sys.exit(importlib.import_module(f"{NAME}.trainer.checking").main())
