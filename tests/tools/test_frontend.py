"""The shipped workflows and the texts in ComfyUI's real front end."""

import json
import urllib.request
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.programs import wait_for
from tools import pages
from tools.templates import TEMPLATES, template
from wan_core import catalog
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.workflow import Workflow
from wancore.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json"))
OF_22 = [name for name in NAMES if any(row.is_22 and name.startswith(row.workflow) for row in catalog.CATALOG)]
LOADERS = {"WanCoreModelLoader": "model", "WanCoreTextEncoderLoader": "text_encoder", "WanCoreVAELoader": "vae"}
pytestmark = pytest.mark.comfyui


def load(name: str) -> dict:
    """The editor's form of the workflow with this short name."""
    return json.loads((ROOT / "workflows" / f"{template(name)}.json").read_text(encoding="utf-8"))


def essence(workflow: dict, like: dict) -> dict:
    """What a user sees of a graph and a run uses of it. Slots that `like` does not have are the front end's own."""
    wanted = {node["id"]: node for node in like["nodes"]}

    def slots(node: dict, side: str, keys: tuple[str, ...]) -> list[list]:
        known = {slot["name"] for slot in wanted[node["id"]][side]}
        return [[slot.get(key) or None for key in keys] for slot in node[side] if slot["name"] in known]

    nodes = {
        node["id"]: {
            **{key: node.get(key) for key in ("type", "mode", "color", "bgcolor", "properties")},
            "place": [*node["pos"], *(node["size"] if not node["type"].startswith("Load") else ())],
            "widgets": node.get("widgets_values") or [],
            "inputs": slots(node, "inputs", ("name", "type", "link", "shape")),
            "outputs": slots(node, "outputs", ("name", "type", "links")),
        }
        for node in workflow["nodes"]
    }
    groups = [[group[key] for key in ("title", "bounding", "color")] for group in workflow["groups"]]
    return {"nodes": nodes, "links": workflow["links"], "groups": groups}


@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_opens_and_is_saved_as_it_is(name, editor):
    workflow = load(name)
    editor.open(workflow)
    missing = editor.page.evaluate(
        "() => window.app.graph.nodes.filter(n => n.has_errors || !(n.type in LiteGraph.registered_node_types))"
        ".map(n => n.type)"
    )
    assert missing == []
    prompt = editor.prompt()
    for node in prompt.values():
        node["inputs"].pop("video-preview", None)  # the player that the front end puts into Load Video
        node.pop("_meta")  # titles are in the user's language
    shipped = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert prompt == {key: {k: v for k, v in node.items() if k != "_meta"} for key, node in shipped.items()}
    saved = editor.saved()
    assert essence(saved, workflow) == essence(workflow, workflow)
    editor.open(saved)
    assert essence(editor.saved(), workflow) == essence(saved, workflow)
    assert editor.new_errors() == []


def test_a_workflow_runs_by_a_click_and_shows_its_video(editor):
    editor.open(load("t2v"))
    small = {"steps": 4, "cfg": 1.5, "width": 96, "height": 64, "num_frames": 17}
    editor.page.evaluate(
        """([loaders, small]) => {
            for (const node of window.app.graph.nodes) {
                const set = (name, value) => { node.widgets.find(w => w.name === name).value = value }
                if (node.type in loaders) set(loaders[node.type], 'WanCore/tiny')
                if (node.type === 'WanCoreSampler') for (const [name, value] of Object.entries(small)) set(name, value)
            }
        }""",
        [LOADERS, small],
    )
    editor.page.get_by_role("button", name="Run", exact=True).first.click()
    shown = "[...document.querySelectorAll('video')].find(v => v.src.includes('wancore_t2v') && v.readyState > 1)"
    size = f"() => {{ const video = {shown}; return video && [video.videoWidth, video.videoHeight] }}"
    assert wait_for(lambda: editor.page.evaluate(size), every=0.2) == [96, 64]
    editor.picture("t2v_graph")


