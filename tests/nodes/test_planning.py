"""What each node says of its part in a run, and that a planner needs to know no node by name."""

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.headless.overrides import apply_tiny
from wancore.headless.plan import planned_runs
from wancore.headless.schema import schemas_of
from wancore.headless.workflow import Workflow, WorkflowError
from wancore.nodes import NODE_CLASS_MAPPINGS, planning, sockets

API = Path(__file__).parents[2] / "workflows" / "api"
CLASSES = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}

COUNTED = {
    sockets.MODEL, sockets.TEXT_ENCODER, sockets.IMAGE_ENCODER, sockets.VAE, sockets.CONDITIONING, sockets.REFERENCES,
    sockets.CACHE, sockets.WINDOWS, sockets.PROMPTS, sockets.GUIDANCE, sockets.SCHEDULE, sockets.RUN, sockets.MEMORY,
    sockets.TRAINING_DATA, "LATENT",
}  # fmt: skip
"""Sockets whose values decide what a run takes."""

ENDS = {"WanCoreVAEDecode", "WanCoreTrainLora", "WanCoreTrainModel"}
"""Nodes that are planned, whose outputs others may make, too."""

NOT_PLANNED = {
    "WanCoreLoadLatents": "an earlier run made them",
    "WanCoreFromConditioning": "ComfyUI's own nodes decide what it holds",
    "WanCoreToConditioning": "ComfyUI's own samplers run it",
}


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_every_node_that_counts_can_be_planned_from_its_own_inputs(name):
    cls = NODE_CLASS_MAPPINGS[name]
    if name in NOT_PLANNED or not COUNTED & set(cls.RETURN_TYPES):
        assert not hasattr(cls, "plan_outputs") or name in ENDS
        return
    declared = cls.INPUT_TYPES()
    inspect.signature(cls.plan_outputs).bind(**declared["required"], **declared.get("optional", {}))


def tiny(name: str, **nodes: dict[str, Any]) -> Workflow:
    """A shipped workflow on the bundled models, with more nodes; an input `model` there replaces the sampler's."""
    prompt = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
    sampler = next(node for node in prompt.values() if node["class_type"] == "WanCoreSampler")
    for key, node in nodes.items():
        node["inputs"] = {"model": sampler["inputs"]["model"], **node.get("inputs", {})}
        sampler["inputs"]["model"] = [key, 0]
    return apply_tiny(Workflow.from_api(prompt | nodes), CLASSES)


class Renaming:
    """A node of another pack that is planned."""

    FUNCTION, CATEGORY, RETURN_TYPES = "run", "test", (sockets.MODEL,)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": (sockets.MODEL,)}, "optional": {"suffix": ("STRING", {"default": "!"})}}

    @classmethod
    def plan_outputs(cls, model: planning.PlannedModel, suffix: str) -> tuple[planning.PlannedModel]:
        return (replace(model, name=model.name + suffix),)

    def run(self, model: Any, suffix: str) -> tuple[Any]:
        return (model,)


def test_a_node_of_another_pack_is_planned_by_what_it_says():
    nodes = {**CLASSES, "Renaming": Renaming}
    ((job,), _) = planned_runs(tiny("t2v", other={"class_type": "Renaming"}), nodes, schemas_of(nodes))
    assert job.name == "WanCore/tiny!"
    assert job.decodes and set(job.modules) == {"video model", "text encoder", "VAE"}


@pytest.mark.parametrize("name", ["Renaming", "Unheard"])
def test_a_node_that_says_nothing_is_named(name, monkeypatch):
    monkeypatch.delattr(Renaming, "plan_outputs")
    nodes = {**CLASSES, "Renaming": Renaming}
    with pytest.raises(WorkflowError, match=f"Sampler.*: model comes from .*{name}.*cannot be planned"):
        planned_runs(tiny("t2v", other={"class_type": name}), nodes, schemas_of(nodes))


def test_a_loader_that_leads_nowhere_is_not_read():
    workflow = tiny("t2v")
    node = next(node for node in workflow.nodes.values() if node.class_type == "WanCoreModelLoader")
    lost = replace(node, id="lost", inputs={**node.inputs, "model": "lost.safetensors"})
    nodes = {**workflow.nodes, "lost": lost}
    assert len(planned_runs(replace(workflow, nodes=nodes), CLASSES, schemas_of(CLASSES))[0]) == 1
