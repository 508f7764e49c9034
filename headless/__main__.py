"""`python -m headless`, from the pack's folder."""

import importlib
import sys

from pack import NAME, load_pack

load_pack()
sys.exit(importlib.import_module(f"{NAME}.headless.cli").main())
