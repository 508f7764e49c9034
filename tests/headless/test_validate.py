"""Bad workflows are refused before anything runs, in ComfyUI's words."""

import pytest

from wancore.headless.schema import InputSpec, ValidationError, schemas_of, validate
from wancore.headless.workflow import Workflow


def test_bad_workflow_is_refused_in_the_hosts_words(bad_case, bad_workflows, pack):
    case = bad_workflows[bad_case]
    with pytest.raises(ValidationError) as refused:
        validate(Workflow.from_api(case["prompt"]), schemas_of(pack.NODE_CLASS_MAPPINGS))
    issues = refused.value.issues
    found = [[issue.node.id if issue.node else None, issue.type, issue.message, issue.details] for issue in issues]
    assert [row[:3] for row in found] == [row[:3] for row in case["errors"]]
    for (*_, details), (*_, expected) in zip(found, case["errors"], strict=True):
        assert details.startswith(expected)
        assert str(refused.value).count(expected) >= 1


def test_constants_are_converted_to_the_declared_types(graph, pack):
    workflow = graph(n1=("Number", {"value": "7", "scale": 1, "label": 5}), n2=("Show", {"value": ["1", 0]}))
    inputs = validate(workflow, schemas_of(pack.NODE_CLASS_MAPPINGS)).nodes["1"].inputs
    assert [(type(value), value) for value in inputs.values()] == [(int, 7), (float, 1.0), (str, "5")]


def test_what_no_output_needs_is_not_checked(graph, pack):
    workflow = graph(n1=("Number", {"value": 1}), n2=("Show", {"value": ["1", 0]}), n3=("Number", {"value": -5}))
    assert validate(workflow, schemas_of(pack.NODE_CLASS_MAPPINGS)).nodes["3"].inputs["value"] == -5


def test_naming_an_input_in_validate_inputs_switches_off_its_range(graph, pack):
    workflow = graph(n1=("Checked", {"value": 9}), n2=("Show", {"value": ["1", 0]}))
    assert validate(workflow, schemas_of(pack.NODE_CLASS_MAPPINGS))


def test_unknown_input_is_ignored_with_a_warning(graph, pack, caplog):
    workflow = graph(n1=("Number", {"value": 1, "valu": 2, "upload": "image"}), n2=("Show", {"value": ["1", 0]}))
    validate(workflow, schemas_of(pack.NODE_CLASS_MAPPINGS))
    assert ["valu" in message for message in caplog.messages] == [True]


class AnyType(str):
    """The way packs wrote `any type` before ComfyUI had `*`."""

    __hash__ = str.__hash__

    def __ne__(self, other: object) -> bool:
        return False


@pytest.mark.parametrize(
    ("declared", "received", "accepted"),
    [
        ("IMAGE", "IMAGE", True),
        ("IMAGE", "MASK", False),
        ("INT,FLOAT", "FLOAT", True),
        ("INT, FLOAT", "STRING,FLOAT", True),
        ("INT,FLOAT", "STRING", False),
        ("*", "IMAGE", True),
        ("IMAGE", "*", True),
        (AnyType("*"), "IMAGE", True),
        ("IMAGE", AnyType("anything"), True),
        (["a", "b"], ["a", "b"], True),
        (["a", "b"], ["a"], False),
        (["a", "b"], "INT", False),
    ],
)
def test_link_types(declared, received, accepted):
    assert InputSpec.parse("x", (declared, {}), required=True).accepts(received) is accepted


@pytest.mark.parametrize("entry", [(["a", "b"], {}), ("COMBO", {"options": ["a", "b"]})])
def test_both_spellings_of_a_combo_give_its_choices(entry):
    spec = InputSpec.parse("x", entry, required=True)
    assert (spec.type, spec.choices) == ("COMBO", ("a", "b"))
