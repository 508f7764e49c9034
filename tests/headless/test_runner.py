"""Execution follows ComfyUI's rules: order, lists, laziness, sharing, hidden inputs, release of results."""

import gc
import weakref

import pytest
import torch

from wan_core.runtime import Cancelled
from wancore.headless.runner import Kept, NodeError, run
from wancore.headless.schema import ValidationError


def number(value, **more):
    return ("Number", {"value": value, **more})


def show(source, slot=0):
    return ("Show", {"value": [source, slot]})


def values(result, node="9"):
    return result.ui[node]["values"]


def test_a_diamond_runs_each_node_once_after_its_inputs(graph, nodes, calls):
    workflow = graph(
        n9=show("4"),
        n4=("Add", {"a": ["2", 0], "b": ["3", 0]}),
        n3=("Add", {"a": ["1", 0], "b": ["1", 0]}),
        n2=number(5, scale=2.0, other=["1", 0]),
        n1=number(1),
    )
    assert values(run(workflow, nodes)) == [13]
    assert [name for name, _ in calls] == ["Number", "Number", "Add", "Add", "Show"]


def test_absent_optional_inputs_take_the_functions_own_defaults(graph, nodes, calls):
    run(graph(n1=number(1), n9=show("1")), nodes)
    assert calls[0][1]["label"] == "absent"


def test_nodes_run_in_inference_mode(graph, nodes, calls):
    run(graph(n1=number(1), n9=show("1")), nodes)
    assert calls[-1][1]["inference"] and not torch.is_inference_mode_enabled()


def test_hidden_inputs(graph, nodes):
    workflow = graph(n1=number(1), n9=show("1"))
    ui = run(workflow, nodes, extra_pnginfo={"workflow": {"x": 1}}).ui["9"]
    assert ui == {
        "values": [1],
        "ids": ["9"],
        "classes": ["HeadlessTestNumber", "HeadlessTestShow"],
        "extra": [{"workflow": {"x": 1}}],
    }


@pytest.mark.parametrize(
    ("specs", "expected"),
    [
        ({"n1": ("CountTo", {"n": 3}), "n9": show("1")}, [1, 2, 3]),
        ({"n1": ("CountTo", {"n": 3}), "n9": show("1", 1)}, [3]),
        (
            {
                "n1": ("CountTo", {"n": 3}),
                "n2": ("CountTo", {"n": 2}),
                "n3": ("Add", {"a": ["1", 0], "b": ["2", 0]}),
                "n9": show("3"),
            },
            [2, 4, 5],
        ),
        ({"n1": ("CountTo", {"n": 4}), "n2": ("Total", {"values": ["1", 0], "times": 10}), "n9": show("2")}, [100]),
        ({"n1": ("CountTo", {"n": 2}), "n2": ("CountTo", {"n": ["1", 0]}), "n9": show("2")}, [1, 1, 2]),
    ],
    ids=["mapped", "not a list", "shorter repeats its last", "taken whole", "lists joined"],
)
def test_lists(graph, nodes, specs, expected):
    assert values(run(graph(**specs), nodes)) == expected


@pytest.mark.parametrize(("condition", "expected", "ran"), [(True, 1, [1]), (False, 2, [2])])
def test_lazy_inputs_run_only_when_asked_for(graph, nodes, calls, condition, expected, ran):
    switch = ("Switch", {"condition": condition, "on_true": ["1", 0], "on_false": ["2", 0]})
    assert values(run(graph(n1=number(1), n2=number(2), n3=switch, n9=show("3")), nodes)) == [expected]
    assert [given["value"] for name, given in calls if name == "Number"] == ran


def test_lazy_condition_from_another_node(graph, nodes, calls):
    inner = ("Switch", {"condition": True, "on_true": ["1", 0], "on_false": ["2", 0]})
    outer = ("Switch", {"condition": ["1", 0], "on_true": ["3", 0], "on_false": ["2", 0]})
    nodes = {**nodes, "HeadlessTestSwitch": _any_condition(nodes["HeadlessTestSwitch"])}
    assert values(run(graph(n1=number(1), n2=number(2), n3=inner, n4=outer, n9=show("4")), nodes)) == [1]
    assert [given["value"] for name, given in calls if name == "Number"] == [1]


def _any_condition(switch):
    declared = switch.INPUT_TYPES()["required"] | {"condition": ("INT,BOOLEAN", {})}
    return type("Switch", (switch,), {"INPUT_TYPES": classmethod(lambda cls: {"required": declared})})


@pytest.mark.parametrize(
    ("first", "second", "executions"),
    [
        (number(1), number(1), 1),
        (number(1), number("1"), 1),
        (number(1), number(2), 2),
        (number(1), number(1, negate=False), 2),
        (("Always", {"value": 1}), ("Always", {"value": 1}), 2),
    ],
    ids=["equal", "equal after conversion", "other value", "default written out", "IS_CHANGED is NaN"],
)
def test_equal_nodes_share_one_execution(graph, nodes, calls, first, second, executions):
    workflow = graph(n1=first, n2=second, n3=("Add", {"a": ["1", 0], "b": ["2", 0]}), n9=show("3"))
    events = []
    run(workflow, nodes, on_event=events.append)
    assert len([name for name, _ in calls if name == first[0]]) == executions
    assert len([event for event in events if event.kind == "cached"]) == 2 - executions


