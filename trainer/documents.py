"""`python -m trainer.documents`, from the pack's folder: write the tables of docs/training.md anew."""

import importlib
import sys

from pack import NAME, ROOT, load_pack

if __name__ == "__main__":
    load_pack()
    tables = importlib.import_module(f"{NAME}.trainer.tables")
    file = ROOT / "docs" / "training.md"
    file.write_text(tables.filled(file.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"{file}\n")
