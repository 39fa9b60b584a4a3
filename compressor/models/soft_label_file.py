"""A teacher's outputs for every sample and view, in one memory-mapped float16 file that says what it was made from."""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, PositiveInt
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.models.attachment import Attachment
from compressor.models.edits import Edit

FILE_NAME = "soft_labels.safetensors"


class Origin(BaseModel):
    """What soft labels were made from and cover; they teach only where all of it is the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    teacher: str
    """SHA-256 of the teacher: its weights and what it is built from."""
    data: str
    """SHA-256 of the training samples and, behind them, the unlabeled ones."""
    transform: str
    """SHA-256 of what the views make of the first samples."""
    seed: int
    """Chooses the views."""
    views: PositiveInt
    samples: PositiveInt
    """Of one view."""
    members: PositiveInt
    """Teachers in an ensemble; 1 for a single model."""
    answer: tuple[PositiveInt, ...]
    """Shape of the logits for one sample: (C, …)."""
    top_k: PositiveInt | None
    """Classes that are kept of each answer; all if None."""

    @property
    def tensors(self) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
        """Type and shape of what is stored for one sample in one view, by name."""
        if self.top_k is None:
            return {"logits": (np.dtype(np.float16), (self.members, *self.answer))}
        tokens = self.answer[1:]
        kept = (self.members, self.top_k, *tokens)
        return {
            "log_probabilities": (np.dtype(np.float16), kept),
            "classes": (np.dtype(np.int32), kept),
            "tail": (np.dtype(np.float16), (self.members, *tokens)),
        }


@final
@dataclass(frozen=True)
class SoftLabelFile(Attachment):
    """What a model answered to the training samples: an open `.safetensors` file whose metadata is its origin.

    Its tensors have the shape (views, samples, members, …). Rows are read as they are asked for, so memory does not
    grow with the file.
    """

    path: Path
    origin: Origin
    offset: int
    """Where the tensors begin in the file."""

    @classmethod
    def open(cls, path: Path) -> "SoftLabelFile":
        """Read the header. Raises InputError if `path` is no file of soft labels or is cut off."""
        try:
            with path.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(length, 1 << 20)))
            origin = Origin.model_validate_json(header.pop("__metadata__")["origin"])
        except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            msg = f"{path} must be a file of soft labels, but: {type(error).__name__}: {error}"
            raise InputError(msg) from error
        layout = _layout(origin)
        if header != layout:
            msg = f"{path} must hold the tensors that its origin says, {layout}, but its header says otherwise"
            raise InputError(msg)
        wanted = 8 + length + max(tensor["data_offsets"][1] for tensor in layout.values())
        if path.stat().st_size != wanted:
            msg = f"{path} must have {wanted} bytes, got {path.stat().st_size}; make the soft labels again"
            raise InputError(msg)
        return cls(path, origin, 8 + length)

    def save(self, directory: Path) -> None:
        """Copy the file."""
        shutil.copyfile(self.path, directory / FILE_NAME)

    @classmethod
    def load(cls, directory: Path, module: nn.Module) -> "SoftLabelFile":  # noqa: ARG003  # the file says whose it is
        """Open the file in `directory`."""
        return cls.open(directory / FILE_NAME)

    def carry_over(self, before: nn.Module, after: nn.Module, edits: tuple[Edit, ...]) -> None:
        """Other weights leave the answers behind."""

    @cached_property
    def _maps(self) -> dict[str, np.memmap]:
        offset, maps = self.offset, {}
        for name, (dtype, shape) in self.origin.tensors.items():
            whole = (self.origin.views, self.origin.samples, *shape)
            maps[name] = np.memmap(self.path, dtype, mode="r", offset=offset, shape=whole)
            offset += maps[name].nbytes
        return maps

    def read(self, rows: NDArray[np.int64], views: int | NDArray[np.int64]) -> dict[str, Tensor]:
        """What the teacher answered to the samples `rows`, by name of the tensor, each (N, members, …), float32."""
        found = {name: torch.from_numpy(stored[views, rows]) for name, stored in self._maps.items()}
        return {name: part.long() if name == "classes" else part.float() for name, part in found.items()}

    def check(self, origin: Origin) -> None:
        """Raise InputError unless these soft labels were made from what `origin` says; it names what differs."""
        mine, asked = self.origin.model_dump(exclude={"top_k"}), origin.model_dump(exclude={"top_k"})
        other = [name for name in mine if mine[name] != asked[name]]
        if other:
            names = ", ".join(other)
            msg = (
                f"{self.path} must have been made from this teacher and data, but it differs in {names}; make it again"
            )
            raise InputError(msg)


def write(path: Path, origin: Origin, shards: Mapping[str, Sequence[Path]]) -> SoftLabelFile:
    """Join the shards of each tensor, raw bytes in order, to a file of soft labels; it is whole or not there."""
    header = json.dumps({"__metadata__": {"origin": origin.model_dump_json()}, **_layout(origin)}).encode()
    header += b" " * (-len(header) % 8)  # tensors must be aligned
    part = path.with_name(path.name + ".part")
    with part.open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for name in origin.tensors:
            for chunk in _chunks(shards[name]):
                stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(path)
    return SoftLabelFile.open(path)


def _chunks(files: Sequence[Path]) -> Iterator[bytes]:
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                yield chunk


def _layout(origin: Origin) -> dict[str, Any]:
    """What the header of the file says of its tensors, by name, in order."""
    tensors, start = {}, 0
    for name, (dtype, shape) in origin.tensors.items():
        whole = [origin.views, origin.samples, *shape]
        end = start + dtype.itemsize * math.prod(whole)  # of Python's integers: those of numpy would overflow
        kind = {"float16": "F16", "int32": "I32"}[dtype.name]
        tensors[name] = {"dtype": kind, "shape": whole, "data_offsets": [start, end]}
        start = end
    return tensors
