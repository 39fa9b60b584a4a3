from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from compressor import EpochLosses, Finding, Reached, Samples, Task
from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.pruning.goals import measure_of
from compressor.pruning.group_sensitivity import GroupSensitivity
from compressor.pruning.staircase import measure_step
from compressor.references.reference import Reference
from compressor.stage import StageContext
from compressor.stages.magnitude_pruning import MagnitudePruning
from compressor.stages.sensitivity import Sensitivity
from compressor.stages.training import Training
from compressor.task import evaluate
from compressor.testing import check_stage
from networks import WideNetwork

PLAIN = Reference(factory="networks:PlainNetwork")


def context(model: TorchModel, directory, *, lines=None, reached=None, losses=None) -> StageContext:
    log = (lambda _line: None) if lines is None else lines.append

    def report(finding: Finding) -> None:
        if reached is not None and isinstance(finding, Reached):
            reached.append((finding.setting, finding.asked, finding.achieved))
        if losses is not None and isinstance(finding, EpochLosses):
            losses.append(finding.means)

    return StageContext(model, torch.device("cpu"), 0, directory, log, report)


@pytest.fixture
def plain() -> TorchModel:
    return TorchModel.build(PLAIN, seed=0)


def test_recovery_distils_from_the_baseline_and_regains_accuracy(digits_task, tmp_path):
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    lines: list[str] = []
    context = StageContext(model, torch.device("cpu"), 0, tmp_path, lines.append)
    baseline = Training(epochs=10, batch_size=64).apply(model, digits_task, context)
    context = StageContext(baseline, torch.device("cpu"), 0, tmp_path, lines.append)
    recovery = {"epochs": 4, "batch_size": 64}
    bare = MagnitudePruning(pruning_ratio=0.5).apply(baseline, digits_task, context)
    recovered = MagnitudePruning(pruning_ratio=0.5, recovery=recovery).apply(baseline, digits_task, context)
    accuracies = [
        evaluate(digits_task.metrics, artifact.predict, digits_task.test)["accuracy"]
        for artifact in (baseline, bare, recovered)
    ]
    assert accuracies[0] > 0.95
    assert accuracies[1] < accuracies[2] - 0.05
    assert accuracies[2] > 0.9
    assert any("removed 56 of 112 channels (50%) in groups: 3" in line for line in lines)
    assert any("kd" in line for line in lines)


def test_recovery_that_does_not_fit_the_models_is_refused_in_the_rehearsal(digits_task):
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    recovery = {"epochs": 1, "losses": {"hint": {"layers": {"conv2": "conv3"}}}}
    stage = MagnitudePruning.model_validate({"pruning_ratio": 0.5, "recovery": recovery})
    with pytest.raises(InputError, match=r"a layer 'conv3', but has none; did you mean 'conv"):
        stage.rehearse(model, model, digits_task)


