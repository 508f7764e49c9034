"""A small node pack in ComfyUI's class-attribute form, for runs in this process and on a real server."""

import gc
import time
from pathlib import Path

import torch

CALLS = []
"""(class name, arguments) of every execution since it was last cleared."""


class Number:
    CATEGORY = "test"
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("INT", {"default": 1, "min": 0, "max": 100})},
            "optional": {
                "scale": ("FLOAT", {"default": 1.0, "min": 0.5, "max": 2.0}),
                "mode": (["plain", "double"], {"default": "plain"}),
                "negate": ("BOOLEAN", {"default": False}),
                "label": ("STRING", {"default": "", "multiline": True}),
                "other": ("INT", {"forceInput": True}),
            },
        }

    def run(self, value, scale=1.0, mode="plain", negate=False, label="absent", other=0):
        CALLS.append(("Number", {"value": value, "scale": scale, "mode": mode, "negate": negate, "label": label}))
        return (int(value * scale) * (2 if mode == "double" else 1) * (-1 if negate else 1) + other,)


class Text:
    CATEGORY = "test"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"default": ""})}}

    def run(self, text):
        return (text,)


class Add:
    CATEGORY = "test"
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"a": ("INT", {"forceInput": True}), "b": ("INT,FLOAT", {"forceInput": True})}}

    def run(self, a, b):
        CALLS.append(("Add", {"a": a, "b": b}))
        return (a + b,)


class CountTo:
    """A list output: 1 ... n."""

    CATEGORY = "test"
    RETURN_TYPES = ("INT", "INT")
    OUTPUT_IS_LIST = (True, False)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"n": ("INT", {"default": 3})}}

    def run(self, n):
        return list(range(1, n + 1)), n


class Total:
    """Takes lists whole."""

    CATEGORY = "test"
    RETURN_TYPES = ("INT",)
    INPUT_IS_LIST = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"values": ("INT", {"forceInput": True}), "times": ("INT", {"default": 1})}}

    def run(self, values, times):
        CALLS.append(("Total", {"values": values, "times": times}))
        return (sum(values) * times[0],)


class Switch:
    CATEGORY = "test"
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        lazy = ("INT", {"forceInput": True, "lazy": True})
        return {"required": {"condition": ("BOOLEAN", {"default": True}), "on_true": lazy, "on_false": lazy}}

    def check_lazy_status(self, condition, on_true=None, on_false=None):
        wanted, value = ("on_true", on_true) if condition else ("on_false", on_false)
        return [wanted] if value is None else []

    def run(self, condition, on_true=None, on_false=None):
        return (on_true if condition else on_false,)


class Always:
    """Never equal to itself."""

    CATEGORY = "test"
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1})}}

    @classmethod
    def IS_CHANGED(cls, value):
        return float("nan")

    def run(self, value):
        CALLS.append(("Always", {"value": value}))
        return (value,)


class Checked:
    """Has a say in its own validation, also about what is linked."""

    CATEGORY = "test"
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"value": ("INT", {"default": 1, "max": 3})},
            "optional": {"anything": ("INT", {"forceInput": True}), "kind": (["a"], {})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, value, input_types, kind="a"):
        if value == 13:
            raise RuntimeError("the check itself failed")
        if "STRING" in input_types.values():
            return "anything may not be text"
        return True if value < 10 else "value must be below 10"

    def run(self, value, anything=None, kind="a"):
        return (value,)


class Fail:
    CATEGORY = "test"
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"reason": ("STRING", {"default": "it broke"})}}

    def run(self, reason):
        raise KeyError(reason)


class Slow:
    """Reports `steps` steps of a twentieth of a second each; on a server it can be interrupted at every step."""

    CATEGORY = "test"
    RETURN_TYPES = ("INT",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"steps": ("INT", {"default": 4, "max": 100000})}}

    def run(self, steps):
        from comfy.utils import ProgressBar

        bar = ProgressBar(steps)
        for _ in range(steps):
            time.sleep(0.05)
            bar.update(1)
        return (steps,)


