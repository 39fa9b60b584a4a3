from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compressor import Samples, Task
from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.pruning.allocation import by_ratios, multiples_of
from compressor.pruning.channels import prunable_groups
from compressor.pruning.criteria import scores
from compressor.pruning.group_sensitivity import (
    GroupSensitivity,
    check_sensitivity,
    flat_sensitivity,
    measure_sensitivity,
    ratios_by_sensitivity,
)
from compressor.pruning.groups import silence
from compressor.records.sensitivity_curves import GroupCurve
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.sensitivity import Sensitivity
from compressor.stages.training import Training
from compressor.task import Metric, evaluate
from compressor.testing import check_stage

CPU = torch.device("cpu")
GRID = (0.25, 0.5, 0.75)


class UnreadableSplit:
    """A split that must not be used."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        msg = "this split was read"
        raise AssertionError(msg)


@pytest.fixture(scope="module")
def model(digits_task, tmp_path_factory) -> TorchModel:
    """A trained network; every second unit of `fc1` does nothing."""
    fresh = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    with torch.no_grad():
        # with nothing before and behind them, their gradients are zero, so they stay as they are
        fresh.module.fc1.weight[::2], fresh.module.fc1.bias[::2], fresh.module.fc2.weight[:, ::2] = 0, 0, 0
    return Training(epochs=8, batch_size=64).apply(fresh, digits_task, context(fresh, tmp_path_factory.mktemp("work")))


@pytest.fixture(scope="module")
def groups(model, digits_task):
    return prunable_groups(model.module, digits_task.example_inputs)


@pytest.fixture(scope="module")
def found(model, groups, digits_task):
    return measured(model, groups, replace(digits_task, test=UnreadableSplit()))


def context(model: TorchModel, directory) -> StageContext:
    return StageContext(model, CPU, 0, directory, lambda _line: None)


def measured(model, groups, task: Task, *, samples: int = 2000, criterion="l2", log=lambda _line: None):
    return measure_sensitivity(
        model, groups, task, criterion=criterion, grid=GRID, samples=samples, device=CPU, log=log
    )


def test_each_value_is_that_of_the_model_in_which_nothing_reads_those_channels(found, model, groups, digits_task):
    scored = scores("l2", model.module, groups, digits_task)
    for group in groups:
        removal = by_ratios({group.path: 0.5}, [group], scored, step_of=multiples_of(1))
        silent = silence(model.module, [group], removal)
        wanted = evaluate(digits_task.metrics, replace(model, module=silent).predict, digits_task.validation)
        assert len(removal[group.path]) == group.units // 2
        assert found.groups[group.path].values[1] == wanted["accuracy"]


def test_record_says_what_was_measured(found, model, digits_task):
    assert list(found.groups) == ["conv1", "conv2", "fc1"]
    assert [curve.channels for curve in found.groups.values()] == [16, 32, 64]
    assert (found.model, found.criterion, found.ratios) == (model.digest, "l2", GRID)
    assert (found.metric.name, found.samples) == ("accuracy", 180)
    assert found.value == evaluate(digits_task.metrics, model.predict, digits_task.validation)["accuracy"] > 0.9


def test_group_with_idle_channels_shows_no_fall_and_loses_most(found, model, groups, digits_task):
    assert found.falls("fc1")[:2] == (0, 0)
    assert found.falls("conv1")[1] > 0
    ratios = ratios_by_sensitivity(found, groups, pruning_ratio=0.4)
    assert ratios["fc1"] == max(ratios.values()) > 0.45
    scored = scores("l2", model.module, groups, digits_task)
    accuracies = [
        evaluate(digits_task.metrics, replace(model, module=silent).predict, digits_task.validation)["accuracy"]
        for shares in (ratios, dict.fromkeys(ratios, 0.4))
        for silent in [silence(model.module, groups, by_ratios(shares, groups, scored, step_of=multiples_of(1)))]
    ]
    assert accuracies[0] > accuracies[1]


@pytest.mark.parametrize("pruning_ratio", [0.01, 0.2, 0.5, 0.8, 0.95])
def test_share_of_all_channels_is_the_one_asked(found, groups, pruning_ratio):
    ratios = ratios_by_sensitivity(found, groups, pruning_ratio=pruning_ratio)
    lost = sum(ratios[group.path] * group.units for group in groups)
    assert lost / sum(group.units for group in groups) == pytest.approx(pruning_ratio, abs=1e-9)


def test_every_group_falls_by_the_same(groups, found):
    # straight lines through the origin of slopes 1, 2 and 4: shares as 4 to 2 to 1
    lines = {
        path: GroupCurve(channels=curve.channels, values=tuple(1 - slope * ratio / 4 for ratio in GRID))
        for (path, curve), slope in zip(found.groups.items(), (1, 2, 4), strict=True)
    }
    ratios = ratios_by_sensitivity(found.model_copy(update={"groups": lines, "value": 1.0}), groups, pruning_ratio=0.2)
    # up to the last ratio that was measured; 0.2 of all channels leaves even the first below that
    assert ratios["conv1"] / ratios["conv2"] == pytest.approx(2, rel=1e-4)
    assert ratios["conv2"] / ratios["fc1"] == pytest.approx(2, rel=1e-4)


def test_larger_ratio_removes_the_same_units_and_more(found, model, groups, digits_task):
    scored = scores("l2", model.module, groups, digits_task)
    before = {group.path: set() for group in groups}
    for percent in range(2, 100, 2):
        shares = ratios_by_sensitivity(found, groups, pruning_ratio=percent / 100)
        removal = by_ratios(shares, groups, scored, step_of=multiples_of(4))
        assert all(before[path] <= set(units) for path, units in removal.items())
        before = {path: set(units) for path, units in removal.items()}


def test_no_group_is_emptied(found, model, groups, digits_task):
    ratios = ratios_by_sensitivity(found, groups, pruning_ratio=0.999)
    removal = by_ratios(ratios, groups, scores("l2", model.module, groups, digits_task), step_of=multiples_of(1))
    assert [group.units - len(removal[group.path]) for group in groups] == [1, 1, 1]


def test_groups_that_do_not_matter_lose_equal_shares(model, groups, digits_task):
    flat = flat_sensitivity(model, groups, digits_task, criterion="l2", grid=GRID)
    ratios = ratios_by_sensitivity(flat, groups, pruning_ratio=0.3)
    assert list(ratios.values()) == pytest.approx([0.3] * 3)


def test_samples_are_spread_over_a_validation_split_that_is_sorted(model, groups, digits_task):
    split = digits_task.validation
    order = split.targets.argsort()
    images, targets = split.inputs[0][order], split.targets[order]
    some = measured(model, groups, replace(digits_task, validation=Samples((images,), targets)), samples=60)
    wanted = evaluate(digits_task.metrics, model.predict, Samples((images[::3],), targets[::3]))
    assert (some.samples, some.value) == (60, wanted["accuracy"])


def test_metric_that_is_better_when_lower_falls_when_it_rises(model, groups, digits_task):
    def error(logits, targets):
        return torch.stack([(logits.argmax(1) != targets).sum(), torch.tensor(len(targets))]).double()

    metric = Metric("error", error, lambda sums: float(sums[0] / sums[1]), higher_is_better=False)
    right, wrong = (
        measured(model, groups, replace(digits_task, metrics=ms)) for ms in (digits_task.metrics, (metric,))
    )
    for path in right.groups:
        assert wrong.falls(path) == pytest.approx(right.falls(path))


def test_metric_that_is_no_number_is_refused_with_the_group_and_the_ratio(model, groups, digits_task):
    def hits(logits, targets):
        return (logits.argmax(1) == targets).sum().double().reshape(1)

    metric = Metric("log", hits, lambda sums: float(sums[0]) if sums[0] > 160 else float("inf"))
    with pytest.raises(
        StageError, match=r"log on validation must be a finite number, got inf for conv1 cut by 0.75; leave"
    ):
        measured(model, groups, replace(digits_task, metrics=(metric,)))


def test_progress_is_told_in_a_few_lines(model, groups, digits_task):
    lines = []
    measured(model, groups, digits_task, log=lines.append)
    assert lines[-1] == "3 of 3 groups measured"
    assert len(lines) <= 4


def test_sensitivity_is_stored_with_the_model_and_left_behind_by_other_weights(found, model, tmp_path):
    carrying = model.with_attachment(GroupSensitivity(found))
    carrying.save(tmp_path)
    assert TorchModel.load(tmp_path).attachment(GroupSensitivity) == GroupSensitivity(found)
    assert carrying.with_module(carrying.module).attachment(GroupSensitivity) is None


def test_damaged_sensitivity_is_refused(found, model, tmp_path):
    model.with_attachment(GroupSensitivity(found)).save(tmp_path)
    file = tmp_path / "sensitivity.json"
    file.write_text(file.read_text().replace('"ratios"', '"rations"'))
    with pytest.raises(InputError, match=r"sensitivity\.json must be a sensitivity(.|\n)*measure it again"):
        TorchModel.load(tmp_path)


def test_sensitivity_of_this_model_and_criterion_and_these_groups_is_accepted(found, model, groups):
    assert check_sensitivity(model.with_attachment(GroupSensitivity(found)), groups, criterion="l2") is found


def test_model_without_sensitivity_is_refused_with_what_to_do(model, groups):
    with pytest.raises(StageError, match="add `- stage: sensitivity` directly before the pruning"):
        check_sensitivity(model, groups, criterion="l2")


def test_sensitivity_of_another_model_is_refused(found, groups):
    other = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=1)
    with pytest.raises(StageError, match="but it was measured on another model; give"):
        check_sensitivity(other.with_attachment(GroupSensitivity(found)), groups, criterion="l2")


def test_sensitivity_by_another_criterion_and_of_other_groups_names_both(found, model, groups):
    carrying = model.with_attachment(GroupSensitivity(found))
    with pytest.raises(StageError, match="its criterion is l2, not taylor; its groups differ in conv1; give"):
        check_sensitivity(carrying, groups[1:], criterion="taylor")


def test_stage_keeps_the_contract_and_the_weights(model, digits_task, tmp_path):
    stage = Sensitivity(grid=(0.5,), samples=50)
    check_stage(stage, model, digits_task)
    result = stage.apply(model, digits_task, context(model, tmp_path))
    assert result.digest == model.digest
    assert result.attachment(GroupSensitivity).curves.ratios == (0.5,)


def test_protected_layers_are_not_cut(model, digits_task, tmp_path):
    result = Sensitivity(grid=(0.5,), samples=50, protect=("fc*",)).apply(model, digits_task, context(model, tmp_path))
    assert list(result.attachment(GroupSensitivity).curves.groups) == ["conv1", "conv2"]


def test_rehearsal_gives_a_sensitivity_that_a_pruning_accepts(model, groups, digits_task):
    rehearsed = Sensitivity().rehearse(model, model, digits_task)
    check_sensitivity(rehearsed, groups, criterion="l2")


@pytest.mark.parametrize("grid", [(), (0.5, 0.5), (0.5, 0.2), (0.0, 0.5), (0.5, 1.0)])
def test_grid_that_does_not_rise_between_0_and_1_is_refused(grid):
    with pytest.raises(ValidationError):
        Sensitivity(grid=grid)