@pytest.mark.parametrize("name", OF_22)
def test_a_workflow_of_wan_22_runs_in_its_tiny_form(name, editor, comfy_server):
    """The graph as it is shipped, with the values of `--tiny` in its widgets and two steps, run by a click."""
    classes = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}
    tiny = apply_tiny(Workflow.load(ROOT / "workflows" / "api" / f"{name}.json"), classes)
    values = {
        number: {key: value for key, value in node.inputs.items() if isinstance(value, (str, float, int))}
        for number, node in tiny.nodes.items()
    }
    for inputs in values.values():
        inputs.update({"steps": 2, "num_frames": 9} if "steps" in inputs else {})
    editor.open(load(name))
    before = set(comfy_server.base.rglob("output/**/*.mp4"))
    editor.page.evaluate(
        """(values) => {
            for (const node of window.app.graph.nodes) {
                for (const [name, value] of Object.entries(values[node.id] ?? {})) {
                    const widget = node.widgets?.find(w => w.name === name)
                    if (widget) widget.value = value
                }
            }
        }""",
        values,
    )
    editor.page.get_by_role("button", name="Run", exact=True).first.click()
    wait_for(lambda: set(comfy_server.base.rglob("output/**/*.mp4")) - before, every=0.5)
    running = "async () => (await (await fetch('/queue')).json()).queue_running.length"
    wait_for(lambda: editor.page.evaluate(running) == 0, every=0.5)
    assert editor.new_errors() == []


def widget_texts(editor) -> dict:
    """Title, and label and tooltip of every widget, of every node of the pack as the front end makes them."""
    return editor.page.evaluate(
        """(ids) => Object.fromEntries(ids.map(id => {
            const node = LiteGraph.createNode(id)
            const widgets = (node.widgets ?? []).filter(w => w.tooltip)
            return [id, {title: LiteGraph.registered_node_types[id].title,
                         widgets: Object.fromEntries(widgets.map(w => [w.name, [w.label ?? w.name, w.tooltip]]))}]
        }))""",
        list(NODE_CLASS_MAPPINGS),
    )


@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_texts_are_in_the_users_language(language, editor):
    say = pages.Catalogue.read().say if language == "zh" else pages.english
    editor.language(language)
    try:
        for node_id, found in widget_texts(editor).items():
            cls = NODE_CLASS_MAPPINGS[node_id]
            assert found["title"] == say(pages.node_text(node_id, cls, NODE_DISPLAY_NAME_MAPPINGS[node_id])[0])
            tips = {name: options.get("tooltip", "") for name, _, options, _ in pages.inputs(cls)}
            for name, shown in found["widgets"].items():
                if name in tips:
                    assert shown == [say(text) for text in pages.slot_text(node_id, name, tips[name])], (node_id, name)
    finally:
        if language != "en":
            editor.language("en")


@pytest.mark.parametrize("language", pages.LANGUAGES)
def test_the_help_page_is_shown_with_its_picture(language, editor):
    editor.language(language)
    try:
        editor.open(load("t2v"))
        editor.page.evaluate(
            "() => window.app.canvas.selectNode(window.app.graph.nodes.find(n => n.type === 'WanCoreSampler'))"
        )
        editor.page.get_by_test_id("info-button").first.click()
        heading = "采样器 (WanCore)" if language == "zh" else "Sampler (WanCore)"
        editor.page.locator(".node-help-content h1", has_text=heading).wait_for(timeout=20_000)
        drawn = "() => document.querySelector('.node-help-content img[src*=\"WanCoreSampler\"]')?.naturalWidth"
        assert wait_for(lambda: editor.page.evaluate(drawn)) > 100
        editor.picture(f"help_page_{language}")
    finally:
        if language != "en":
            editor.language("en")


@pytest.mark.parametrize("name", NAMES)
def test_the_template_browser_is_offered_a_workflow_with_its_picture(name, editor):
    with urllib.request.urlopen(f"{editor.url}/api/workflow_templates", timeout=10) as answer:
        assert template(name) in json.load(answer)["wancore"]
    picture = f"{editor.url}/api/workflow_templates/wancore/{quote(template(name))}.jpg"
    with urllib.request.urlopen(picture, timeout=10) as answer:
        assert answer.headers["Content-Type"] == "image/jpeg" and answer.read(2) == b"\xff\xd8"