def test_rehearsal_gives_a_model_of_the_size_that_will_leave(digits_task, tmp_path):
    model = TorchModel.build(Reference(factory="networks:PlainNetwork"), seed=0)
    stage = MagnitudePruning(pruning_ratio=0.5)
    rehearsed = stage.rehearse(model, model, digits_task)
    pruned = stage.apply(model, digits_task, StageContext(model, torch.device("cpu"), 0, tmp_path, print))
    assert rehearsed.edits == pruned.edits


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give one of pruning_ratio, parameters, macs, size_bytes, latency_ratio, got none"),
        ({"pruning_ratio": 0.5, "macs": 1000}, "got pruning_ratio and macs"),
        ({"parameters": 10, "size_bytes": 10, "latency_ratio": 2.0}, "got parameters and size_bytes and latency_ratio"),
        ({"pruning_ratio": 0.0}, "greater than 0"),
        ({"pruning_ratio": 1.0}, "less than 1"),
        ({"latency_ratio": 1.0}, "greater than 1"),
        ({"macs": 0}, "greater than 0"),
        ({"pruning_ratio": 0.5, "round_to": 0}, "greater than 0"),
        ({"pruning_ratio": 0.5, "criterion": "random"}, "'l2', 'l1', 'bn_scale' or 'taylor'"),
        ({"pruning_ratio": 0.5, "allocation": "local"}, "'uniform', 'global' or 'isomorphic'"),
        ({"pruning_ratio": 0.5, "schedule": {"steps": 2}}, "schedule needs a recovery, which trains between its steps"),
        (
            {"pruning_ratio": 0.5, "schedule": {"steps": 4}, "recovery": {"epochs": 3}},
            "recovery must have an epoch for each of 4 steps, got 3 epochs",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        MagnitudePruning.model_validate(settings)


@pytest.mark.parametrize(
    ("quantity", "allocation"), [("parameters", "isomorphic"), ("macs", "uniform"), ("size_bytes", "global")]
)
def test_half_of_a_quantity_is_reached_and_told(quantity, allocation, plain, digits_task, tmp_path):
    reached: list = []
    lines: list[str] = []
    with measure_of(quantity, plain.module, digits_task) as measured:
        asked = int(measured(plain.module) // 2)
        stage = MagnitudePruning.model_validate({quantity: asked, "allocation": allocation, "round_to": 4})
        found = stage.apply(plain, digits_task, context(plain, tmp_path, lines=lines, reached=reached))
        achieved = measured(found.module)
    assert reached == [(quantity, asked, achieved)]
    assert 0.7 * asked <= achieved <= asked  # four of 16 channels are a quarter of the weights
    module = found.module
    assert all(
        kept % 4 == 0 for kept in (module.conv1.out_channels, module.conv2.out_channels, module.fc1.out_features)
    )
    assert f"{asked:,.0f} asked, {achieved:,.0f} achieved" in "\n".join(lines)


def test_latency_goal_is_reached_and_told(digits_task, tmp_path):
    torch.manual_seed(0)
    wide = TorchModel(WideNetwork().eval(), Reference(factory="networks:WideNetwork"))
    reached: list = []
    stage = MagnitudePruning.model_validate({"latency_ratio": 1.5, "round_to": 16})
    found = stage.apply(wide, digits_task, context(wide, tmp_path, reached=reached))
    ((name, asked, achieved),) = reached
    assert (name, asked) == ("latency_ratio", 1.5)
    assert achieved >= 1.5
    assert found.module.conv2.in_channels < 96


@pytest.mark.parametrize("quantity", ["parameters", "macs", "size_bytes"])
def test_rehearsal_refuses_an_unreachable_goal_at_once(quantity, plain, digits_task):
    stage = MagnitudePruning.model_validate({quantity: 10, "round_to": 8})
    with pytest.raises(StageError, match=f"{quantity} must be at most 10, but the best reachable is [0-9,]+, with"):
        stage.rehearse(plain, plain, digits_task)


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_ratio_that_was_reached_is_told(ratio, plain, digits_task, tmp_path):
    reached: list = []
    MagnitudePruning(pruning_ratio=ratio, round_to=16).apply(
        plain, digits_task, context(plain, tmp_path, reached=reached)
    )
    # conv1 keeps its only 16 channels; conv2 and fc1 keep 16 (24 for a quarter: a tie, to the even) and 32 or 48
    left = {0.25: 16 + 32 + 48, 0.5: 16 + 16 + 32}[ratio]
    assert reached == [("pruning_ratio", ratio, pytest.approx(1 - left / 112))]


def channels_after_each_step(lines) -> list[int]:
    steps = [line.split() for line in lines if line.startswith("removed")]
    return [int(words[3]) - int(words[1]) for words in steps]


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", [112 - 14, 112 - 28, 112 - 42, 56]),
        # the share that is gone: half of 1 - (1 - step/4)³
        ("cubic", [round(112 * (1 - 0.5 * (1 - (1 - step / 4) ** 3))) for step in (1, 2, 3)] + [56]),
    ],
)
def test_schedule_prunes_in_steps_with_an_epoch_after_each_but_the_last(shape, left, plain, digits_task, tmp_path):
    lines: list[str] = []
    records: list = []
    task = replace(digits_task, train=Samples((digits_task.train.inputs[0][:64],), digits_task.train.targets[:64]))
    stage = MagnitudePruning.model_validate(
        {
            "pruning_ratio": 0.5,
            "round_to": 1,
            "allocation": "global",
            "schedule": {"shape": shape, "steps": 4},
            "recovery": {"epochs": 6, "batch_size": 64},
        }
    )
    reached: list = []
    told = context(plain, tmp_path, lines=lines, reached=reached, losses=records)
    found = stage.apply(plain, task, told)
    assert channels_after_each_step(lines) == pytest.approx(left, abs=1)  # whole channels
    assert channels_after_each_step(lines)[-1] == 56
    assert len(records) == 6
    assert reached == [("pruning_ratio", 0.5, 0.5)]
    assert found.module.conv1.out_channels + found.module.conv2.out_channels + found.module.fc1.out_features == 56


