"""An int8 file on a processor without VNNI, which QEMU emulates."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from compressor.export.to_onnx import to_unchecked_onnx
from compressor.onnx_files.runtime import open_session
from compressor.quantization.conversion import convert
from compressor.quantization.targets import TARGETS, TargetName
from compressor.records.environment import environment
from tests.quantization.rounded import rounded, task_of

QEMU = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
RUN = """
import sys
import numpy as np
import onnxruntime

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
np.save("outputs.npy", session.run(None, {"input": np.load("inputs.npy")})[0])
"""


def largest_difference(target: TargetName, directory: Path) -> float:
    """Between the outputs here and on a Haswell, of a network whose weights and activations are near their limits."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(parameter.sign() * parameter.abs().max())
    images = torch.rand(16, 3, 8, 8).round()
    made = rounded(network, images, limit=TARGETS[target].weight_limit)
    graph = convert(made.graph, made.plan, made.affines, made.weights)
    model = to_unchecked_onnx(graph, task_of(images), directory / "model.onnx")
    np.save(directory / "inputs.npy", images.numpy())
    (directory / "run.py").write_text(RUN)
    assert QEMU is not None
    subprocess.run(
        [QEMU, "-cpu", "Haswell", Path(sys.executable).resolve(), "run.py"],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    here = open_session(model.path, threads=1).run(None, {"input": images.numpy()})[0]
    return float(np.abs(np.load(directory / "outputs.npy") - here).max())


@pytest.mark.skipif(QEMU is None, reason="qemu-x86_64 is not installed")
def test_portable_outputs_are_equal_without_vnni_and_those_of_x86_vnni_are_not(tmp_path: Path) -> None:
    differences = {}
    for target in ("portable", "x86-vnni"):
        (tmp_path / target).mkdir()
        differences[target] = largest_difference(target, tmp_path / target)
    assert differences["portable"] == 0
    if {"avx_vnni", "avx512_vnni"} & set(environment()["cpu_flags"]):
        assert differences["x86-vnni"] > 0
