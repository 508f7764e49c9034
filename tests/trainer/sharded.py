"""`python -m tests.trainer.sharded FILE`: the runs in a JSON file of command lines of `trainer.train`, one after the
other, under FSDP or DeepSpeed on CPUs. `accelerate` offers these on GPUs alone, so its choice is made here.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed import barrier

from pack import register


def choose_deepspeed() -> None:
    os.environ.pop("ACCELERATE_USE_CPU", None)
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def choose_fsdp() -> None:
    begin = AcceleratorState.__init__

    def begin_sharded(self: AcceleratorState, *words: Any, fsdp_plugin: Any = None, **more: Any) -> None:
        begin(self, *words, fsdp_plugin=fsdp_plugin, **more)
        if fsdp_plugin is not None:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": fsdp_plugin}

    AcceleratorState.__init__ = begin_sharded


if __name__ == "__main__":
    (choose_deepspeed if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else choose_fsdp)()
    # Processes that have parted cannot be brought together again.
    Accelerator.end_training = lambda self: None
    register()
    from wancore.trainer.train import main

    for number, words in enumerate(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))):
        if number:
            AcceleratorState._reset_state(reset_partial_state=True)
        if code := main(words):
            sys.exit(code)
    barrier()
    # The threads of a process group that was used by several runs may abort the interpreter at its end.
    sys.stderr.flush()
    os._exit(0)
