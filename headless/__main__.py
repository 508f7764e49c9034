"""`python -m headless`, from the pack's folder: load the pack under one name, then hand over to the command line."""

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

spec = importlib.util.spec_from_file_location("wancore", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
module = importlib.util.module_from_spec(spec)
sys.modules["wancore"] = module
spec.loader.exec_module(module)
sys.exit(importlib.import_module("wancore.headless.cli").main())
