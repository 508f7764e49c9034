"""comfy-cli makes the API form of each shipped workflow from the editor's form, and it is the one that is shipped."""

import json
from pathlib import Path

import pytest

from tools.templates import template
from wancore.headless.core_nodes import core_nodes
from wancore.headless.folders import Folders
from wancore.nodes import NODE_CLASS_MAPPINGS

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json"))
CLASSES = {**core_nodes(Folders()), **NODE_CLASS_MAPPINGS}


def object_info() -> dict:
    """What /object_info says of every class, as far as a converter reads it."""
    info = {}
    for name, cls in CLASSES.items():
        declared = cls.INPUT_TYPES()
        info[name] = {
            "input": declared,
            "input_order": {section: list(inputs) for section, inputs in declared.items()},
            "output": list(cls.RETURN_TYPES),
            "output_name": list(getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)),
            "name": name,
            "output_node": bool(getattr(cls, "OUTPUT_NODE", False)),
        }
    return json.loads(json.dumps(info))


@pytest.mark.parametrize("name", NAMES)
def test_comfy_cli_converts_a_workflow_into_its_twin(name):
    converter = pytest.importorskip("comfy_cli.workflow_to_api", reason="needs comfy-cli: pip install comfy-cli")
    editor_form, api_form = (
        json.loads((ROOT / "workflows" / file).read_text(encoding="utf-8"))
        for file in (f"{template(name)}.json", f"api/{name}.json")
    )
    converted = converter.convert_ui_to_api(editor_form, object_info())
    for key, node in converted.items():
        # Titles in the editor are names in the user's language.
        node["_meta"] = api_form[key]["_meta"]
    assert converted == api_form
