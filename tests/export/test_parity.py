"""Comparison of outputs."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from compressor import Samples, Task
from compressor.errors import StageError
from compressor.export.parity import relative_error
from compressor.export.to_onnx import to_onnx
from compressor.task import spread


def test_relative_error_is_root_mean_square_over_that_of_the_reference() -> None:
    reference = torch.tensor([[3.0, 4.0]])
    assert relative_error(reference + torch.tensor([[0.3, 0.4]]), reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2)) == 0


def test_relative_error_of_other_shapes_and_of_nan_is_within_no_tolerance() -> None:
    reference = torch.ones(2, 2)
    assert relative_error(torch.ones(2, 3), reference) == math.inf
    assert not relative_error(torch.full((2, 2), math.nan), reference) <= 1
    assert not relative_error(torch.ones(2, 2), torch.zeros(2, 2)) <= 1


def test_outputs_that_are_not_finite_are_told_as_such(tmp_path: Path) -> None:
    holed = Samples((torch.tensor([[1.0], [math.nan]]),), torch.zeros(2))
    task = Task(train=holed, validation=holed, test=holed, calibration=holed, example_inputs=(torch.ones(2, 1),))
    with pytest.raises(StageError, match=r"must be finite numbers on the validation split, found NaN or infinity"):
        to_onnx(nn.Linear(1, 1), task, tmp_path / "model.onnx")


def test_spread_reaches_every_class_of_a_sorted_split() -> None:
    targets = torch.arange(10).repeat_interleave(100)
    split = Samples((targets,), targets)
    assert sorted({int(split[index][1]) for index in spread(split, 20)}) == list(range(10))
    assert spread(split, 5000) == list(range(1000))
