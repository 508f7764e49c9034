"""The README is true: what it names exists, its errors are raised, and both languages say the same."""

import ast
import re
from pathlib import Path

import pytest

from wancore.nodes import NODE_DISPLAY_NAME_MAPPINGS

ROOT = Path(__file__).parents[1]
EN, ZH = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README_zh.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
HOSTS_WORDS = {"Media input missing", "Invalid image file", "Value not in list"}


def links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("README")]


def prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def rows(text: str) -> list[list[str]]:
    return [re.split(r"(?<!\\)\|", line.strip("|")) for line in text.splitlines() if line.startswith("|")]


def test_both_languages_have_the_same_parts():
    levels = [[len(mark) for mark in re.findall(r"^(#+) ", text, re.MULTILINE)] for text in (EN, ZH)]
    assert levels[0] == levels[1]
    blocks = [re.findall(r"```.*?```", text, re.DOTALL) for text in (EN, ZH)]
    assert blocks[0] == blocks[1] and len(blocks[0]) >= 5
    assert [link.replace("help_page_en", "help_page_zh") for link in links(EN)] == links(ZH)
    assert "README_zh.md" in EN and "README.md" in ZH


def test_both_languages_have_the_same_tables():
    english, chinese = rows(EN), rows(ZH)
    assert [len(row) for row in english] == [len(row) for row in chinese]
    for one, other in zip(english, chinese, strict=True):
        named = [sorted(re.findall(r"`[^`]+`", " ".join(row))) for row in (one, other)]
        assert named[0] == named[1]


def test_both_languages_name_the_same_things():
    """What stands in code style outside of tables and blocks, however often: sentences are divided differently."""
    names = [set(re.findall(r"`([^`\n]+)`", prose(text))) for text in (EN, ZH)]
    assert names[0] == names[1]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    text = prose(path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)]+)\)", text):
        target, _, part = link.partition("#")
        page = path.parent / target if target else path
        assert link.startswith("http") or page.exists(), f"{path.name} links {link}"
        if part and not link.startswith("http"):
            headings = re.findall(r"^#+ (.*)", page.read_text(encoding="utf-8"), re.MULTILINE)
            # As GitHub makes anchors of headings.
            assert part in [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in headings], link


COMMANDS = sorted({
    (page.name, module)
    for page in DOCUMENTS
    for module in re.findall(r"python -m ((?:headless|trainer|tools|tests)[\w.]*\w)", page.read_text(encoding="utf-8"))
})  # fmt: skip


@pytest.mark.parametrize(("page", "module"), COMMANDS)
def test_commands_name_files_that_are_run(page, module):
    place = ROOT.joinpath(*module.split("."))
    file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    assert file.is_file() and re.search(r'__name__ == "__main__"|pack\["command"\]', file.read_text(encoding="utf-8"))


PLACES = r"`((?:wan_core|nodes|headless|trainer|tools|tests|workflows|docs)/[\w./-]*)`"


def test_contributing_names_places_that_exist():
    named = set(re.findall(PLACES, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert named and not [place for place in named if not (ROOT / place).exists()]


def strings() -> str:
    """Every text in the code of the pack, the parts of one message joined as they are written."""
    found = []
    for folder in ("wan_core", "nodes", "headless"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


VALUES = r"\d[\dx, ]*|control_video and input_image|a Wan VAE|the model loader|-0000k-of"
"""What the keys show as examples of what a message names."""

CUTS = r"\.\.\.|, and nothing|frames, "
"""Where messages are put together."""


def test_troubleshooting_is_keyed_by_messages_that_are_raised():
    table = EN[EN.index("## Troubleshooting") : EN.index("## Licence")]
    said = strings()
    keys = [key for row in rows(table) for key in re.findall(r"`([^`]+)`", row[0])]
    assert len(keys) > 10
    for key in keys:
        if key in HOSTS_WORDS:
            continue
        pieces = [piece.strip(" ,") for piece in re.split(f"{VALUES}|{CUTS}", key)]
        for piece in filter(lambda p: re.search(r"[a-z]{3}", p), pieces):
            assert piece in said, f"nothing says {piece!r} of {key!r}"


def test_workflows_and_models_of_the_table_exist():
    table = EN[EN.index("| checkpoint |") : EN.index("Every row also takes")]
    named = [name for row in rows(table)[2:] for name in re.findall(r"`([^`]+)`", row[1])]
    shipped = {path.stem for path in (ROOT / "workflows" / "api").glob("*.json")}
    assert set(named) | {"t2v"} == {
        name for name in shipped if not name.startswith(("train_", "validate_", "extend_", "segments_"))
    }


OTHERWISE = ("none", "inside ", "the same nodes")


def test_the_page_for_users_of_other_packs_names_nodes_that_exist():
    text = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
    ours = {title.removesuffix(" (WanCore)") for title in NODE_DISPLAY_NAME_MAPPINGS.values()}
    tables = [row for row in rows(text[text.index("## kijai") :]) if row[1].strip() not in ("here", "-")]
    assert len(tables) > 60
    for there, here, *_ in tables:
        named = re.split(r", | → | \(→ |; ", re.sub(r"`[^`]+`|\((?!→).*?\)|\)", "", here).strip())
        known = [name for name in named if name.strip().rstrip(",") in ours]
        assert known or here.strip().startswith(OTHERWISE), f"{there.strip()} is mapped to {here.strip()!r}"
