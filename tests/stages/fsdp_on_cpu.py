"""Run `finetune` with FSDP on processors: accelerate shares weights among GPUs only, and is told that it has some.

What is tried so is the road of the weights: shared, trained, scored, sampled, saved, loaded again and gathered.
"""

import sys
from typing import Any

from accelerate import DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import Trainer

from pipeline.stages import finetune as stage
from pipeline.training import train, trainer


def create_accelerator_and_postprocess(self: Any) -> None:
    Trainer.create_accelerator_and_postprocess(self)
    state = self.accelerator.state
    plugin = FullyShardedDataParallelPlugin()
    state.__dict__["fsdp_plugin"] = plugin
    state._shared_state["fsdp_plugin"] = plugin
    state._shared_state["distributed_type"] = DistributedType.FSDP
    state.distributed_type = DistributedType.FSDP
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    self.is_fsdp_enabled = True


def training_step(self: Any, model: Any, *arguments: Any) -> Any:
    # What belongs to no block stays whole between passes.
    assert all(isinstance(weight, DTensor) for weight in self.model.transformer.h.parameters())
    return step(self, model, *arguments)


step = trainer.PackedTrainer.training_step
trainer.PackedTrainer.training_step = training_step  # type: ignore[method-assign]
trainer.PackedTrainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess  # type: ignore[method-assign]
train.check_fsdp = lambda params, processes: None
sys.argv = ["finetune", "out/tokenize", "out/base", "out/finetune"]
stage.main()