def test_sharing_goes_down_the_graph_but_not_through_unique_ids(graph, nodes, calls):
    workflow = graph(
        n1=number(1),
        n2=number(1),
        n3=("Add", {"a": ["1", 0], "b": ["1", 0]}),
        n4=("Add", {"a": ["2", 0], "b": ["2", 0]}),
        n8=show("3"),
        n9=show("4"),
    )
    result = run(workflow, nodes)
    assert [name for name, _ in calls] == ["Number", "Add", "Show", "Show"]
    assert (result.ui["8"]["ids"], result.ui["9"]["ids"]) == (["8"], ["9"])


def test_later_runs_use_what_was_kept_and_only_that(graph, nodes, calls):
    def workflow(first, second):
        return graph(n1=number(first), n2=number(second), n3=("Add", {"a": ["1", 0], "b": ["2", 0]}), n9=show("3"))

    kept, keep = Kept(), ("1", "3", "9")
    ran = []
    for first, second in ((1, 2), (1, 3), (1, 3), (2, 3), (1, 3)):
        calls.clear()
        events = []
        result = run(workflow(first, second), nodes, kept=kept, keep=keep, on_event=events.append)
        assert values(result) == [first + second]
        cached = "".join(event.node.id for event in events if event.kind == "cached")
        ran.append((cached, [name for name, _ in calls]))
        assert len(kept.results) == 2, "what a run has no use for is dropped, and what saves files is never kept"
    add = ["Number", "Add", "Show"]
    assert ran == [("", ["Number", *add]), ("1", add), ("13", ["Show"]), ("", ["Number", *add]), ("", ["Number", *add])]
    never = graph(n1=("Always", {"value": 1}), n3=("Add", {"a": ["1", 0], "b": ["1", 0]}), n9=show("3"))
    run(never, nodes, kept=kept, keep=keep)
    assert not kept.results, "IS_CHANGED is NaN, so nothing below is the same in another run"


def test_results_are_released_after_their_last_use(graph, nodes):
    alive = []
    born = []

    class Watched(nodes["HeadlessTestPlain"]):
        def run(self, **inputs):
            (image,) = super().run(**inputs)
            born.append(weakref.ref(image))
            return (image,)

    class Last(nodes["HeadlessTestShow"]):
        def run(self, **inputs):
            gc.collect()
            alive.append(born[0]() is not None)
            return super().run(**inputs)

    nodes = {**nodes, "HeadlessTestPlain": Watched, "HeadlessTestShow": Last}
    image = ("Plain", {"width": 8, "height": 8, "frames": 3, "level": 0.5})
    workflow = graph(n1=image, n2=("PassImage", {"image": ["1", 0]}), n9=show("2", 1))
    assert values(run(workflow, nodes)) == [3]
    assert alive == [False]


def test_a_failing_node_is_named_and_its_exception_chained(graph, nodes):
    workflow = graph(n1=("Fail", {"reason": "no luck"}), n9=show("1"))
    with pytest.raises(NodeError, match="#1 HeadlessTestFail failed: KeyError: 'no luck'") as failed:
        run(workflow, nodes)
    assert isinstance(failed.value.__cause__, KeyError)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Cancelled])
def test_stopping_is_not_a_nodes_failure(graph, nodes, stop):
    class Stop(nodes["HeadlessTestNumber"]):
        def run(self, **_):
            raise stop

    with pytest.raises(stop):
        run(graph(n1=number(1), n9=show("1")), {**nodes, "HeadlessTestNumber": Stop})


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ((1, 2), "failed: it returned 2 values for its 1 outputs"),
        (None, "it returned 0 values for its 1 outputs"),
        (5, "it returned int for its 1 outputs"),
        ({"ui": {}}, "it returned 0 values for its 1 outputs"),
        ({"expand": {}, "result": ()}, "use --server"),
    ],
)
def test_a_wrong_return_is_a_failure_of_that_node(graph, nodes, returned, words):
    wrong = type("Wrong", (nodes["HeadlessTestNumber"],), {"run": lambda self, **_: returned})
    with pytest.raises(NodeError, match=words):
        run(graph(n1=number(1), n9=show("1")), {**nodes, "HeadlessTestNumber": wrong})


def test_ui_and_result_together(graph, nodes):
    both = {"ui": {"note": ["seen"]}, "result": (7,)}
    cls = type("Both", (nodes["HeadlessTestNumber"],), {"run": lambda self, **_: both, "OUTPUT_NODE": True})
    result = run(graph(n1=number(1), n9=show("1")), {**nodes, "HeadlessTestNumber": cls})
    assert result.ui["1"] == {"note": ["seen"]} and values(result) == [7]


def test_nothing_runs_when_one_branch_is_invalid(graph, nodes, calls):
    with pytest.raises(ValidationError):
        run(graph(n1=number(1), n2=number(-1), n8=show("1"), n9=show("2")), nodes)
    assert calls == []


def test_start_events_count_up_to_the_number_of_nodes(graph, nodes):
    events = []
    run(
        graph(n1=number(1), n2=number(2), n3=("Add", {"a": ["1", 0], "b": ["2", 0]}), n9=show("3")),
        nodes,
        on_event=events.append,
    )
    assert [(event.kind, event.node.id, event.done, event.total) for event in events] == [
        ("start", "1", 1, 4),
        ("start", "2", 2, 4),
        ("start", "3", 3, 4),
        ("start", "9", 4, 4),
    ]
