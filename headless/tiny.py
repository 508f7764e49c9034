"""`--tiny`: the same workflow on the bundled tiny models, with small sizes and few steps."""

from collections.abc import Mapping

from .workflow import Workflow, WorkflowError


def apply_tiny(workflow: Workflow, nodes: Mapping[str, type]) -> Workflow:
    """The workflow with the inputs that each node's `tiny(inputs)` gives laid over its own.

    A node class has a tiny form when it has a classmethod `tiny`; it receives the node's inputs in API form.

    Raises:
        WorkflowError: no node of the workflow has a tiny form, so that it would run at full size.
    """
    prompt = workflow.to_api()
    changed = [node for node in workflow.nodes.values() if hasattr(nodes.get(node.class_type), "tiny")]
    if not changed:
        raise WorkflowError("--tiny: no node of this workflow has a tiny form; leave --tiny out.")
    return workflow.with_all({node.id: nodes[node.class_type].tiny(prompt[node.id]["inputs"]) for node in changed})
