"""docs/training.md says what the trainer does: its tables, its commands, and the errors it explains."""

import dataclasses
import re
import shlex

import pytest

from tests.trainer.runs import ROOT
from tools.training_docs import SECTIONS, fill_tables
from wancore.trainer.config import TrainConfig, parse
from wancore.trainer.flags import REFERENCE_FLAGS, REFUSED_FLAGS
from wancore.trainer.recipe import main

TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python -m trainer\.(\w+) (.+)$", TEXT, re.MULTILINE)


def test_tables_are_those_of_the_settings():
    assert fill_tables(TEXT) == TEXT, "run python -m tools.training_docs"
    for field in dataclasses.fields(TrainConfig):
        assert f"| `--{field.name}`" in TEXT
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    assert [names.index(first) for first in SECTIONS.values()] == sorted(map(names.index, SECTIONS.values()))


@pytest.mark.parametrize(("module", "words"), COMMANDS, ids=str)
def test_commands_are_read(module, words, capsys):
    assert (ROOT / "trainer" / f"{module}.py").is_file()
    words = shlex.split(words)
    if module == "recipe":
        assert main([*words, "--dry-run"]) == 0
    elif module == "check":
        place = words.index("--out")
        assert parse(words[:place] + words[place + 2 :]).extra_inputs


def test_flags_in_the_text_exist():
    fields = {f.name for f in dataclasses.fields(TrainConfig)}
    aliases = {name for f in dataclasses.fields(TrainConfig) for name in f.metadata["aliases"]}
    others = {"config", "expert", "launcher", "out", "set", "tiny", "vram", "dry-run", "no-", "input_contains_"}
    others |= {
        *REFERENCE_FLAGS,
        *REFUSED_FLAGS,
        "num_machines",
        "machine_rank",
        "main_process_ip",
        "dataset",
        "local_dir",
    }
    assert set(re.findall(r"--([\w-]+)", TEXT)) <= fields | aliases | others


def test_the_errors_that_are_explained_are_those_of_the_code():
    files = [*(ROOT / "trainer").rglob("*.py"), *(ROOT / "nodes").glob("*.py")]
    source = re.sub(r'"\s*\n\s*f?"', "", "\n".join(p.read_text(encoding="utf-8") for p in files))
    section = TEXT.partition("## Troubleshooting")[2]
    for line in re.findall(r"^\| (.+?) \|", section, re.MULTILINE)[1:]:
        for key in re.findall(r"`(.+?)`", line):
            for piece in re.split(r"\.\.\.|\d+|\bN\b|nan$|accelerate$", key):
                assert piece.strip() in source, key