def test_steps_too_small_for_the_rounding_wait_for_the_next(plain, digits_task, tmp_path):
    lines: list[str] = []
    task = replace(digits_task, train=Samples((digits_task.train.inputs[0][:64],), digits_task.train.targets[:64]))
    schedule = {"shape": "linear", "steps": 8}
    stage = MagnitudePruning.model_validate(
        {"pruning_ratio": 0.5, "round_to": 16, "schedule": schedule, "recovery": {"epochs": 8}}
    )
    found = stage.apply(plain, task, context(plain, tmp_path, lines=lines))
    left = channels_after_each_step(lines)
    assert left[-1] == found.module.conv1.out_channels + found.module.conv2.out_channels + found.module.fc1.out_features
    assert 112 * 0.4 <= left[-1] <= 112 * 0.6  # half, to one step of 16
    assert len(left) < 8


def test_ratio_that_removes_nothing_in_any_step_is_refused(plain, digits_task, tmp_path):
    stage = MagnitudePruning.model_validate(
        {"pruning_ratio": 0.1, "round_to": 64, "schedule": {"steps": 2}, "recovery": {"epochs": 2}}
    )
    with pytest.raises(StageError, match=r"leaves groups of \[16, 32, 64\] whole; lower round_to"):
        stage.apply(plain, digits_task, context(plain, tmp_path))


def test_goal_is_reached_in_steps(plain, digits_task, tmp_path):
    lines: list[str] = []
    reached: list = []
    task = replace(digits_task, train=Samples((digits_task.train.inputs[0][:64],), digits_task.train.targets[:64]))
    stage = MagnitudePruning.model_validate(
        {
            "parameters": 20_000,
            "round_to": 16,
            "schedule": {"steps": 3},
            "recovery": {"epochs": 3, "losses": {"hard": {}}},
        }
    )
    found = stage.apply(plain, task, context(plain, tmp_path, lines=lines, reached=reached))
    assert reached == [
        ("parameters", 20_000, pytest.approx(sum(p.numel() for p in found.module.parameters()), rel=0.01))
    ]
    assert channels_after_each_step(lines) == sorted(channels_after_each_step(lines), reverse=True)


