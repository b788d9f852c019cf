"""The processes that train together under `torchrun`; without it, there is one."""

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
    """This process, and its communication with the others."""

    state: PartialState

    @property
    def count(self) -> int:
        return int(self.state.num_processes)

    @property
    def is_first(self) -> bool:
        """Return whether this is the process that writes outputs, the run, and lines on the terminal."""
        return bool(self.state.is_main_process)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.state.device
        return device

    def from_first(self, value: Callable[[], Value]) -> Value:
        """Return in every process the value that the first makes."""
        values: list[Any] = [value() if self.is_first else None]
        if self.count > 1:
            broadcast_object_list(values)
        made: Value = values[0]
        return made

    def agree(self, value: str, what: str) -> None:
        """Raise `UserError` if the processes have different values; `what` names it."""
        if self.count > 1 and len(set(gather_object([value]))) > 1:
            raise UserError(
                f"finetune: the {self.count} processes have different {what}; "
                "start all of them in the same folder, or in copies of one commit"
            )

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in at least one process."""
        if self.count == 1:
            return flag
        flags = torch.tensor(int(flag), device=self.device)
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        return bool(flags.item())

    def close(self) -> None:
        """Wait for the other processes, and leave the group."""
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