def test_the_template_browser_shows_them(editor):
    editor.run_command("Comfy.BrowseTemplates")
    dialog = editor.page.get_by_role("dialog")
    dialog.get_by_text("wancore", exact=False).first.click(timeout=20_000)
    drawn = (
        "() => [...document.querySelectorAll('[data-testid^=template-workflow-]')]"
        ".filter(card => [...card.querySelectorAll('img')].some(picture => picture.naturalWidth))"
        ".map(card => card.dataset.testid.replace('template-workflow-', ''))"
    )
    shown = wait_for(lambda: len(names := editor.page.evaluate(drawn)) >= 6 and names)
    assert set(shown) <= set(map(template, NAMES))
    editor.picture("templates")
    editor.page.keyboard.press("Escape")


@pytest.fixture(params=[False, True], ids=["classic", "new-design"])
def design(request, editor):
    """The editor with nodes drawn on the canvas, and with those of the new design."""
    choose = "async (on) => { await window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on) }"
    try:
        editor.page.evaluate(choose, request.param)
        yield request.param
    finally:
        editor.page.evaluate(choose, False)


RECTANGLES = """(isNew) => {
    const { scale, offset } = window.app.canvas.ds
    if (!isNew) return window.app.graph.nodes.map(n => [n.type, n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30])
    return [...document.querySelectorAll('[data-node-id]')].map(e => {
        const r = e.getBoundingClientRect()
        const type = window.app.graph.getNodeById(Number(e.dataset.nodeId))?.type
        return [type, r.left / scale - offset[0], r.top / scale - offset[1], r.width / scale, r.height / scale]
    })
}"""


def overlapping(rectangles: list[list]) -> list[tuple[str, str]]:
    """The pairs of nodes that share more than a pixel."""
    return [
        (a[0], b[0])
        for i, a in enumerate(rectangles)
        for b in rectangles[i + 1 :]
        if min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1]) > 1 and min(a[2] + a[4], b[2] + b[4]) - max(a[2], b[2]) > 1
    ]


def layouts() -> list[str]:
    """A workflow of each layout: many differ in their values only."""
    found = {
        json.dumps([[node[key] for key in ("type", "pos", "size")] for node in load(n)["nodes"]]): n for n in NAMES
    }
    return list(found.values())


def test_no_node_covers_another_in_either_design(design, editor):
    for name in layouts():
        workflow = load(name)
        editor.open(workflow)
        if design and not wait_for(lambda: len(editor.page.query_selector_all("[data-node-id]")) > 1, every=0.2):
            pytest.skip("this front end has one design")
        # All nodes in sight: the new design draws no others.
        editor.page.evaluate("() => { Object.assign(window.app.canvas.ds, { scale: 0.3, offset: [900, 300] }) }")
        editor.page.evaluate("() => window.app.canvas.setDirty(true, true)")
        count = len(workflow["nodes"])
        shown = wait_for(
            lambda n=count: len(found := editor.page.evaluate(RECTANGLES, design)) == n and found, every=0.2
        )
        assert not overlapping(shown), name


SHOWN = """() => window.app.graph.nodes.filter(node => node.type !== 'MarkdownNote').flatMap(node =>
    (node.widgets ?? [])
        .filter(w => !w.hidden && !(w.advanced ?? w.options?.advanced) && w.serialize !== false)
        .filter(w => !['button', 'hidden'].includes(w.type) && !w.name.includes('preview'))
        .map(w => `${node.type}.${w.name}`))"""
"""The widgets that a graph shows before anyone asks for the advanced ones."""


@pytest.mark.parametrize(("name", "most"), [("t2v", 20), ("i2v_480p", 22), ("i2v_480p_4step", 22)])
def test_a_graph_shows_few_widgets(name, most, editor):
    editor.open(load(name))
    shown = editor.page.evaluate(SHOWN)
    assert "WanCoreTextEncode.prompt" in shown and len(shown) <= most, shown