class Plain:
    """An image of one grey, and its own small variant for --tiny."""

    CATEGORY = "test"
    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        size = ("INT", {"default": 64, "min": 2, "max": 4096})
        level = ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0})
        return {"required": {"width": size, "height": size, "frames": ("INT", {"default": 1}), "level": level}}

    @classmethod
    def tiny(cls, inputs):
        return {"width": min(inputs["width"], 16), "height": 8}

    def run(self, width, height, frames, level):
        return (torch.full((frames, height, width, 3), level),)


class Show:
    """The output node: shows a value and what the host hid in its inputs."""

    CATEGORY = "test"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        hidden = {"prompt": "PROMPT", "extra": "EXTRA_PNGINFO", "unique_id": "UNIQUE_ID", "graph": "DYNPROMPT"}
        return {"required": {"value": ("INT,STRING,FLOAT", {"forceInput": True})}, "hidden": hidden}

    def run(self, value, prompt, extra, unique_id, graph):
        CALLS.append(("Show", {"value": value, "inference": torch.is_inference_mode_enabled()}))
        classes = sorted(graph.get_node(node_id)["class_type"] for node_id in prompt)
        return {"ui": {"values": [value], "ids": [unique_id], "classes": classes, "extra": [extra]}}


class Sink:
    """Takes anything, so that whatever is before it runs."""

    CATEGORY = "test"
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("*",)}}

    def run(self, value):
        return {}


class PassImage:
    """Image in, the folder-free part of its contract out; used to keep a tensor alive for one more step."""

    CATEGORY = "test"
    RETURN_TYPES = ("IMAGE", "INT")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"image": ("IMAGE",)}}

    def run(self, image):
        return image + 0, image.shape[0]


class Living:
    """How many objects of each of some classes are there, over all of the process."""

    CATEGORY = "test"
    RETURN_TYPES = ("STRING",)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"names": ("STRING", {"default": ""})}}

    @classmethod
    def IS_CHANGED(cls, names):
        return float("nan")

    def run(self, names):
        kinds = [type(thing).__name__ for thing in gc.get_objects()]
        return (" ".join(str(kinds.count(name)) for name in names.split()),)


class Conditions:
    """Native conditioning of random text, and random image tokens, at the widths that ComfyUI's Wan classes have."""

    CATEGORY = "test"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "CLIP_VISION_OUTPUT")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": ("INT", {"default": 1})}}

    def run(self, seed):
        import comfy.clip_vision

        draws = torch.Generator().manual_seed(seed)
        tokens = comfy.clip_vision.Output()
        tokens.penultimate_hidden_states = torch.randn(1, 257, 1280, generator=draws)
        texts = (torch.randn(1, 512, 4096, generator=draws) for _ in range(2))
        return (*([[text, {"pooled_output": None}]] for text in texts), tokens)


class Apart:
    """The largest difference of two tensors, images or latents."""

    CATEGORY = "test"
    RETURN_TYPES = ("FLOAT", "FLOAT")
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"first": ("IMAGE,LATENT",), "second": ("IMAGE,LATENT",)}}

    def run(self, first, second):
        first, second = (value["samples"] if isinstance(value, dict) else value for value in (first, second))
        if first.shape != second.shape:
            raise ValueError(f"{tuple(first.shape)} and {tuple(second.shape)}")
        return (first - second).abs().max().item(), first.std().item()


_PREFIX = "HeadlessTest"
_NODES = (
    Number, Text, Add, CountTo, Total, Switch, Always, Checked, Fail, Slow, Plain, Show, Sink, PassImage, Living,
    Conditions, Apart,
)  # fmt: skip
NODE_CLASS_MAPPINGS = {_PREFIX + node.__name__: node for node in _NODES}
FOLDER = Path(__file__).parent
