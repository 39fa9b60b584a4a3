"""Comparison of outputs."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor import Samples, Task
from compressor.errors import StageError
from compressor.export.to_onnx import to_onnx


def test_outputs_that_are_not_finite_are_told_as_such(tmp_path: Path) -> None:
    holed = Samples((torch.tensor([[1.0], [math.nan]]),), torch.zeros(2))
    task = Task(train=holed, validation=holed, test=holed, calibration=holed, example_inputs=(torch.ones(2, 1),))
    with pytest.raises(StageError, match=r"must be finite numbers on the validation split, found NaN or infinity"):
        to_onnx(nn.Linear(1, 1), task, tmp_path / "model.onnx")
