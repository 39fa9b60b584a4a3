"""Open axes at other sizes than the example's, and the operators that are right there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compressor import Samples, Task
from compressor.errors import StageError
from compressor.export.open_axes import check_open_axes
from compressor.export.to_onnx import to_onnx


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def task_of(shape: tuple[int, ...], *, axes: dict[int, str]) -> Task:
    x = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0))
    split = Samples((x,), torch.zeros(6, dtype=torch.long))
    return Task(split, split, split, split, (x[:2],), dynamic_axes=({0: "batch", **axes},))


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.adaptive_avg_pool1d(x, 4),
        lambda x: F.adaptive_max_pool1d(x, 4),
        lambda x: F.interpolate(x, size=5, mode="nearest"),
        lambda x: F.interpolate(x, scale_factor=1.7, mode="nearest"),
    ],
    ids=["average", "largest", "nearest_to_a_size", "nearest_by_a_factor"],
)
def test_pools_and_neighbours_are_right_at_every_length(pool: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    exported = to_onnx(Function(pool), task_of((3, 20), axes={2: "time"}), tmp_path / "model.onnx")
    for length in (7, 20, 33):
        x = torch.randn(3, 3, length, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(exported.predict((x,)), pool(x))


def test_nearest_neighbours_of_a_fixed_size_are_those_of_pytorch_at_every_ratio(tmp_path: Path) -> None:
    def resize(x: Tensor) -> Tensor:
        return torch.cat([F.interpolate(x, size=size, mode="nearest") for size in range(1, 30)], dim=-1)

    task = task_of((2, 14), axes={})
    exported = to_onnx(Function(resize), task, tmp_path / "model.onnx")
    torch.testing.assert_close(exported.predict(task.example_inputs), resize(*task.example_inputs), rtol=0, atol=0)


def test_clamp_takes_an_int_beside_a_float(tmp_path: Path) -> None:
    task = task_of((4,), axes={})
    exported = to_onnx(Function(lambda x: x.clamp(0, 0.5)), task, tmp_path / "model.onnx")
    (x,) = task.example_inputs
    torch.testing.assert_close(exported.predict((x,)), x.clamp(0, 0.5), rtol=0, atol=0)


def test_length_that_must_be_even_is_tried_at_even_lengths(tmp_path: Path) -> None:
    def halve(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1] // 2, 2).mean(2)

    to_onnx(Function(halve), task_of((20,), axes={1: "time"}), tmp_path / "model.onnx")


def test_outputs_that_differ_at_another_size_are_refused_with_axis_and_size(tmp_path: Path) -> None:
    task = task_of((20,), axes={1: "time"})
    exported = to_onnx(Function(lambda x: x * 2), task, tmp_path / "model.onnx")

    def reference(inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0] * inputs[0].shape[1] / 10  # as the file at the length of the example alone

    with pytest.raises(StageError, match=r"PyTorch's outputs with time = 31, not only with time = 20, got a relative"):
        check_open_axes(exported, reference, task, tolerance=1e-4)


def test_axis_that_forward_takes_at_no_other_size_is_refused(tmp_path: Path) -> None:
    task = task_of((20,), axes={1: "time"})
    exported = to_onnx(Function(lambda x: x * 2), task, tmp_path / "model.onnx")

    def reference(inputs: tuple[Tensor, ...]) -> Tensor:
        return inputs[0].reshape(-1, 20)[: len(inputs[0])] + inputs[0]

    with pytest.raises(StageError, match="axis 'time' is open in dynamic_axes, so forward must take it at other sizes"):
        check_open_axes(exported, reference, task, tolerance=1e-4)


def test_indices_of_an_adaptive_pool_are_refused_by_name(tmp_path: Path) -> None:
    def pool(x: Tensor) -> Tensor:
        return F.adaptive_max_pool1d(x, 4, return_indices=True)[1].float()

    with pytest.raises(StageError, match=r"return_indices.*adaptive_max_pool1d"):
        to_onnx(Function(pool), task_of((3, 20), axes={2: "time"}), tmp_path / "model.onnx")


def test_axis_that_a_table_fixes_is_named(tmp_path: Path) -> None:
    table = torch.randn(20)
    with pytest.raises(StageError, match=r"axis 1 of .*, 'time', is open, but forward runs at 20 alone"):
        to_onnx(Function(lambda x: x + table), task_of((20,), axes={1: "time"}), tmp_path / "model.onnx")


def test_what_the_passes_of_the_exporter_raise_is_told(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="forward must have a form in ONNX"):
        to_onnx(
            Function(lambda x: x.chunk(4, -1)[0].mean(-1)), task_of((3, 20), axes={2: "time"}), tmp_path / "model.onnx"
        )
