"""LoRA files that are damaged or hostile: one error that names the file, in little time and memory."""

import json
import time

import pytest
import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from wan_core.lora.patches import LowRank
from wan_core.lora.read import ADAPTER_METADATA, AdapterConfig
from wan_core.lora.target import lora_file_report, open_lora

PATH = "diffusion_model.blocks.0.self_attn.q"
FACTORS = {f"{PATH}.lora_A.weight": torch.ones(2, 8), f"{PATH}.lora_B.weight": torch.ones(8, 2)}


def save(folder, tensors, metadata=None):
    save_file(tensors, folder / "bad.safetensors", metadata)
    return folder / "bad.safetensors"


PATTERNS = (
    "q", "self_attn.q", "attn.q", r"blocks\.\d+\.self_attn\.q", "^blocks.0.self_attn.q", "^self_attn.q", ".*q", "q$",
    "blocks.[01].self_attn.(q|k)", "blocks_0_self_attn_q", "k", "", r"(.*)\.q", "ffn.0", "self_attn.q.*",
)  # fmt: skip


@pytest.mark.parametrize("path", ["blocks.0.self_attn.q", "blocks.1.self_attn.q", "blocks.10.self_attn.qk", "ffn.0"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_match_as_in_peft(path, pattern):
    found = AdapterConfig({"r": 4, "lora_alpha": 4, "alpha_pattern": {pattern: 8}}).scale(path)
    assert found == (2.0 if get_pattern_key([pattern], path) == pattern else 1.0)


def test_the_first_pattern_counts():
    config = AdapterConfig({"r": 4, "lora_alpha": 4, "rank_pattern": {"k": 1, "q": 2, "self_attn.q": 8}})
    assert config.scale("blocks.0.self_attn.q") == 2.0


SLOW = (
    "(" * 15 + "." + "*)" * 15 + "x", "(a|.)*" * 12 + "x", r"(?:(?:\w?){90}){90}x", ".*" * 240 + "x",
    "(.|.)*" * 60 + "y", r"(\w+\.?)+!", "(?:.?){200}" * 40 + "z",
)  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
def test_no_pattern_takes_long(tmp_path, pattern):
    tensors = {key.replace(".0.", f".{n}."): t.clone() for n in range(30) for key, t in FACTORS.items()}
    patterns = {pattern + str(n): n for n in range(9)}
    told = {ADAPTER_METADATA: json.dumps({"transformer.r": 2, "transformer.rank_pattern": patterns})}
    started = time.thread_time()
    try:
        open_lora(save(tmp_path, tensors, told))
    except ValueError as error:
        assert "bad.safetensors" in str(error) and "rank_pattern" in str(error)
    assert time.thread_time() - started < 8


VALUES = {
    "text as rank": ({"r": "8", "lora_alpha": 1}, "r must be a number"),
    "list as alpha": ({"r": 8, "lora_alpha": [1]}, "lora_alpha must be a number"),
    "infinite": ({"r": 8, "lora_alpha": 1e400}, "lora_alpha must be a number"),
    "endless": ({"r": 10**300}, "r must be a number"),
    "negative": ({"r": -8, "lora_alpha": 8}, "r must be a number"),
    "patterns in a list": ({"r": 8, "rank_pattern": ["q"]}, "rank_pattern must be an object"),
    "text in a pattern": ({"r": 8, "alpha_pattern": {"q": "8"}}, r"alpha_pattern\['q'\] must be a number"),
    "no pattern": ({"r": 8, "lora_alpha": 8, "rank_pattern": {"(": 2}}, "cannot be used"),
    "too long": ({"r": 8, "lora_alpha": 8, "rank_pattern": {"q" * 4000: 2}}, "has a pattern of 4000 characters"),
    "recursion": ({"r": 8, "lora_alpha": 8, "rank_pattern": {"(?R)": 2}}, "cannot be used"),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("peft", [False, True])
def test_wrong_configurations(tmp_path, name, peft):
    values, message = VALUES[name]
    if peft:
        (tmp_path / "adapter_config.json").write_text(json.dumps(values))
        file = save(tmp_path, FACTORS).rename(tmp_path / "adapter_model.safetensors")
    else:
        told = json.dumps({f"transformer.{name}": value for name, value in values.items()})
        file = save(tmp_path, FACTORS, {ADAPTER_METADATA: told})
    with pytest.raises(ValueError, match=message) as error:
        open_lora(file)
    assert "adapter" in str(error.value) or "bad.safetensors" in str(error.value)


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "3", "null", '"a"', "{", "\0"])
def test_configurations_that_are_no_objects(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json is no configuration of PEFT"):
        open_lora(save(tmp_path, FACTORS).rename(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"bad\.safetensors.*lora_adapter_metadata"):
        open_lora(save(tmp_path, FACTORS, {ADAPTER_METADATA: text}))


def lokr(rows, columns):
    made = {"lokr_w1": torch.ones(1, 1), "lokr_w2_a": torch.ones(rows, 1), "lokr_w2_b": torch.ones(1, columns)}
    return {f"{PATH}.{role}": tensor for role, tensor in made.items()}


def loha(rows, columns):
    sides = {"a": (rows, 1), "b": (1, columns)}
    return {f"{PATH}.hada_w{n}_{side}": torch.ones(shape) for n in (1, 2) for side, shape in sides.items()}


TENSORS = {
    "scalar factor": FACTORS | {f"{PATH}.lora_A.weight": torch.tensor(1.0)},
    "vector factor": FACTORS | {f"{PATH}.lora_B.weight": torch.ones(2)},
    "empty": FACTORS | {f"{PATH}.lora_A.weight": torch.ones(0, 8)},
    "kernels that differ": FACTORS | {f"{PATH}.lora_B.weight": torch.ones(8, 2, 3, 3)},
    "core of another rank": FACTORS | {f"{PATH}.lora_mid.weight": torch.ones(3, 3, 1)},
    "many alphas": FACTORS | {f"{PATH}.alpha": torch.ones(3)},
    "alpha NaN": FACTORS | {f"{PATH}.alpha": torch.tensor(float("nan"))},
    "alpha infinite": FACTORS | {f"{PATH}.alpha": torch.tensor(float("inf"))},
    "many scalars": FACTORS | {f"{PATH}.scalar": torch.ones(3)},
    "magnitude of another size": FACTORS | {f"{PATH}.dora_scale": torch.ones(3, 5)},
    "magnitude without axes": FACTORS | {f"{PATH}.dora_scale": torch.ones(())},
    "LoKr that unfolds": lokr(2**18, 2**18),
    "LoHa that unfolds": loha(2**18, 2**18),
    "LoKr of vectors": {key: tensor.flatten() for key, tensor in lokr(4, 4).items()},
    "LoHa of scalars": {key: torch.tensor(1.0) for key in loha(1, 1)},
    "LoRA that unfolds": {f"{PATH}.lora_A.weight": torch.ones(1, 2**20), f"{PATH}.lora_B.weight": torch.ones(2**20, 1)},
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_that_do_not_fit(tmp_path, name):
    with pytest.raises(ValueError, match=r"bad\.safetensors is damaged at blocks\.0\.self_attn\.q"):
        open_lora(save(tmp_path, TENSORS[name]))


def test_a_rank_above_the_matrix_costs_no_square_of_it():
    torch.manual_seed(0)
    patch = LowRank(torch.randn(2**17, 2), torch.randn(3, 2**17), scale=0.5)
    assert patch.norm() == pytest.approx(torch.linalg.vector_norm(0.5 * patch.up @ patch.down).item(), rel=1e-4)


def test_names_of_strangers(tmp_path):
    name = "lora_unet_" + "9" * 400 + "layers." * 9
    assert lora_file_report(open_lora(save(tmp_path, FACTORS | {f"{name}.lora_A.weight": torch.ones(1, 1)})))
