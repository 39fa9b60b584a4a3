"""Run a teacher once over every sample and view, and keep its answers: shard by shard, shared among processes."""

import copy
import hashlib
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from compressor.distillation import response
from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.models.ensemble import members_of
from compressor.models.output_kind import CLASSES, Outputs, outputs_of_model
from compressor.models.soft_label_file import FILE_NAME, Origin, SoftLabelFile, write
from compressor.system.disk import write_atomically
from compressor.system.processes import broadcast, gather_objects, processes
from compressor.system.progress import progress_bar
from compressor.task import Task
from compressor.training.sampling import TrainingData

_SHARD = 2048
"""Samples between two points from which an interrupted run goes on."""
_BATCH = 256


def data_of(task: Task, *, seed: int) -> TrainingData:
    """What a teacher answers: the training samples and, behind them, the unlabeled ones."""
    return TrainingData(task.train, task.unlabeled, augmentation=task.augmentation, seed=seed)


def origin_of(teacher: TorchModel, task: Task, *, seed: int, views: int, top_k: int | None) -> Origin:
    """Say what soft labels of `teacher` over `task` are made from; `top_k` classes of each are kept, all if None."""
    data = data_of(task, seed=seed)
    prints = [task.fingerprints[name] for name in ("train", "unlabeled") if name in task.fingerprints]
    first = np.arange(min(16, len(data)))
    seen = hashlib.sha256()
    for view in range(views):
        for tensor in data.view(data.inputs(first), first, view):
            seen.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            seen.update(tensor.contiguous().view(torch.uint8).numpy().data)
    members = members_of(teacher.module)
    with torch.no_grad():
        answers = members[0][0](*task.example_inputs)
    # top classes are found among logits, with the classes first
    shape = (answers if top_k is None else outputs_of_model(teacher, task).as_logits(answers)).shape[1:]
    return Origin(
        teacher=teacher.digest,
        data=hashlib.sha256("".join(prints).encode()).hexdigest(),
        transform=seen.hexdigest(),
        seed=seed,
        views=views,
        samples=len(data),
        members=len(members),
        answer=tuple(shape),
        top_k=top_k,
    )


def answer(
    teacher: TorchModel,
    data: TrainingData,
    origin: Origin,
    directory: Path,
    *,
    device: torch.device,
    log: Callable[[str], None],
    outputs: Outputs = CLASSES,
) -> SoftLabelFile:
    """Run `teacher`, which gives `outputs`, over `data` as `origin` says; write the soft labels into `directory`.

    Shards that a killed process left in `directory` are not computed again. Under torchrun the processes share each
    shard and the main one writes. Raises StageError for logits that float16 cannot hold.
    """
    group = processes(device)
    path = directory / FILE_NAME
    if broadcast(group.is_main_process and _is_whole(path, origin)):
        log("they are there from an interrupted run")
        return SoftLabelFile.open(broadcast(path))
    shards = _Shards(directory / "shards" / hashlib.sha256(origin.model_dump_json().encode()).hexdigest()[:16], origin)
    done = broadcast(shards.count_whole() if group.is_main_process else None)
    if done:
        log(f"{done} of {len(shards.spans)} shards are there from an interrupted run")
    kept = None if origin.top_k is None else (origin.top_k, outputs)
    modules = [copy.deepcopy(member).to(device).eval() for member, _ in members_of(teacher.module)]
    bar = progress_bar(range(done, len(shards.spans)), unit="shard", hidden=not group.is_main_process)
    for position in bar:
        view, rows = shards.spans[position]
        if bar.disable and rows[0] == 0:
            log(f"view {view + 1}/{origin.views}")
        own = rows[group.process_index :: group.num_processes]
        parts = gather_objects(_answers(modules, data, own, view=view, kept=kept, device=device))
        if group.is_main_process:
            shards.keep(position, _interleave(parts, len(rows)))
    if group.is_main_process:
        write(path, origin, shards.files)
        shutil.rmtree(directory / "shards")
    return SoftLabelFile.open(broadcast(path))  # the file is there for every process once the main one tells its path


def _is_whole(path: Path, origin: Origin) -> bool:
    """Whether soft labels from `origin` lie at `path`. Anything else there will be written over."""
    try:
        return path.exists() and SoftLabelFile.open(path).origin == origin
    except InputError:
        return False


