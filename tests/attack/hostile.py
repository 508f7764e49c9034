"""What hostile workflows are made of: values by the kind of widget, flags, and files that are broken as a whole."""

import json
from collections.abc import Iterator
from typing import Any

PATHS = ("{outside}/secret.txt", "../outside/secret.txt", "linked/../../outside/secret.txt", "~/secret.txt",
         "/etc/passwd", "/dev/zero", "/proc/self/environ", "\\\\evil\\share\\x.txt", "//evil/share/x.txt", "file:///etc/passwd",
         "http://127.0.0.1:9/x", "NUL", "CON.txt", "C:\\Windows\\win.ini", "../outside/secret.txt [output]",
         "secret.txt [temp]", "|touch x", "$(touch x)", "; touch x", "a\0b", "\ud800",
         "x" * 5000, "", ".", "..")  # fmt: skip

VALUES: dict[str, tuple[Any, ...]] = {
    "INT": (-1, 2**63, 10**400, float("nan"), float("inf"), "1e9", "x", [], {}, None, {"__value__": [1]}),
    "FLOAT": (float("nan"), float("-inf"), 1e300, -1e300, 10**400, "x", [1], {}, None),
    "BOOLEAN": ("false", [], {"__value__": "x"}),
    "COMBO": ("../outside/x", "__class__", 5, None, {"a": 1}, ["x", "y", "z"], {"__value__": ["x"]}, "x" * 5000),
    "STRING": (5, None, {"a": 1}, {"__value__": [1]}, "{0.__class__}%s%n", "a\0b", "\ud800", "9" * 20000, "." * 20000),
    "LINK": ("x", 1, None, True, {"samples": 1}, {"__value__": [1]}, ["it", 0], ["nowhere", 0],
             ["IMAGE", 2**70], ["it", -1]),
}  # fmt: skip
"""By the kind of a widget, and for sockets."""

_FOLDERS = (
    "{outside}/data",
    "{outside}",
    "{root}",
    "/",
    "~",
    "../outside/data",
    "linked/../../outside/data",
    "hostile",
    *PATHS,
)
_SAVED = (
    "{outside}/stolen",
    "../outside/stolen",
    "../../stolen",
    "/tmp/stolen",
    "~/stolen",
    "a/../../../stolen",
    *PATHS,
)

NAMED: dict[str, tuple[Any, ...]] = {
    "image": ("{outside}/start.png", "../outside/start.png", "~/start.png", *PATHS),
    "file": ("{outside}/kept_00001_.latent", "../outside/kept_00001_.latent", "{outside}/start.png", *PATHS),
    "folder": _FOLDERS,
    "metadata": ("{outside}/data/metadata.csv", "../../outside/data/metadata.csv", "../secret.txt", *PATHS),
    "run": ("{outside}/run", "../../../outside/run", "broken", *PATHS),
    "weights": ("{outside}/lora.safetensors", "../outside/lora.safetensors", "~/lora.safetensors", *PATHS),
    "name": _SAVED,
    "filename": _SAVED,
    "filename_prefix": _SAVED,
    "lora": ("{outside}/lora.safetensors", "../../outside/lora.safetensors", *PATHS),
    "second_lora": ("{outside}/lora.safetensors", "../../outside/lora.safetensors"),
    "vace_module": ("{outside}/lora.safetensors", "../../outside/lora.safetensors"),
    "adapter": ("{outside}/lora.safetensors", "../../outside/lora.safetensors"),
    "image_encoder": ("{outside}/lora.safetensors", "evil/repo"),
    "model": ("{outside}/lora.safetensors", "../../outside/lora.safetensors", "evil/repo"),
    "poses": ("1 " * 20000, "nan " * 19, "0 " * 18 + "1e999", "x"),
    "origin": ("1 " * 20000, "nan " * 19, "9" * 5000),
    "strength_curve": ("1 @ " + "1" * 30000 + "x", "nan", "1 @ 0.9-0.1", "1," * 20000),
    "blocks": ("0-" + "9" * 4000, "0-99999999999", "9" * 5000, "(a+)+$", "0=" + "1" * 30000 + "x"),
    "cfg": ("nan", "1," * 20000, "1e999"),
    "sigma_list": ("nan", "1,1", "1e999, 0", "1," * 20000),
    "extra_inputs": ("__class__", "input_image," * 2000, "camera_path,../x"),
    "gpus": (64, 65, 10**9),
    "lora_rank": (10**9, 5121),
    "dataset_repeat": (10**9,),
    "num_epochs": (10**9,),
    "batch_size": (2**62,),
}  # fmt: skip
"""By the name of a widget, or by `Class.name`."""

