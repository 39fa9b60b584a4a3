"""What an ONNX file takes: its inputs, and arrays for them, made up or read from a file; knows no torch."""

import lzma
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from compressor.errors import InputError
from compressor.runtime import open_session
from compressor.spelling import did_you_mean

Array: TypeAlias = NDArray[np.generic]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint64)": np.uint64,
    "tensor(uint32)": np.uint32,
    "tensor(uint16)": np.uint16,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
"""All types of numbers that NumPy has too."""

_NPZ_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError)
"""What NumPy and zipfile raise for a file at fault; RuntimeError for one that is encrypted or packed in another way."""


@dataclass(frozen=True)
class Input:
    """One input of a model: a tensor of numbers."""

    name: str
    dtype: np.dtype
    sizes: tuple[int | str | None, ...]
    """Of each dimension; of a dynamic one its name, or None if it has none. Empty for a scalar and an unknown rank."""

    def takes(self, array: Array) -> bool:
        """Whether type, rank and fixed sizes are those of the input; a run decides where the rank is not known."""
        sizes = self.sizes or array.shape
        return (
            array.dtype == self.dtype
            and array.ndim == len(sizes)
            and all(not isinstance(size, int) or size == found for size, found in zip(sizes, array.shape, strict=True))
        )

    def rounded(self, array: Array) -> Array:
        """`array`, or its numbers in the type of the input if both are floats; what is too large is infinite."""
        if not (np.issubdtype(array.dtype, np.floating) and np.issubdtype(self.dtype, np.floating)):
            return array
        with np.errstate(over="ignore"):
            return array.astype(self.dtype, copy=False)

    def __str__(self) -> str:
        return described(self.dtype, self.sizes)


def described(dtype: np.dtype, sizes: Sequence[int | str | None]) -> str:
    """Type and sizes of a tensor, such as `float32 ('batch', 1, 28, 28)`."""
    return f"{dtype} {tuple(sizes)!r}"


def signature(session: onnxruntime.InferenceSession, path: Path) -> tuple[Input, ...]:
    """The inputs of the file at `path`, opened in `session`. Raises InputError for one that is no tensor of numbers."""
    nodes = session.get_inputs()
    for node in nodes:
        if node.type not in _DTYPES:
            msg = f"inputs of {path} must be tensors of numbers that NumPy has, got {node.type!r}"
            raise InputError(msg)
    return tuple(Input(node.name, np.dtype(_DTYPES[node.type]), tuple(node.shape)) for node in nodes)


def random_inputs(
    path: Path, *, batch_size: int = 1, sizes: Mapping[str, int] | None = None, seed: int = 0
) -> dict[str, Array]:
    """Arrays for the inputs of an ONNX file, by name: normal floats; zeros and ones for whole numbers and booleans.

    A first dimension that is dynamic is the batch; `sizes` are those of other dynamic dimensions, by name. Raises
    InputError for a dimension without a size, a size without a dimension, or a batch fixed at another size.
    """
    generator = np.random.default_rng(seed)
    inputs = signature(open_session(path, threads=1), path)
    _check_names(sizes or {}, inputs, path)
    arrays: dict[str, Array] = {}
    for one in inputs:
        shape = _shape(one, batch_size, sizes or {}, path)
        floating = np.issubdtype(one.dtype, np.floating)
        try:
            numbers = generator.standard_normal(shape) if floating else generator.integers(0, 2, shape)
        except ValueError as error:  # what NumPy says of more numbers than addresses
            msg = f"input {one.name!r} of {path} must have sizes that an array can have, got {shape}: {error}"
            raise InputError(msg) from error
        arrays[one.name] = numbers.astype(one.dtype)
    return arrays


def read_inputs(file: Path, path: Path) -> dict[str, Array]:
    """Arrays for the inputs of the ONNX file at `path` from an .npz `file` that holds each by its name.

    The file is not trusted: nothing in it is unpickled. Raises InputError unless names, types and shapes are exactly
    those of the model, and there is at least one sample.
    """
    inputs = {one.name: one for one in signature(open_session(path, threads=1), path)}
    arrays = _read_npz(file)
    missing, unexpected = sorted(inputs.keys() - arrays.keys()), sorted(arrays.keys() - inputs.keys())
    if missing or unexpected:
        msg = (
            f"{file} must hold an array for each input of {path}, {', '.join(map(repr, inputs))}, and no other; "
            f"missing: {missing}, unexpected: {unexpected}"
        )
        raise InputError(msg)
    for name, one in inputs.items():
        found = arrays[name]
        if not one.takes(found) or found.shape[:1] == (0,):
            msg = (
                f"{name!r} in {file} must be {one} with at least one sample, as {path} takes it, "
                f"got {described(found.dtype, found.shape)}"
            )
            raise InputError(msg)
    return {name: arrays[name] for name in inputs}


def arranged(inputs: Mapping[str, Array] | Sequence[Array], wanted: Sequence[Input]) -> list[Array]:
    """`inputs` as a file takes them that wants these: by name if the names are the same, else as given; floats rounded.

    Another number of inputs is returned as it is.
    """
    names = [one.name for one in wanted]
    if not isinstance(inputs, Mapping):
        arrays = list(inputs)
    else:
        arrays = [inputs[name] for name in names] if inputs.keys() == set(names) else list(inputs.values())
    if len(arrays) != len(wanted):
        return arrays
    return [one.rounded(array) for one, array in zip(wanted, arrays, strict=True)]


def _check_names(sizes: Mapping[str, int], inputs: Sequence[Input], path: Path) -> None:
    dynamic = {size: None for one in inputs for size in one.sizes[1:] if isinstance(size, str)}
    for name in sizes:
        if name not in dynamic:
            named = ", ".join(map(repr, dynamic)) or "none"
            msg = (
                f"sizes must be of dynamic dimensions after the batch (of {path}: {named}), "
                f"got {name!r}{did_you_mean(name, dynamic)}"
            )
            raise InputError(msg)


def _shape(one: Input, batch_size: int, sizes: Mapping[str, int], path: Path) -> list[int]:
    """The sizes of an input that is made up."""
    first = [size if isinstance(size, int) else batch_size for size in one.sizes[:1]]
    rest = [sizes.get(size, size) if isinstance(size, str) else size for size in one.sizes[1:]]
    if first != [batch_size]:
        msg = (
            f"input {one.name!r} of {path} must take a batch of {batch_size}, got {one}; "
            "choose its batch size (--batch-size), or give example inputs (--inputs)"
        )
        raise InputError(msg)
    known = [size for size in rest if isinstance(size, int)]
    if len(known) < len(rest):
        msg = (
            f"input {one.name!r} of {path} must have known sizes after the batch, got {one}; give those of its "
            "dynamic dimensions by name (--dimension NAME=SIZE), or example inputs (--inputs)"
        )
        raise InputError(msg)
    return [batch_size, *known]


def _read_npz(file: Path) -> dict[str, Array]:
    try:
        with file.open("rb") as stream:  # NumPy leaves a damaged file open
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                msg = "it is a single array without a name"
                raise ValueError(msg)
            arrays = {name: archive[name] for name in archive.files}
        for name, array in arrays.items():
            if not isinstance(array, np.ndarray):
                msg = f"its member {name!r} is no array"
                raise ValueError(msg)
    except _NPZ_ERRORS as error:
        msg = f"{file} must be an .npz of plain arrays, as numpy.savez writes it: {error}"
        raise InputError(msg) from error
    return {name: np.asarray(array, order="C") for name, array in arrays.items()}
