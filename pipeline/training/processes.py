"""The processes that train together, as `torchrun` starts them; without it there is one."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from pipeline.errors import UserError

FSDP_VERSION = "2"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among them."""

    state: PartialState

    @property
    def count(self) -> int:
        return int(self.state.num_processes)

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes: outputs, run, lines on the terminal."""
        return bool(self.state.is_main_process)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.state.device
        return device

    def from_first(self, value: Callable[[], Value]) -> Value:
        """What the first process makes, to all of them."""
        values: list[Any] = [value() if self.is_first else None]
        if self.count > 1:
            broadcast_object_list(values)
        made: Value = values[0]
        return made

    def agree(self, value: str, what: str) -> None:
        """Raise `UserError` where the processes have come to different values."""
        if self.count > 1 and len(set(gather_object([value]))) > 1:
            raise UserError(
                f"finetune: the {self.count} processes have different {what}; "
                "start all of them in the same folder, or in copies of one commit"
            )

    def any(self, flag: bool) -> bool:
        """Whether it is true in one process at least."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return bool(flags.item())

    def close(self) -> None:
        """Leave the others in order."""
        if self.count > 1:
            self.state.wait_for_everyone()
            self.state.destroy_process_group()


def join_processes(*, fsdp: bool = False) -> Processes:
    """Meet the other processes: over NCCL if there are GPUs, over gloo otherwise.

    With `fsdp`, sets the environment variable FSDP_VERSION, which accelerate reads; the Trainer has no argument for
    it.
    """
    if fsdp:
        os.environ["FSDP_VERSION"] = FSDP_VERSION
    return Processes(PartialState(cpu=not torch.cuda.is_available()))