def test_sensitivity_that_the_model_carries_spares_groups_that_matter(plain, digits_task, tmp_path):
    measured = Sensitivity(grid=(0.5,), samples=20).apply(plain, digits_task, context(plain, tmp_path))
    matters = {"conv1": 0.0, "conv2": 0.9, "fc1": 0.9}  # what is left of the accuracy without half of each
    curves = {
        path: curve.model_copy(update={"values": (matters[path],)})
        for path, curve in measured.attachment(GroupSensitivity).curves.groups.items()
    }
    carried = measured.attachment(GroupSensitivity).curves.model_copy(update={"value": 1.0, "groups": curves})
    stage = MagnitudePruning(pruning_ratio=0.4, allocation="sensitivity", round_to=1)
    found = stage.apply(plain.with_attachment(GroupSensitivity(carried)), digits_task, context(plain, tmp_path))
    shares = [found.module.conv1.out_channels / 16, found.module.conv2.out_channels / 32]
    assert shares[0] > 0.9
    assert shares[1] < 0.6


def test_allocation_by_sensitivity_without_one_is_refused_in_the_rehearsal(plain, digits_task):
    stage = MagnitudePruning(pruning_ratio=0.5, allocation="sensitivity")
    with pytest.raises(StageError, match="add `- stage: sensitivity` directly before the pruning"):
        stage.rehearse(plain, plain, digits_task)


def test_taylor_spares_the_channels_that_the_loss_feels(plain, digits_task, tmp_path):
    with torch.no_grad():
        plain.module.conv2.weight[::2] *= 10
        plain.module.conv2.bias[::2] = -1e4  # large, and silent behind their rectifiers
    alive = plain.module.conv2.weight[1::2]
    found = MagnitudePruning(pruning_ratio=0.5, round_to=1, criterion="taylor").apply(
        plain, digits_task, context(plain, tmp_path)
    )
    assert found.module.conv2.weight.shape[0] == len(alive)
    assert (found.module.conv2.bias > -1).all()


def test_channels_stay_in_multiples_that_fit_this_machine_unless_told(plain, digits_task, tmp_path):
    found = MagnitudePruning(pruning_ratio=0.6).apply(plain, digits_task, context(plain, tmp_path))
    for layer, channels in ((found.module.conv1, 16), (found.module.conv2, 32)):
        step = measure_step()
        while 2 * step > channels:
            step //= 2
        assert layer.out_channels % step == 0


def test_protected_layers_keep_their_channels(plain, digits_task, tmp_path):
    stage = MagnitudePruning(pruning_ratio=0.5, round_to=1, protect=("conv*",))
    found = stage.apply(plain, digits_task, context(plain, tmp_path))
    assert [edit.path for edit in found.edits] == ["fc1", "fc2"]


def test_gpt2_loses_heads_and_hidden_units_through_its_linear_form(tmp_path):
    model = TorchModel.build(Reference(factory="transformer_networks:gpt2"), seed=0)
    tokens = torch.arange(14).view(2, 7)
    samples = Samples((tokens,), torch.zeros(2, dtype=torch.long))
    task = Task(samples, samples, samples, samples, example_inputs=(tokens,))
    stage = MagnitudePruning(pruning_ratio=0.5, round_to=8)
    found = stage.apply(model, task, context(model, tmp_path))
    assert found.edits == stage.rehearse(model, model, task).edits
    attention = found.module.model.transformer.h[0].attn
    assert (attention.num_heads, attention.c_attn.out_features) == (2, 3 * 16)


@pytest.mark.parametrize(
    "settings",
    [
        {"pruning_ratio": 0.5, "recovery": {"epochs": 1}},
        {"pruning_ratio": 0.5, "allocation": "isomorphic", "criterion": "taylor", "round_to": 4},
        {"parameters": 25_000, "allocation": "global", "criterion": "l1", "round_to": 32},
        {"pruning_ratio": 0.5, "round_to": 4, "schedule": {"steps": 2}, "recovery": {"epochs": 2}},
    ],
    ids=["ratio", "taylor", "goal", "schedule"],
)
def test_magnitude_pruning_keeps_the_contract_of_a_stage(settings, plain, digits_task):
    task = replace(digits_task, train=Samples((digits_task.train.inputs[0][:64],), digits_task.train.targets[:64]))
    check_stage(MagnitudePruning.model_validate(settings), plain, task)
