"""What an ONNX file takes: its inputs, and arrays for them, made up or read from a file; knows no torch."""

import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeAlias

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from compressor.errors import InputError, did_you_mean
from compressor.onnx_files.runtime import open_session

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

_NPZ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)
"""What zipfile raises for a file at fault; RuntimeError for one that is encrypted or packed in another way."""

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    rb"\{'descr': ?'([<>|=]?(?:b1|[iu][1248]|f[248]|c8|c16))', ?'fortran_order': ?(True|False), ?"
    rb"'shape': ?\(((?:[0-9]{1,18}, ?)*(?:[0-9]{1,18})?)\),? ?\}\s*"
)
"""Of an array of numbers, as NumPy writes it. NumPy itself would evaluate whatever literal stands there."""


@dataclass(frozen=True)
class Input:
    """One input of a model: a tensor of numbers."""

    name: str
    dtype: np.dtype
    sizes: tuple[int | str | None, ...]
    """Of each dimension; of a dynamic one its name, or None if it has none. Empty for a scalar and an unknown rank."""

    def takes(self, dtype: np.dtype, shape: Sequence[int]) -> bool:
        """Whether type, rank and fixed sizes are those of the input; a run decides where the rank is not known."""
        sizes = self.sizes or shape
        return (
            dtype == self.dtype
            and len(shape) == len(sizes)
            and all(not isinstance(size, int) or size == found for size, found in zip(sizes, shape, strict=True))
        )

    def cast(self, array: Array) -> Array:
        """`array` in the float type of the input, if both are floats; a number too large for it becomes infinite."""
        if not (np.issubdtype(array.dtype, np.floating) and np.issubdtype(self.dtype, np.floating)):
            return array
        with np.errstate(over="ignore"):
            return array.astype(self.dtype, copy=False)

    def __str__(self) -> str:
        return describe(self.dtype, self.sizes)


def describe(dtype: np.dtype, sizes: Sequence[int | str | None]) -> str:
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

    The batch is the dimension that `find_batch` names, else the first; `sizes` are those of other dynamic dimensions,
    by name. Raises InputError for a dimension without a size, a size without a dimension, or a batch fixed at another
    size.
    """
    generator = np.random.default_rng(seed)
    inputs = signature(open_session(path, threads=1), path)
    batch = find_batch(inputs)
    _check_names(sizes or {}, inputs, batch, path)
    arrays: dict[str, Array] = {}
    for one in inputs:
        shape = _shape(one, batch, batch_size, sizes or {}, path)
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

    The file is not trusted: nothing in it is evaluated, and no array is read before its name, type and shape are known
    to be right. Raises InputError unless they are exactly those of the model, and there is at least one sample.
    """
    inputs = {one.name: one for one in signature(open_session(path, threads=1), path)}
    try:
        if not file.is_file():
            msg = "it is not there, or no regular file"
            raise ValueError(msg)
        with zipfile.ZipFile(file) as archive:
            members = {member.removesuffix(".npy"): member for member in archive.namelist()}
            _check_members(members, inputs, file, path)
            arrays = {}
            for name, one in inputs.items():
                with archive.open(members[name]) as stream:
                    arrays[name] = _read_array(stream, one, f"{name!r} in {file}", path)
    except _NPZ_ERRORS as error:
        msg = f"{file} must be an .npz of plain arrays, as numpy.savez writes it: {error}"
        raise InputError(msg) from error
    return arrays


def arrange(inputs: Mapping[str, Array] | Sequence[Array], wanted: Sequence[Input]) -> list[Array]:
    """Bring `inputs` into the order and the float types of `wanted`, the inputs of a file.

    They are matched by name if the names are equal, else in the order given. If they are more or fewer than `wanted`,
    they are returned as they are.
    """
    names = [one.name for one in wanted]
    if not isinstance(inputs, Mapping):
        arrays = list(inputs)
    else:
        arrays = [inputs[name] for name in names] if inputs.keys() == set(names) else list(inputs.values())
    if len(arrays) != len(wanted):
        return arrays
    return [one.cast(array) for one, array in zip(wanted, arrays, strict=True)]


