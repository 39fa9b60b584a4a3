"""`bench`: any ONNX files side by side: what each is, and how fast beside the first; knows no torch."""

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from onnx import ModelProto

from compressor.errors import InputError
from compressor.measure.latency import ready_call, time_models
from compressor.onnx_files.facts import count_parameters, gzip_bytes
from compressor.onnx_files.inputs import Array, arrange, describe, random_inputs, read_inputs, signature
from compressor.onnx_files.macs import count_macs
from compressor.onnx_files.reading import external_files, load_graph
from compressor.onnx_files.runtime import open_session
from compressor.records.benchmark import Benchmark, BenchmarkFile, Timing
from compressor.records.environment import environment
from compressor.system.disk import memory_errors
from compressor.text.figures import count, printable

logger = logging.getLogger("compressor")


def bench(
    files: Sequence[Path],
    *,
    batch_sizes: Sequence[int] = (1,),
    thread_counts: Sequence[int] = (1,),
    sizes: Mapping[str, int] | None = None,
    inputs_file: Path | None = None,
    max_seconds: float = 20.0,
) -> Benchmark:
    """Compare ONNX files, the first of which is the baseline, for each batch size and number of threads.

    Inputs are made up from the baseline's signature, with `sizes` of dynamic dimensions by name, or read from
    `inputs_file`, an .npz that holds one batch by name of input; then there are no `batch_sizes`. Each session takes up
    to `max_seconds` per file.

    Nothing is opened before every file has passed `load_graph`, which distrusts it, and nothing is timed before each
    has run on every batch. Raises InputError for a file or inputs at fault, HostError.
    """
    machine = environment()
    with memory_errors():
        for file in files:
            _check(file)
        if inputs_file is None:
            batches = [random_inputs(files[0], batch_size=batch_size, sizes=sizes) for batch_size in batch_sizes]
        else:
            batches = [read_inputs(inputs_file, files[0])]
        for inputs, file in itertools.product(batches, files):
            ready_call(file, inputs, threads=1)
        candidates = [
            _candidate(name, file, batches[0]) for name, file in zip(distinct_names(files), files, strict=True)
        ]
        timings = [
            _timing(files, inputs, threads, max_seconds)
            for inputs, threads in itertools.product(batches, thread_counts)
        ]
    return Benchmark(candidates=tuple(candidates), timings=tuple(timings), environment=machine)


def distinct_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """A name for each path, all different and printable: that of the file, after as many directories as it takes.

    A path that is given twice gets its position, counted from 1. So does a name that already ends like one with a
    position.
    """
    parts = [tuple(map(printable, path.parts)) for path in paths]
    names = [_shortest(own, parts) for own in parts]
    return tuple(
        f"{name} ({position})" if names.count(name) > 1 or re.search(r" \(\d+\)$", name) else name
        for position, name in enumerate(names, start=1)
    )


def _shortest(own: tuple[str, ...], all_parts: Sequence[tuple[str, ...]]) -> str:
    """The fewest last parts of a path that no other path ends in."""
    others = [parts for parts in all_parts if parts != own]
    lengths = (n for n in range(1, len(own)) if all(parts[-n:] != own[-n:] for parts in others))
    return Path(*own[-next(lengths, len(own)) :]).as_posix()


def _check(file: Path) -> ModelProto:
    try:
        return load_graph(file)
    except (OSError, ValueError) as error:
        msg = f"{file} must be an ONNX model that is safe to read: {error}"
        raise InputError(msg) from error


def _candidate(name: str, file: Path, inputs: Mapping[str, Array]) -> BenchmarkFile:
    """What the file is; without parameters or MACs if those cannot be counted."""
    model = _check(file)
    files = (file, *external_files(model, file.parent))
    parameters = macs = uncounted = None
    wanted = signature(open_session(file, threads=1), file)
    try:
        parameters, _ = count_parameters(model, file.parent)
        macs = count_macs(model, arrange(inputs, wanted), file.parent)
    except ValueError as error:
        uncounted = " ".join(str(error).split())
    return BenchmarkFile(
        name=name,
        size_bytes=sum(part.stat().st_size for part in files),
        transfer_bytes=sum(map(gzip_bytes, files)),
        parameters=parameters,
        macs=macs,
        uncounted=uncounted,
    )


def _timing(files: Sequence[Path], inputs: Mapping[str, Array], threads: int, max_seconds: float) -> Timing:
    shapes = {name: describe(array.dtype, array.shape) for name, array in inputs.items()}
    settings = f"{', '.join(shapes.values())}, {count(threads, 'thread')}"
    logger.info("timing %s side by side: %s", count(len(files), "file"), settings)
    latencies, session = time_models(files, inputs=inputs, threads=threads, max_seconds=max_seconds)
    return Timing(inputs=shapes, latencies=latencies, session=session)
