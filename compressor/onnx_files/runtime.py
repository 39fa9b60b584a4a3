"""Open an ONNX file under ONNX Runtime on the CPU; knows no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from compressor.errors import InputError

ERRORS = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
    UnicodeDecodeError,  # where what it wants to say quotes bytes of the file that are no text
)
"""What ONNX Runtime raises for a model or inputs at fault: classes that share no base but Exception."""

CPU: Mapping[str, Any] = {"providers": ["CPUExecutionProvider"], "enable_fallback": 0}
"""Arguments of each session. The fallback would print a banner, where JSON may stand, and try the same again."""


def open_session(path: Path, *, threads: int) -> onnxruntime.InferenceSession:
    """Open `path` with a fixed number of threads; 0 leaves the choice to ONNX Runtime.

    Raises InputError if ONNX Runtime cannot load or run the file.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # its own format, which a file name that ends in .ort would mean, is another parser, and nothing here checks it
    options.add_session_config_entry("session.load_model_format", "ONNX")
    options.log_severity_level = 4  # what goes wrong is raised, and a log would show names of the file as they are
    try:
        return onnxruntime.InferenceSession(str(path), options, **CPU)
    except ERRORS as error:
        msg = f"{path} must be a model that ONNX Runtime can run: {error}"
        raise InputError(msg) from error
