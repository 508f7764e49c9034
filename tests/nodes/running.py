"""A node run as ComfyUI runs it."""

from typing import Any

import torch

from wancore.nodes import NODE_CLASS_MAPPINGS


def outputs(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """What the node gives on its sockets."""
    cls = NODE_CLASS_MAPPINGS[node_id]
    with torch.inference_mode():
        result = getattr(cls(), cls.FUNCTION)(**inputs)
    return result["result"] if isinstance(result, dict) else result
