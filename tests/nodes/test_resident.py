"""Weights that wait on the device, seen and evicted by ComfyUI's own model management."""

import subprocess
from pathlib import Path

import pytest

from tests.comfyui import comfyui
from tests.programs import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPT = '''
import gc, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {comfy!r})
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_management as management
import torch
from torch import nn
sys.path.append({root!r})
import pack
pack.register()
from wancore.nodes import host
from wancore.nodes.comfyui import unreserved_memory
from wan_core.offload.streaming import PlainCopies
from wan_core.offload.weights import WeightProvider

CPU = torch.device("cpu")
class Copying(PlainCopies):
    """As if weights rested on another device than this one."""
    def whole(self, weight, dtype):
        return weight.clone()

def used(module):
    with WeightProvider.of(module).working(CPU, keep=host.current.keeps_weights(), copies=Copying(CPU)):
        pass
    host.current.register_weights(module)

model, other = (nn.ModuleList(nn.Linear(64, 64) for _ in range(4)).requires_grad_(False) for _ in range(2))
size = sum(p.nbytes for p in model.parameters())
for module in (model, other, model):
    used(module)
assert len(management.current_loaded_models) == 2, "each is there once"
assert sum(m.model_loaded_memory() for m in management.current_loaded_models) == 2 * size

real = management.get_free_memory
management.get_free_memory = lambda device=None, torch_free_too=False: (0, 0) if torch_free_too else 0
management.free_memory(size // 2, CPU)
left = WeightProvider.of(model).cached_bytes + WeightProvider.of(other).cached_bytes
assert size // 2 <= 2 * size - left <= 2 * size, left
used(model)
assert WeightProvider.of(model).cached_bytes == size, "weights come back on the next use"
management.unload_all_models()
management.get_free_memory = real
assert not management.current_loaded_models
assert WeightProvider.of(model).cached_bytes == WeightProvider.of(other).cached_bytes == 0

used(model)
del model, module
gc.collect()
assert not management.current_loaded_models, "nothing is held once the graph drops it"

assert host.current.memory_settings().vram_limit is None
for state in (management.VRAMState.LOW_VRAM, management.VRAMState.NO_VRAM):
    management.vram_state = state
    assert host.current.memory_settings().vram_limit == 0
management.get_free_memory = lambda device=None, torch_free_too=False: 10**9
management.EXTRA_RESERVED_VRAM = 3 * 10**8
assert unreserved_memory(torch.device("meta")) == 7 * 10**8, "--reserve-vram is left alone"
assert unreserved_memory(CPU) is None
print("all true")
'''


@pytest.mark.comfyui
def test_comfyui_sees_evicts_and_forgets_our_weights():
    host = comfyui()
    script = SCRIPT.format(comfy=str(host.folder), root=str(ROOT))
    command = [host.python, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, cwd=host.folder, timeout=PATIENCE)
    assert "all true" in done.stdout, done.stdout + done.stderr