def find_batch(inputs: Sequence[Input]) -> str | None:
    """Name of the dynamic dimension that is the batch, wherever it stands; None if no name of one is in all inputs.

    It is the one that says so, or the first dimension of the first input, or the only one that several inputs share.
    """
    names = [[size for size in one.sizes if isinstance(size, str)] for one in inputs]
    shared = [name for name in (names or [[]])[0] if all(name in others for others in names)]
    called = [name for name in shared if "batch" in name.lower()]
    first = [name for name in shared if name == inputs[0].sizes[0]]
    alone = shared if len(inputs) > 1 and len(shared) == 1 else []
    return next(iter((*called, *first, *alone)), None)


def _check_names(sizes: Mapping[str, int], inputs: Sequence[Input], batch: str | None, path: Path) -> None:
    others = [size for one in inputs for size in (one.sizes if batch else one.sizes[1:]) if size != batch]
    dynamic = dict.fromkeys(size for size in others if isinstance(size, str))
    for name in sizes:
        if name not in dynamic:
            named = ", ".join(map(repr, dynamic)) or "none"
            msg = (
                f"sizes must be of dynamic dimensions beside the batch (of {path}: {named}), "
                f"got {name!r}{did_you_mean(name, dynamic)}"
            )
            raise InputError(msg)


def _shape(one: Input, batch: str | None, batch_size: int, sizes: Mapping[str, int], path: Path) -> list[int]:
    """The sizes of an input that is made up."""
    given = dict(sizes) if batch is None else {**sizes, batch: batch_size}
    shape = [given.get(size) if isinstance(size, str) else size for size in one.sizes]
    if batch is None:
        shape[:1] = [batch_size if not isinstance(size, int) else size for size in one.sizes[:1]]
        if shape[:1] != [batch_size]:
            msg = (
                f"input {one.name!r} of {path} must take a batch of {batch_size}, got {one}; "
                "choose its batch size (--batch-size), or give example inputs (--inputs)"
            )
            raise InputError(msg)
    known = [size for size in shape if size is not None]
    if len(known) < len(shape):
        unknown = [size for size, found in zip(one.sizes, shape, strict=True) if found is None]
        by_name = "" if None in unknown else "those of its dynamic dimensions by name (--dimension NAME=SIZE), or "
        msg = (
            f"input {one.name!r} of {path} must have known sizes beside the batch, got {one}; give {by_name}example "
            "inputs (--inputs)"
        )
        raise InputError(msg)
    return known


def _check_members(names: Collection[str], inputs: Collection[str], file: Path, path: Path) -> None:
    missing, unexpected = sorted(set(inputs) - set(names)), sorted(set(names) - set(inputs))
    if missing or unexpected:
        msg = (
            f"{file} must hold an array for each input of {path}, {', '.join(map(repr, inputs))}, and no other; "
            f"missing: {missing}, unexpected: {unexpected}"
        )
        raise InputError(msg)


def _read_array(stream: IO[bytes], one: Input, name: str, path: Path) -> Array:
    """The array of a member of an .npz, columns last, if the file at `path` takes it as input `one`."""
    dtype, shape, order = _read_header(stream)
    if not one.takes(dtype, shape) or shape[:1] == (0,):
        found = describe(dtype, shape)
        msg = f"{name} must be {one} with at least one sample, as {path} takes it, got {found}"
        raise InputError(msg)
    size, content = math.prod(shape) * dtype.itemsize, bytearray()
    while len(content) <= size and (chunk := stream.read(1 << 20)):  # an .npz may hold less or more than it says
        content += chunk
    if len(content) != size:
        msg = f"{name} must be {size:,} bytes of numbers, got {'more' if len(content) > size else f'{len(content):,}'}"
        raise ValueError(msg)
    return np.asarray(np.frombuffer(content, dtype).reshape(shape, order=order), order="C")


def _read_header(stream: IO[bytes]) -> tuple[np.dtype, tuple[int, ...], Literal["C", "F"]]:
    """Type and shape of an array, and whether its rows or its columns come first."""
    magic, length = stream.read(len(_MAGIC)), stream.read(2)
    header = _HEADER.fullmatch(stream.read(int.from_bytes(length, "little")))
    if magic != _MAGIC or header is None:
        msg = "it has a member that is no array of numbers in version 1.0 of NumPy's format"
        raise ValueError(msg)
    dtype, is_fortran, sizes = (part.decode() for part in header.groups())
    return np.dtype(dtype), tuple(map(int, re.findall("[0-9]+", sizes))), "F" if is_fortran == "True" else "C"
