"""What a run takes by count, against a run; and the settings that fit."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from wan_core import bundled
from wan_core.model import VideoModel
from wan_core.models import attention
from wan_core.models.dit import WanDiT
from wan_core.offload.blocks import weights_of
from wan_core.planning.estimate import LiveBytes
from wan_core.types import Conditioning
from wan_core.variants import match_variant
from wancore.trainer.config import TrainConfig
from wancore.trainer.model import trainable
from wancore.trainer.model.memory import ATTENTION
from wancore.trainer.model.trainable import Denoiser, Trainables
from wancore.trainer.objective import Noising
from wancore.trainer.run.counting import Inputs, run_pass, tensors_of, whole_pass, without_gradients
from wancore.trainer.run.estimate import WAYS, Estimator

LORA = TrainConfig(lora_base_model="dit", lora_rank=4)
WHOLE = TrainConfig(trainable_models=("dit",))
SHAPE = (16, 3, 16, 16)
BLOCKS = 4
"""The count looks at two and three of them."""


def trainables(config: TrainConfig, blocks: int = BLOCKS, device: str = "cpu") -> Trainables:
    torch.manual_seed(0)
    sizes = replace(bundled.DITS["t2v"], dim=128, ffn_dim=256, num_layers=blocks)
    with torch.device(device):
        dit = WanDiT(sizes).to(torch.float32 if config.mixed_precision == "no" else torch.bfloat16)
    if device == "cpu":
        for weight in dit.parameters():
            torch.nn.init.normal_(weight, std=0.05)
    return trainable.prepare(VideoModel.of(dit, match_variant(sizes), None, "small", None), config)


def inputs(module: Denoiser) -> Inputs:
    latents, noise = torch.randn(1, *SHAPE), torch.randn(1, *SHAPE)
    half = torch.full((1,), 0.5)
    cond = Conditioning(text=torch.randn(1, 512, module.dit.config.text_dim))
    return Inputs(latents, Noising(noise, half, 1000 * half, half), cond)


WAYS_TO_RUN = {
    "no checkpointing": {"use_gradient_checkpointing": False},
    "checkpointing": {"gradient_checkpointing_keeps": "inputs"},
    "attention kept": {"gradient_checkpointing_keeps": "attention"},
}


@pytest.mark.parametrize(
    ("way", "trained", "precision"),
    [
        ("no checkpointing", LORA, "bf16"),
        ("no checkpointing", WHOLE, "no"),
        ("checkpointing", LORA, "no"),
        ("checkpointing", WHOLE, "bf16"),
        ("attention kept", LORA, "bf16"),
    ],
)
def test_the_count_is_the_peak_of_a_run(
    way: str, trained: TrainConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The form that other devices than CPUs take, which is counted.
    monkeypatch.setattr(attention, "_rotate_complex", attention.rotate)
    config = replace(trained, mixed_precision=precision, **WAYS_TO_RUN[way])
    module = trainables(config).module
    given = inputs(module)
    with LiveBytes("cpu", (*weights_of(module).values(), *tensors_of(given))) as live, without_gradients(module):
        run_pass(module, given, config)
    counted, _ = whole_pass(module, SHAPE, config, cuda=False)
    assert counted.peak == pytest.approx(live.peak, rel=0.03)


class Calls(TorchDispatchMode):
    """Counts the calls of attention among the video's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in ATTENTION and args[0].shape[-2] == args[1].shape[-2]:
            self.found["attention"] += 1
        return func(*args, **(kwargs or {}))


def test_kept_attention_is_not_computed_twice_and_changes_no_gradient() -> None:
    found: dict[str, dict[str, Tensor]] = {}
    calls = {}
    for way, changes in WAYS_TO_RUN.items():
        config = replace(LORA, **changes)
        module = trainables(config).module
        for name, weight in module.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.02)
        with Calls() as counter:
            run_pass(module, inputs(module), config)
        calls[way] = counter.found["attention"]
        found[way] = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert calls == {"no checkpointing": BLOCKS, "checkpointing": 2 * BLOCKS, "attention kept": BLOCKS}
    for gradients in found.values():
        assert gradients.keys() == found["checkpointing"].keys()
        assert all(torch.equal(gradients[name], found["checkpointing"][name]) for name in gradients)


def test_host_memory_keeps_the_tokens_of_every_block() -> None:
    config = replace(LORA, use_gradient_checkpointing_offload=True)
    module = trainables(config, device="meta").module
    needs = Estimator(trainables(config, device="meta"), [SHAPE]).needs(config)
    tokens, width = 3 * 8 * 8, module.dit.config.dim
    assert needs.tokens == tokens
    # What blocks share (modulation, text, rotation) is kept once per block, too.
    assert BLOCKS * tokens * width * 2 <= needs.host <= 1.1 * BLOCKS * tokens * width * 2


def test_settings_are_the_fastest_that_fit() -> None:
    memory = Estimator(trainables(LORA, blocks=12, device="meta"), [(16, 21, 60, 104)])
    takes = {name: memory.needs(replace(LORA, **changes)).device for name, changes in WAYS.items()}
    assert list(takes.values()) == sorted(takes.values(), reverse=True)
    for name, bytes_needed in takes.items():
        found = memory.fastest(LORA, bytes_needed)
        assert found is not None and found[0] == name and memory.needs(found[1]).device <= bytes_needed
    assert memory.fastest(LORA, min(takes.values()) - 1) is None


def test_whole_weights_are_never_streamed() -> None:
    memory = Estimator(trainables(WHOLE, device="meta"), [SHAPE])
    assert memory.fastest(WHOLE, 0) is None