FLAGS = (
    "--optimizer transformers.pipeline --optimizer_args '{\"model\": \"{outside}\", \"trust_remote_code\": true}'",
    "--optimizer os.system", "--optimizer subprocess.Popen --optimizer_args args=id", "--optimizer builtins.exec",
    "--optimizer torch.hub.load", "--optimizer torch.optim.lr_scheduler.LambdaLR", "--optimizer AdamW",
    "--optimizer ''",
    "--optimizer_args '{\"lr\": 1e9}'", "--optimizer_args betas=/tmp/x", "--optimizer_args '" + "[" * 50000 + "'",
    "--optimizer_args '{\"a\": {\"b\": 1}}'", "--customized_optimizer webbrowser.open", "--cache_dir {outside}/cache",
    "--output_path {outside}/run", "--resume {outside}/run", "--resume ../../../outside/run",
    "--stop_file {outside}/stop",
    "--lora_checkpoint {outside}/lora.safetensors", "--dataset_base_path {outside}/data", "--dataset_base_path /",
    "--dataset_metadata_path {outside}/data/metadata.csv", "--tokenizer_path {outside}", "--log_with wandb",
    "--log_with tensorboard,wandb", "--model_id_with_origin_paths evil/repo:*.py", "--model_paths '[\"/etc/passwd\"]'",
    "--local_model_path {outside}", "--no-skip_download", "--skip_download", "--no-confined",
    "--config {outside}/c.json",
    "--help", "-h", "-hx", "--input_contains_end_image", "--lora_rank 1000000000", "--num_workers 100000",
    "--dataset_repeat 1000000000", "--num_epochs 1000000000", "--batch_size 1e9", "--learning_rate nan", "--seed -1",
    "--lora_target_modules '(a+)+$'", "--extra_inputs __class__", "--trainable_models os", "--data_file_keys ../x",
    "--remove_prefix_in_ckpt ../../x", "--task sft", "--preset_lora_path {outside}/lora.safetensors", "'unclosed",
    "@{outside}/secret.txt", "x" * 20000, "--" + "x" * 20000, "-", "--", "{outside}/secret.txt", "\\", "--a\0b",
)  # fmt: skip
"""For the text box of the training nodes."""

_IMAGE = {"class_type": "LoadImage", "inputs": {"image": "start.png"}}
_SAVE = {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "x"}}
_PLAIN = {"1": _IMAGE, "2": _SAVE}


def _with(**nodes: Any) -> str:
    return json.dumps({**_PLAIN, **{name.lstrip("n"): node for name, node in nodes.items()}})


def _nested(depth: int) -> str:
    deep = '{"a": ' * depth + "1" + "}" * depth
    return json.dumps(_PLAIN)[:-1] + ', "3": {"class_type": "PreviewImage", "inputs": {"images": ' + deep + "}}}"


