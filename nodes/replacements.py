"""Nodes of kijai/ComfyUI-WanVideoWrapper that ComfyUI may offer to replace by ours where that pack is missing."""

from dataclasses import dataclass

from wan_core.catalog import Preset


@dataclass(frozen=True)
class Replacement:
    """One node of the other pack.

    Attributes:
        old, new: the ids of both nodes.
        widgets: the old node's widgets in their saved order, up to the last one that is read.
        inputs: from our input to the old node's.
        values: inputs of ours that the old node has no value for.
    """

    old: str
    new: str
    widgets: tuple[str, ...]
    inputs: dict[str, str]
    values: dict[str, object]

    def input_mapping(self) -> list[dict[str, object]]:
        """As ComfyUI's `NodeReplace` takes it."""
        taken: list[dict[str, object]] = [{"new_id": new, "old_id": old} for new, old in self.inputs.items()]
        return taken + [{"new_id": new, "set_value": value} for new, value in self.values.items()]


REPLACEMENTS = (
    Replacement("WanVideoModelLoader", "WanCoreModelLoader", ("model",), {"model": "model"}, {}),
    Replacement(
        "LoadWanVideoT5TextEncoder", "WanCoreTextEncoderLoader", ("model_name",), {"text_encoder": "model_name"}, {}
    ),
    Replacement("WanVideoVAELoader", "WanCoreVAELoader", ("model_name",), {"vae": "model_name"}, {}),
    Replacement(
        "LoadWanVideoClipTextEncoder", "WanCoreImageEncoderLoader", ("model_name",), {"image_encoder": "model_name"}, {}
    ),
    Replacement(
        "WanVideoTextEncode", "WanCoreTextEncode", ("positive_prompt", "negative_prompt"),
        {"text_encoder": "t5", "prompt": "positive_prompt", "negative_prompt": "negative_prompt"}, {},
    ),
    Replacement(
        "WanVideoSampler", "WanCoreSampler", ("steps", "cfg", "shift", "seed"),
        {
            "model": "model", "conditioning": "text_embeds", "steps": "steps", "cfg": "cfg", "shift": "shift",
            "seed": "seed",
        },
        {"solver": "unipc", "width": Preset.width, "height": Preset.height, "num_frames": Preset.num_frames},
    ),
    Replacement("WanVideoDecode", "WanCoreVAEDecode", (), {"vae": "vae", "latent": "samples"}, {}),
)  # fmt: skip
"""Those with a node of ours that takes the same. Pictures are given differently, see docs/coming-from.md."""
