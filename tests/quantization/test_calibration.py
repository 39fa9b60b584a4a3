"""Showing samples to a graph: what is kept of them, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from compressor import Samples, StageContext, Task, TorchModel
from compressor.errors import InputError
from compressor.quantization.calibration import FEW_SAMPLES, calibrate, calibration_samples, observe
from compressor.quantization.float_graph import float_graph, fold_batch_norms
from compressor.quantization.int8_plan import Int8Plan, plan_int8
from compressor.quantization.ranges import RangeMethod
from compressor.references.reference import Reference
from compressor.stages.int8_ptq import Int8Ptq
from tests.example_models import SeparableNetwork
from tests.networks import PlainNetwork, ResidualNetwork


@pytest.fixture(scope="module", params=[ResidualNetwork, SeparableNetwork], ids=lambda network: network.__name__)
def planned(request: pytest.FixtureRequest, digits_task: Task) -> tuple[GraphModule, Int8Plan]:
    torch.manual_seed(0)
    return plan_int8(fold_batch_norms(float_graph(request.param().eval(), digits_task)))


def said_by(stage: Int8Ptq, module: nn.Module, task: Task, directory: Path) -> list[str]:
    said: list[str] = []
    model = TorchModel(module.eval(), Reference(factory="tests.networks:PlainNetwork"))
    stage.apply(model, task, StageContext(model, torch.device("cpu"), 0, directory, said.append))
    return said


def test_minmax_is_that_of_all_values(planned: tuple[GraphModule, Int8Plan], digits_task: Task) -> None:
    graph, plan = planned
    names = plan.tensors_with_range
    batches = list(observe(graph, names, digits_task.calibration, range(256)))
    values: dict[str, Tensor] = {name: torch.cat([batch[name].flatten() for batch in batches]) for name in names}
    assert calibrate(graph, plan, digits_task.calibration, range(256), "minmax") == {
        name: (min(float(seen.min()), 0.0), max(float(seen.max()), 0.0)) for name, seen in values.items()
    }


@pytest.mark.parametrize("method", ["minmax", "percentile", "mse"])
def test_order_of_samples_changes_no_range(
    planned: tuple[GraphModule, Int8Plan], digits_task: Task, method: RangeMethod
) -> None:
    forwards, backwards = (
        calibrate(*planned, digits_task.calibration, order, method) for order in (range(256), range(255, -1, -1))
    )
    for name, (low, high) in forwards.items():
        # a sample at another place of a batch may be summed up in another order, and leave its bin
        assert backwards[name] == pytest.approx((low, high), abs=1e-3 * (high - low))


def test_samples_to_calibrate_on_are_spread_over_the_split(digits_task: Task) -> None:
    assert calibration_samples(digits_task.calibration, 8) == [0, 32, 64, 96, 128, 160, 192, 224]
    assert calibration_samples(digits_task.calibration, 1000) == list(range(256))


@pytest.mark.parametrize("count", [0, 7])
def test_too_few_samples_are_refused(count: int) -> None:
    split = Samples((torch.zeros(count, 1, 8, 8),), torch.zeros(count, dtype=torch.long))
    with pytest.raises(InputError, match=f"the calibration split must have at least 8 samples, got {count}"):
        calibration_samples(split, 512)


def test_few_samples_are_enough_and_said_to_be_few(digits_task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = PlainNetwork()
    few = said_by(Int8Ptq(calibration_samples=8), network, digits_task, tmp_path)
    assert few[0] == "calibrated on 8 samples, fewer than 64: ranges may be too small"
    enough = said_by(Int8Ptq(calibration_samples=FEW_SAMPLES), network, digits_task, tmp_path)
    assert enough[0] == "calibrated on 64 samples"
