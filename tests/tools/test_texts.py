"""Every node is explained in the editor, in both languages, by files that say what the classes say."""

import json
import re
from pathlib import Path

import pytest

from tools import pages, workflows
from tools.templates import TEMPLATES, template
from wancore.headless.folders import workflow_file
from wancore.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, SEARCH_ALIASES

ROOT = Path(__file__).parents[2]
NODES = sorted(NODE_CLASS_MAPPINGS)
CATALOGUE = pages.Catalogue.read()


def every_text(node_id: str) -> list[pages.Text]:
    cls = NODE_CLASS_MAPPINGS[node_id]
    found = list(pages.node_text(node_id, cls, NODE_DISPLAY_NAME_MAPPINGS[node_id]))
    for name, _, options, _ in pages.inputs(cls):
        found += pages.slot_text(node_id, name, options.get("tooltip", ""))
    for name, _, tooltip in pages.outputs(cls):
        found += pages.slot_text(node_id, name, tooltip)
    return found


@pytest.mark.parametrize("node_id", NODES)
def test_every_text_is_there_and_has_a_translation(node_id):
    missing = []
    for text in every_text(node_id):
        assert text.english, f"{text.where} is empty"
        if text.english not in CATALOGUE.sections[text.section]:
            missing.append(f"{text.where}: {text.english!r}")
    assert not missing, f"add to tools/texts/zh.json, then run python -m tools.pages: {missing}"


@pytest.mark.parametrize("node_id", NODES)
@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_every_node_is_explained_with_an_example(node_id, language):
    prose = pages.read_prose(language).get(node_id)
    assert prose, f"add a section '## {node_id}' to tools/texts/help/{language}.md"
    assert prose.split("\n\n")[-1].startswith(pages.HEADINGS[language]["example"]), f"{node_id} has no example"


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_can_be_found_by_other_words(node_id):
    words = SEARCH_ALIASES.get(node_id, ())
    assert len(words) >= 2, f"add other words for {node_id} to SEARCH_ALIASES in nodes/__init__.py"
    assert list(words) == NODE_CLASS_MAPPINGS[node_id].SEARCH_ALIASES
    title = NODE_DISPLAY_NAME_MAPPINGS[node_id].removesuffix(" (WanCore)").lower()
    assert title not in words, "the title is found anyway"


@pytest.mark.parametrize("node_id", NODES)
def test_every_node_stands_under_a_stage(node_id):
    top, *stages = NODE_CLASS_MAPPINGS[node_id].CATEGORY.split("/")
    assert top == "WanCore" and len(stages) == 1, f"{node_id} belongs under WanCore/<stage>"
    assert stages[0] in {*pages.KNOWN_CATEGORIES, *CATALOGUE.sections["categories"]}, f"{stages[0]} has no Chinese"


def test_the_tree_is_small_enough_to_read():
    assert len({cls.CATEGORY for cls in NODE_CLASS_MAPPINGS.values()}) <= 10


def test_files_are_what_the_nodes_say():
    built = {str(path): content for path, content in pages.files().items()}
    shipped = {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
        for folder in pages.WRITTEN
        for path in (ROOT / folder).rglob("*.*")
        if path.is_file()
    }
    assert sorted(built) == sorted(shipped), "run python -m tools.pages"
    assert [path for path in built if built[path] != shipped[path]] == [], "run python -m tools.pages"


def test_the_catalogue_holds_nothing_that_is_not_used():
    used = {(text.section, text.english) for node_id in NODES for text in every_text(node_id)}
    for cls in NODE_CLASS_MAPPINGS.values():
        used |= {("categories", part) for part in cls.CATEGORY.split("/")}
        used |= {("types", kind) for _, kind, _, _ in pages.inputs(cls) if isinstance(kind, str)}
        used |= {("types", kind) for kind in cls.RETURN_TYPES}
    shown = json.dumps(list(workflows.files().values()), ensure_ascii=False)
    texts = CATALOGUE.sections["workflows"].items()
    used |= {("workflows", text) for text, zh in texts if text in shown and zh in shown}
    known = {(section, english) for section, words in CATALOGUE.sections.items() for english in words}
    assert known - used == set()


@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_help_explains_nothing_that_is_not_there(language):
    assert set(pages.read_prose(language)) == set(NODES)


def test_chinese_is_chinese_and_keeps_the_numbers():
    """A translation that was pasted beside the wrong text has other numbers in it."""
    for english, chinese in CATALOGUE.sections["texts"].items():
        assert re.search(r"[\u4e00-\u9fff]", chinese), english
        numbers = [n for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", english) if len(n) > 1]
        assert all(n in chinese for n in numbers), (english, chinese)


def test_pages_name_pictures_that_are_served():
    docs = ROOT / "web" / "docs"
    for page in docs.rglob("*.md"):
        (picture,) = re.findall(r"!\[.*\]\((.+)\)", page.read_text(encoding="utf-8"))
        assert (docs / picture).is_file(), f"{page.name} shows {picture}"
    assert [path.name for path in (ROOT / "web").rglob("*.js")] == ["wancore.js"]


def test_both_languages_have_the_same_keys():
    def keys(value, path=()):
        return (
            {path} | {k for name, v in value.items() for k in keys(v, (*path, name))}
            if isinstance(value, dict)
            else {path}
        )

    for name in ("main.json", "nodeDefs.json"):
        en, zh = (
            json.loads((ROOT / "locales" / language / name).read_text(encoding="utf-8")) for language in ("en", "zh")
        )
        assert keys(en) == keys(zh)


@pytest.mark.parametrize(
    ("text", "written"), [("a @ b", "a {'@'} b"), ("{x|y}", "{'{'}x{'|'}y{'}'}"), ("100 %", "100 %")]
)
def test_signs_of_the_translation_library_are_written_out(text, written):
    assert pages.escape(text) == written


def test_a_missing_translation_names_its_place():
    with pytest.raises(ValueError, match=r"WanCoreNew\.width's tooltip has no Chinese: add 'How wide\.' to 'texts'"):
        CATALOGUE.say(pages.slot_text("WanCoreNew", "width", "How wide.")[1])


@pytest.mark.parametrize(
    "words",
    [
        "wan", "image to video", "text to video", "first last frame", "vace", "control", "lora", "图生视频", "文生视频",
        "首尾帧", "长视频", "加速", "控制视频", "视频编辑", "训练",
    ],
)  # fmt: skip
def test_templates_or_nodes_are_found_by_what_people_type(words):
    templates = [name for name in map(template, TEMPLATES) if words in name.lower()]
    zh = pages.Catalogue.read().sections["nodes"]
    nodes = [
        node_id
        for node_id, title in NODE_DISPLAY_NAME_MAPPINGS.items()
        if any(words in text.lower() for text in (title, zh[title], *SEARCH_ALIASES.get(node_id, ())))
    ]
    assert nodes and (templates or words in ("长视频",))


def test_templates_have_names_that_any_system_can_store():
    names = [template(name) for name in TEMPLATES]
    assert len(set(names)) == len(names)
    for name in names:
        assert not set(name) & set('<>:"/\\|?*#%&') and name == name.strip(" .") and len(name.encode()) < 200


def test_short_names_of_workflows_keep_working():
    for text in ("t2v", "workflows/t2v.json"):
        assert workflow_file(text) == ROOT / "workflows" / "api" / "t2v.json"