def check_replayable(data: TrainingData) -> None:
    """Raise InputError unless samples and views are the same every time, whatever they are asked for with."""
    rows = np.arange(min(16, len(data)))
    first, again = data.inputs(rows), data.inputs(rows)
    if not all(map(torch.equal, first, again)):
        msg = "the train split must give the same samples every time; put what is random into the task's augmentation"
        raise InputError(msg)
    seen, again, fewer = (
        data.view(first, rows, 0),
        data.view(first, rows, 0),
        data.view(data.inputs(rows[:2]), rows[:2], 0),
    )
    if not all(map(torch.equal, seen, again)):
        msg = "augmentation must depend on its inputs and `uniform` alone, but it gave two views of one number"
        raise InputError(msg)
    # float32 sums may be taken in another order for another number of samples
    if not all(torch.allclose(one[:2], other, atol=1e-5) for one, other in zip(seen, fewer, strict=True)):
        msg = "augmentation must treat each sample by itself, but its view depends on the other samples of the batch"
        raise InputError(msg)


@dataclass(frozen=True)
class _Shards:
    """Pieces of the file to come. Each is there whole, or counts as missing."""

    directory: Path
    origin: Origin

    @cached_property
    def spans(self) -> list[tuple[int, NDArray[np.int64]]]:
        """View and rows of each shard, in the order of the file."""
        rows = np.arange(self.origin.samples)
        starts = range(0, self.origin.samples, _SHARD)
        return [(view, rows[start : start + _SHARD]) for view in range(self.origin.views) for start in starts]

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """The files of each tensor, by its name, in the order of the shards."""
        return {name: [self._file(i, name) for i in range(len(self.spans))] for name in self.origin.tensors}

    def count_whole(self) -> int:
        """Make the directory; count the shards that are there whole, up to the first that is not."""
        self.directory.mkdir(parents=True, exist_ok=True)
        whole = [
            all(self._is_whole(name, position) for name in self.origin.tensors) for position in range(len(self.spans))
        ]
        return whole.index(False) if False in whole else len(whole)

    def _is_whole(self, name: str, position: int) -> bool:
        dtype, shape = self.origin.tensors[name]
        file, samples = self._file(position, name), len(self.spans[position][1])
        return file.exists() and file.stat().st_size == samples * math.prod(shape) * dtype.itemsize

    def keep(self, position: int, answers: dict[str, Tensor]) -> None:
        """Write a shard."""
        for name, (dtype, _) in self.origin.tensors.items():
            with np.errstate(over="ignore"):
                values = answers[name].numpy().astype(dtype)
            if not np.isfinite(values).all():
                largest = answers[name].abs().max().item()
                msg = f"logits of the teacher must lie within ±65504, the range of float16, got {largest:.3g}"
                raise StageError(msg)
            write_atomically(self._file(position, name), values.tobytes())

    def _file(self, position: int, name: str) -> Path:
        return self.directory / f"{position:06d}.{name}"


def _answers(
    modules: list[nn.Module],
    data: TrainingData,
    rows: NDArray[np.int64],
    *,
    view: int,
    kept: tuple[int, Outputs] | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """What each of `modules` says to `rows`, by name of the tensor, each (len(rows), members, …).

    `kept` says how many of the most likely classes are kept, and where classes stand in the outputs; all if None.
    """
    found: list[dict[str, Tensor]] = []
    for start in range(0, len(rows), _BATCH):
        some = rows[start : start + _BATCH]
        inputs = [tensor.to(device) for tensor in data.view(data.inputs(some), some, view)]
        with torch.no_grad():
            answers = [module(*inputs).float().cpu() for module in modules]
        if kept is None:
            found.append({"logits": torch.stack(answers, dim=1)})
        else:
            top_k, outputs = kept
            logits = torch.stack([outputs.as_logits(one) for one in answers], dim=2)
            classes = response.top_k(logits, top_k)._asdict()
            found.append({name: part if name == "tail" else part.transpose(1, 2) for name, part in classes.items()})
    return {name: torch.cat([one[name] for one in found]) for name in found[0]} if found else {}


def _interleave(parts: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    """Put together what the processes found: of n processes, each has every n-th row."""
    whole = {name: part.new_empty((count, *part.shape[1:])) for name, part in parts[0].items()}
    for index, part in enumerate(parts):
        for name, values in part.items():
            whole[name][index :: len(parts)] = values
    return whole