def test_the_size_of_a_video_has_one_place(design, editor):
    """A sampler behind pictures shows none, and shows it again when they are unlinked."""
    size = ("width", "height", "num_frames")
    sampler = """(design) => {
        const node = window.app.graph.nodes.find(n => n.type === 'WanCoreSampler')
        if (!design) return node.widgets.filter(w => !w.hidden).map(w => w.name)
        return document.querySelector(`[data-node-id="${node.id}"]`)?.innerText.split('\\n')
    }"""
    names = [f"WanCoreSampler.{name}" for name in size]

    def placed(name: str) -> bool:
        editor.open(load(name))
        wait_for(lambda: "steps" in (editor.page.evaluate(sampler, design) or []), every=0.2)
        return [name in editor.page.evaluate(sampler, design) for name in size]

    assert placed("t2v") == [True] * 3
    assert placed("i2v_480p") == [False] * 3
    assert not {*names} & {*editor.page.evaluate(SHOWN)}
    values = {node["class_type"]: node["inputs"] for node in editor.prompt().values()}["WanCoreSampler"]
    assert [values[name] for name in size] == [832, 480, 81], "a hidden widget keeps its value"
    editor.page.evaluate(
        "() => { const n = window.app.graph.nodes.find(n => n.type === 'WanCoreSampler');"
        " n.disconnectInput(n.inputs.findIndex(i => i.name === 'conditioning')) }"
    )
    assert wait_for(lambda: {*names} <= {*editor.page.evaluate(SHOWN)}, every=0.2)


def test_sockets_have_the_packs_colours(design, editor):
    editor.open(load("t2v"))
    colour = (
        "() => getComputedStyle(document.documentElement).getPropertyValue('--color-datatype-WANCORE_VAE')"
        " && window.app.canvas.default_connection_color_byType.WANCORE_VAE"
    )
    assert wait_for(lambda: editor.page.evaluate(colour), every=0.2) == "#E57373"


def test_lists_show_what_a_download_is(editor):
    editor.open(load("t2v"))
    label = """() => {
        const node = window.app.graph.nodes.find(n => n.type === 'WanCoreVAELoader')
        const widget = node.widgets.find(w => w.name === 'vae')
        return [widget.value, widget.options.getOptionLabel(widget.value), widget.options.values]
    }"""
    value, shown, values = editor.page.evaluate(label)
    assert shown == f"{value} (download, 0.5 GB)"
    assert value in values


@pytest.mark.parametrize(("name", "tiny"), [("t2v", "WanCore/tiny"), ("vace_1.3b", "WanCore/tiny-vace")])
def test_a_list_shows_the_bundled_model_that_fits(name, tiny, editor):
    editor.open(load(name))
    values = editor.page.evaluate(
        "() => window.app.graph.nodes.find(n => n.type === 'WanCoreModelLoader').widgets"
        ".find(w => w.name === 'model').options.values"
    )
    assert [value for value in values if value.startswith("WanCore/")] == [tiny]


def test_templates_stand_in_the_order_of_their_table(editor):
    order = editor.page.evaluate(
        "async () => (await (await import('/scripts/api.js')).api.getWorkflowTemplates()).wancore"
    )
    assert order == list(map(template, TEMPLATES))


def test_demo_pictures_reach_the_input_list_and_replace_nothing(editor, comfy_server):
    listed = editor.page.evaluate("async () => (await (await fetch('/object_info/LoadImage')).json()).LoadImage.input")
    names = str(listed)
    assert "start.png" in names and "reference.png" in names


def test_a_run_says_on_its_nodes_what_the_log_says(editor):
    editor.open(load("t2v"))
    said: list = []
    editor.page.expose_function("wancoreSaid", said.append)
    editor.page.evaluate(
        """async () => {
            const { api } = await import('/scripts/api.js')
            api.addEventListener('progress_text', event => window.wancoreSaid(event.detail))
        }"""
    )
    editor.page.evaluate(
        """([loaders, small]) => {
            for (const node of window.app.graph.nodes) {
                const set = (name, value) => { node.widgets.find(w => w.name === name).value = value }
                if (node.type in loaders) set(loaders[node.type], 'WanCore/tiny')
                if (node.type === 'WanCoreSampler') for (const [name, value] of Object.entries(small)) set(name, value)
            }
        }""",
        [LOADERS, {"steps": 2, "cfg": 1.0, "width": 96, "height": 64, "num_frames": 6, "seed": 77}],
    )
    editor.page.get_by_role("button", name="Run", exact=True).first.click()
    assert wait_for(lambda: "Rounded up to 96x64, 9 frames" in str(said) and said, every=0.2)
