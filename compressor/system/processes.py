"""The processes that share the work under torchrun; one, unless there are more."""

import atexit
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from compressor.errors import HostError

launched = int(os.environ.get("WORLD_SIZE", "1"))
"""How many processes torchrun started."""


def _leave() -> None:
    # A process that ends with its group open is now and then aborted by a thread of the group that still waits.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if launched > 1:
    atexit.register(_leave)


def processes(device: torch.device) -> PartialState:
    """The group of processes: `num_processes`, `process_index`, `is_main_process`.

    Raises HostError if fewer take part than were started.
    """
    # A process may wait for as long as another one measures; torchrun ends them all when one fails.
    found = PartialState(cpu=device.type == "cpu", **({"timeout": timedelta(days=7)} if launched > 1 else {}))
    if found.num_processes != launched:
        # https://github.com/huggingface/accelerate/issues/2741: some launchers start one process and say nothing
        msg = f"{launched} processes must take part, got {found.num_processes}; start them with torchrun"
        raise HostError(msg)
    return found


def broadcast(message: Any) -> Any:
    """Return the `message` of the main process to every process; the others pass None."""
    messages = [message]
    return broadcast_object_list(messages)[0] if launched > 1 else message


def gather_objects(part: Any) -> list[Any]:
    """Return the `part` of every process, in their order, to every process."""
    return gather_object([part]) if launched > 1 else [part]