def structural() -> Iterator[tuple[str, str | bytes]]:
    """(name, content) of files that are broken, or no workflow, or too much of one."""
    yield from ((f"nested {depth} deep", _nested(depth)) for depth in (10, 65, 900, 100_000))
    yield "lists in lists", "[" * 200_000
    for number, text in enumerate(("", "null", "[]", "{}", "1", '"x"', "not json", '{"1": ', '{"1": 1}', '{"1": []}')):
        yield f"no workflow {number}", text
    yield "UTF-16", json.dumps(_PLAIN).encode("utf-16")
    yield "bytes", bytes(range(256)) * 10
    yield "a byte order mark", b"\xef\xbb\xbf" + json.dumps(_PLAIN).encode()
    yield "a node twice", '{"1": {"class_type": "X"}, "1": {"class_type": "Y"}}'
    yield (
        "an input twice",
        '{"1": {"class_type": "LoadImage", "inputs": {"image": "start.png", "image": "/etc/passwd"}}}',
    )
    yield "5000 digits", '{"1": {"class_type": "LoadImage", "inputs": {"image": ' + "9" * 5000 + "}}}"
    yield "1e999", '{"1": {"class_type": "LoadImage", "inputs": {"image": 1e999}}}'
    yield (
        "a link to itself",
        _with(n2={"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "x"}}),
    )
    mask = {"class_type": "ImageToMask", "inputs": {"image": ["4", 0], "channel": "red"}}
    yield "a ring", _with(n3={**mask}, n4={**mask, "inputs": {**mask["inputs"], "image": ["3", 0]}},
                          n2={"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}})  # fmt: skip
    for slot in (-1, 99, 2**70, True, 0.5, "0", None):
        yield f"slot {slot!r}", _with(n2={"class_type": "PreviewImage", "inputs": {"images": ["1", slot]}})
    for link in (["1"], ["1", 0, 0], [1, 0], [["1", 0], 0], [], [None, None]):
        yield f"link {link!r}", _with(n2={"class_type": "PreviewImage", "inputs": {"images": link}})
    for name in ("__class__", "os.system", "LoadImage\0", "", "../LoadImage", "\ud800", "WanCoreSampler ", "eval"):
        yield f"class {name!r}", _with(n3={"class_type": name, "inputs": {}})
    for number, node in enumerate(({}, {"class_type": 5}, {"class_type": None}, {"class_type": ["x"]}, {"inputs": {}})):
        yield f"node {number}", _with(n3=node)
    for number, inputs in enumerate(([], "x", 5, None, [["image", "start.png"]])):
        yield f"inputs {number}", _with(n3={"class_type": "PreviewImage", "inputs": inputs})
    yield "a title of a megabyte", _with(n1={**_IMAGE, "_meta": {"title": "x" * 2**20}})
    yield "titles that are none", _with(n1={**_IMAGE, "_meta": {"title": {"a": [1]}}}, n3={**_IMAGE, "_meta": 5})
    yield "ids", json.dumps({"\ud800": _IMAGE, "": _IMAGE, "__proto__": _IMAGE, "2": _SAVE})
    yield "the editor's format", '{"nodes": [], "links": []}'
    yield "no output", json.dumps({"1": _IMAGE})
    yield "20000 nodes", json.dumps({"1": _IMAGE, **{f"s{n}": {"class_type": "ImageToMask", "inputs": {
        "image": ["1", 0], "channel": "red"}} for n in range(20_000)}, "2": _SAVE})  # fmt: skip
    yield (
        "5000 unknown nodes",
        json.dumps({str(n): {"class_type": f"WanCoreSampled{n}", "inputs": {}} for n in range(5000)}),
    )
    yield (
        "5000 unknown inputs",
        _with(n1={**_IMAGE, "inputs": {"image": "start.png", **{f"imag{n}": n for n in range(5000)}}}),
    )
    links = ({"images": ["i", 0], "references": [str(number - 1), 0]} for number in range(1, 3000))
    chain = {str(n): {"class_type": "WanCoreVaceReferences", "inputs": inputs} for n, inputs in enumerate(links, 1)}
    first = {"0": {"class_type": "WanCoreVaceReferences", "inputs": {"images": ["i", 0]}}, "i": _IMAGE}
    yield (
        "a chain of 3000",
        json.dumps({**first, **chain, "end": {"class_type": "AttackSink", "inputs": {"value": ["2999", 0]}}}),
    )
