"""Reading API-format files, and `--set`."""

import json

import pytest

from wancore.headless.overrides import apply_measure, apply_sets, apply_tiny
from wancore.headless.schema import schemas_of
from wancore.headless.workflow import Link, Workflow, WorkflowError

PROMPT = {
    "1": {"class_type": "HeadlessTestNumber", "inputs": {"value": 1}, "_meta": {"title": "Wan 2.1 number"}},
    "2": {"class_type": "HeadlessTestNumber", "inputs": {"value": ["1", 0]}, "_meta": {"title": "Twice"}},
    "3": {"class_type": "HeadlessTestNumber", "inputs": {"value": 3}, "_meta": {"title": "twice"}},
    "4": {"class_type": "HeadlessTestShow", "inputs": {"value": ["2", 0]}, "_meta": {"title": "Same"}},
    "5": {"class_type": "HeadlessTestShow", "inputs": {"value": ["3", 0]}, "_meta": {"title": "Same"}},
    "6": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
    "8": {"class_type": "HeadlessTestChecked", "inputs": {"value": 1}},
    "7": {"class_type": "NotInstalled", "inputs": {"nested.size": 4, "ratio": 0.5, "on": True, "name": "x"}},
}


@pytest.fixture
def workflow() -> Workflow:
    return Workflow.from_api(PROMPT)


def test_api_file_round_trips(tmp_path, workflow):
    path = tmp_path / "workflow.json"
    path.write_text(json.dumps(PROMPT))
    loaded = Workflow.load(path)
    assert loaded == workflow
    assert loaded.nodes["2"].inputs["value"] == Link("1", 0)
    assert loaded.nodes["6"].title == "LoadImage"
    assert loaded.to_api() == {
        node_id: {"_meta": {"title": node["class_type"]}, **node} for node_id, node in PROMPT.items()
    }


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "Cannot read the workflow"),
        ("{", "is not valid JSON"),
        (b"\xff\xfe{", "not UTF-8"),
        ("[]", "not a ComfyUI workflow in API format"),
        ("{}", "not a ComfyUI workflow in API format"),
        ('{"1": 5}', "not a ComfyUI workflow in API format"),
        ('{"nodes": [], "links": [], "version": 0.4}', "editor's format.*workflows/api"),
        ('{"8": {"inputs": {}}}', "missing the class_type property.*#8"),
        ('{"8": {"class_type": "X", "inputs": []}}', "#8.*inputs must be an object"),
    ],
)
def test_unreadable_files_are_named_for_what_they_are(tmp_path, content, words):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(WorkflowError, match=words):
        Workflow.load(path)


@pytest.mark.parametrize(
    ("text", "node", "name", "value"),
    [
        ("1.value=7", "1", "value", 7),
        ("Wan 2.1 number.scale=1.5", "1", "scale", 1.5),
        ("wan 2.1 NUMBER.mode=double", "1", "mode", "double"),
        ("Twice.value=9", "2", "value", 9),
        ("twice.negate=yes", "3", "negate", True),
        ("1.negate=False", "1", "negate", False),
        ("1.label=a=b.c\n", "1", "label", "a=b.c\n"),
        ("1.label=", "1", "label", ""),
        ("LoadImage.image=not there.png", "6", "image", "not there.png"),
        ("8.kind=a model that its own check knows", "8", "kind", "a model that its own check knows"),
        ("7.nested.size=8", "7", "nested.size", 8),
        ("7.ratio=2", "7", "ratio", 2.0),
        ("7.on=off", "7", "on", False),
        ("7.name=5", "7", "name", "5"),
    ],
)
def test_set_reads_the_value_as_the_declared_type(workflow, nodes, text, node, name, value):
    changed = apply_sets(workflow, [text], schemas_of(nodes)).nodes[node].inputs[name]
    assert (type(changed), changed) == (type(value), value)
    assert workflow.to_api() == Workflow.from_api(PROMPT).to_api()


def test_later_sets_win(workflow, nodes):
    assert apply_sets(workflow, ["1.value=2", "1.value=3"], schemas_of(nodes)).nodes["1"].inputs["value"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1.value", "expected <node title or id>.<input>=<value>"),
        ("value=1", "expected <node title or id>.<input>=<value>"),
        ("Twcie.value=1", "no node has the title or id 'Twcie'. Titles: Twice, "),
        ("Same.value=1", "2 nodes have this title; use one of their ids: 4, 5"),
        ("TWICE.value=1", "2 nodes have this title; use one of their ids: 2, 3"),
        ("1.vlaue=1", "has no input 'vlaue'. It has: value, "),
        ("1.value=1.5", "value expects a whole number, not '1.5'"),
        ("1.scale=nan", "scale expects a finite number, not 'nan'"),
        ("1.scale=wide", "scale expects a finite number, not 'wide'"),
        ("1.negate=maybe", "negate expects true or false, not 'maybe'"),
        ("1.mode=duoble", "'duoble' is not one of: double, plain"),
        ("4.value=1", "takes a INT,STRING,FLOAT from another node"),
    ],
)
def test_bad_set_says_what_is_known(workflow, nodes, text, words):
    with pytest.raises(WorkflowError) as refused:
        apply_sets(workflow, [text], schemas_of(nodes))
    assert words in str(refused.value)


def test_tiny_lays_the_nodes_own_small_inputs_over(graph, nodes):
    workflow = graph(n1=("Plain", {"width": 64, "height": 64, "frames": 2, "level": 0.5}))
    assert dict(apply_tiny(workflow, nodes).nodes["1"].inputs) == {"width": 16, "height": 8, "frames": 2, "level": 0.5}


def test_tiny_refuses_to_run_at_full_size(graph, nodes):
    with pytest.raises(WorkflowError, match="no node of this workflow has a tiny form"):
        apply_tiny(graph(n1=("Number", {"value": 1})), nodes)


def test_measure_puts_a_measuring_cache_on_every_sampler(graph):
    samplers = {"1": {"steps": 4, "cache": ["3", 0]}, "2": {"steps": 8}}
    nodes = {name: {"class_type": "WanCoreSampler", "inputs": inputs} for name, inputs in samplers.items()}
    prompt = apply_measure(Workflow.from_api(nodes)).to_api()
    *_, name = prompt
    assert prompt[name]["inputs"]["template"] == "measure"
    assert [prompt[node]["inputs"]["cache"] for node in samplers] == [[name, 0]] * 2
    with pytest.raises(WorkflowError, match="has no Sampler"):
        apply_measure(graph(n1=("Number", {"value": 1})))


def nested(depth: int) -> str:
    return '{"1": {"class_type": "X", "inputs": {"a": ' + "[" * depth + "]" * depth + "}}}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested(100), "nested more than 64 deep"),
        (nested(200_000), "nested too deeply"),
        ('{"1": {"class_type": "X"}, "1": {"class_type": "Y"}}', "has '1' twice"),
        ('{"1": {"class_type": "X", "inputs": {"a": 1, "a": 2}}}', "has 'a' twice"),
        ('{"1": {"class_type": "X", "inputs": {"a": "\\u0000"}}}', "cannot be written"),
        ('{"1": {"class_type": "X", "inputs": {"\\ud800": 1}}}', "cannot be written"),
        ('{"1": {"class_type": "X", "inputs": {"a": ' + "9" * 5000 + "}}}", "not valid JSON"),
        ("", "not valid JSON"),
    ],
    ids=range(8),
)
def test_hostile_files_are_refused_by_name(tmp_path, text, message):
    (tmp_path / "w.json").write_text(text)
    with pytest.raises(WorkflowError, match=message):
        Workflow.load(tmp_path / "w.json")
