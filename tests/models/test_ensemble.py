import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from compressor.config.pipeline_file import load
from compressor.errors import ConfigError, InputError
from compressor.export.to_onnx import to_onnx
from compressor.models.artifact import TorchModel
from compressor.models.ensemble import Ensemble, combine_logits, ensemble, members_of
from compressor.models.trusted import Trusted
from compressor.references.reference import Reference, prefer_modules_in
from compressor.run.keys import list_steps
from compressor.run.pipeline import run
from compressor.run.store import Store
from networks import PlainNetwork, ResidualNetwork

PLAIN = {"factory": "networks:PlainNetwork"}
RESIDUAL = {"factory": "networks:ResidualNetwork"}

CODE = """
import torch
from sklearn.datasets import load_digits
from torch import nn

from compressor import Samples, Task


def network(width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def task():
    digits = load_digits()
    images = (torch.from_numpy(digits.images).float() / 16).unsqueeze(1)
    targets = torch.from_numpy(digits.target).long()

    def split(start, stop):
        return Samples((images[start:stop],), targets[start:stop])

    return Task(
        train=split(0, 400), validation=split(400, 500), test=split(500, 700), calibration=split(0, 64),
        example_inputs=(images[:2],),
    )
"""
PIPELINE = """\
name: small
model:
  factory: compressor:ensemble
  members:
    - {factory: digits_code:network, weights_file: weights/a.safetensors}
    - {factory: digits_code:network, width: 12, weights_file: weights/b.safetensors}
  combine: mean_logit
  weights: [1, 2]
task: {factory: digits_code:task}
stages:
  - {stage: distillation, student: {factory: digits_code:network}, epochs: 1}
  - {stage: onnx_export}
"""


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "digits_code.py").write_text(CODE)
    (tmp_path / "small.yaml").write_text(PIPELINE)
    (tmp_path / "weights").mkdir()
    save_file(network(8).state_dict(), tmp_path / "weights/a.safetensors")
    save_file(network(12).state_dict(), tmp_path / "weights/b.safetensors")
    return tmp_path


def baseline_step(directory: Path):
    pipeline = load(directory / "small.yaml")
    with prefer_modules_in(directory):
        return list_steps(pipeline, Store(directory), data={}, device="cpu")[0]


@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.25, 0.75)])
def test_mean_probability_is_the_weighted_mean_of_the_softmaxes(weights):
    logits = 3 * torch.randn(2, 16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    combined = combine_logits(list(logits), weights=weights, combine="mean_probability")
    mean = weights[0] * logits[0].softmax(1) + weights[1] * logits[1].softmax(1)
    torch.testing.assert_close(combined.softmax(1), mean)  # the default tolerance of float64


def test_mean_logit_is_the_weighted_mean_of_the_logits():
    logits = torch.randn(2, 16, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    combined = combine_logits(list(logits), weights=(0.25, 0.75), combine="mean_logit")
    torch.testing.assert_close(combined, torch.lerp(logits[0], logits[1], 0.75))


def test_probabilities_too_small_for_a_float_keep_their_logarithm_and_gradient():
    logits = torch.tensor([[500.0, 0.0, -500.0]], requires_grad=True)
    combined = combine_logits([logits, logits], weights=(0.5, 0.5), combine="mean_probability")
    torch.testing.assert_close(combined, logits.detach())
    combined[0, 2].backward()
    assert torch.isfinite(logits.grad).all()


def test_weights_are_scaled_to_sum_to_one_and_told_with_their_members():
    modules = [PlainNetwork(), ResidualNetwork()]
    assert members_of(Ensemble(modules, weights=[1, 3])) == ((modules[0], 0.25), (modules[1], 0.75))
    assert members_of(Ensemble(modules)) == ((modules[0], 0.5), (modules[1], 0.5))
    assert members_of(modules[0]) == ((modules[0], 1.0),)


@pytest.mark.parametrize("combine", ["mean_probability", "mean_logit"])
def test_exported_ensemble_gives_equal_outputs_under_onnx_runtime(combine, digits_task, tmp_path):
    arguments = {"members": [PLAIN, RESIDUAL], "combine": combine, "weights": [1, 2]}
    model = TorchModel.build(Reference(factory="compressor:ensemble", **arguments), seed=0)
    exported = to_onnx(model.module, digits_task, tmp_path / "model.onnx")
    images = digits_task.test.inputs[0][:33]
    # float32 sums in another order
    torch.testing.assert_close(exported.predict((images,)), model.predict((images,)), rtol=1e-4, atol=1e-5)


def test_untrained_members_differ_and_the_seed_decides_them():
    reference = Reference(factory="compressor:ensemble", members=[PLAIN, PLAIN])
    one, again, other = (TorchModel.build(reference, seed=seed).module for seed in (0, 0, 1))
    first = [module.members[0].conv1.weight for module in (one, again, other)]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(first[0], one.members[1].conv1.weight)


def test_member_loads_its_weights_file(tmp_path, digits_task):
    trained = PlainNetwork().eval()
    save_file(trained.state_dict(), tmp_path / "a.safetensors")
    module = ensemble([{**PLAIN, "weights_file": str(tmp_path / "a.safetensors")}], combine="mean_logit").eval()
    assert torch.equal(module(*digits_task.example_inputs), trained(*digits_task.example_inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"members": []}, "at least one member, got none", id="none"),
        pytest.param({"members": PLAIN}, "members must be a list of references, got {", id="no-list"),
        pytest.param({"members": [PLAIN, {"factory": "x"}]}, r"members\.1 must be a reference .*got 'x'", id="factory"),
        pytest.param({"members": [PLAIN, 3]}, r"members\.1 must be a reference", id="no-mapping"),
        pytest.param({"members": [PLAIN], "weights": [1, 2]}, "one per member, 1, got 2", id="too-many-weights"),
        pytest.param({"members": [PLAIN] * 2, "weights": [1, 0]}, "weights must be positive", id="weight-zero"),
        pytest.param({"members": [PLAIN], "weights": [float("nan")]}, "weights must be positive", id="weight-nan"),
        pytest.param({"members": [PLAIN], "combine": "mean_logits"}, "did you mean 'mean_logit'", id="combine"),
    ],
)
def test_ensemble_that_cannot_be_built_is_explained(arguments, message):
    with pytest.raises(InputError, match=message):
        ensemble(**arguments)


def test_members_of_different_classes_are_refused_at_first_use():
    module = Ensemble([nn.Linear(64, 10), nn.Linear(64, 7)])
    with pytest.raises(InputError, match=r"outputs of one shape, .*got \[\(2, 10\), \(2, 7\)\]"):
        module(torch.zeros(2, 64))


def test_saved_ensemble_reloads_where_its_weights_files_are_gone(tmp_path, digits_task):
    save_file(PlainNetwork().state_dict(), tmp_path / "a.safetensors")
    members = [{**PLAIN, "weights_file": str(tmp_path / "a.safetensors")}, RESIDUAL]
    reference = Reference(factory="compressor:ensemble", members=members, weights=[1, 2])
    model = TorchModel.build(reference, seed=0)
    (tmp_path / "a.safetensors").unlink()
    model.save(tmp_path)
    assert str(tmp_path) not in (tmp_path / "model.json").read_text()
    for loaded in (TorchModel.load(tmp_path), TorchModel.load(tmp_path, trusted=Trusted((reference,)))):
        assert torch.equal(loaded.predict(digits_task.example_inputs), model.predict(digits_task.example_inputs))


def test_saved_ensemble_of_other_members_is_refused(tmp_path):
    reference = Reference(factory="compressor:ensemble", members=[PLAIN, RESIDUAL])
    TorchModel.build(reference, seed=0).save(tmp_path)
    other = Reference(factory="compressor:ensemble", members=[PLAIN, PLAIN])
    with pytest.raises(InputError, match="one that the pipeline names"):
        TorchModel.load(tmp_path, trusted=Trusted((other,)))


def test_content_key_changes_with_a_members_weights_and_code_and_not_with_their_place(directory, tmp_path_factory):
    key = baseline_step(directory).key
    moved = tmp_path_factory.mktemp("moved")
    for name in ("small.yaml", "digits_code.py", "weights"):
        (directory / name).rename(moved / name)
    assert baseline_step(moved).key == key
    save_file(network(12).state_dict(), moved / "weights/b.safetensors")
    with_other_weights = baseline_step(moved).key
    (moved / "small.yaml").write_text(PIPELINE.replace("task: {factory: digits_code", "task: {factory: task_code"))
    (moved / "task_code.py").write_text(CODE)
    with_task_elsewhere = baseline_step(moved).key
    (moved / "digits_code.py").write_text(CODE.replace("nn.ReLU", "nn.Tanh"))
    assert len({key, with_other_weights, with_task_elsewhere, baseline_step(moved).key}) == 4


def test_missing_weights_of_a_member_are_told_with_their_place(directory):
    (directory / "weights/b.safetensors").unlink()
    with pytest.raises(ConfigError) as raised:
        load(directory / "small.yaml")
    (problem,) = raised.value.problems
    assert (problem.line, problem.column) == (6, 63)
    assert problem.message.startswith(
        f"model.members.1.weights_file must exist, but {directory / 'weights/b.safetensors'}"
    )


def test_member_whose_factory_is_no_reference_is_told_with_its_place(directory):
    (directory / "small.yaml").write_text(PIPELINE.replace("digits_code:network, width", "digits_code, width"))
    with pytest.raises(ConfigError) as raised:
        load(directory / "small.yaml")
    (problem,) = raised.value.problems
    assert (problem.line, problem.column) == (6, 17)
    assert problem.message.startswith("model.members.1.factory must be module:attribute")


def test_settings_show_the_weights_of_members_relative_to_the_file(directory):
    settings = load(directory / "small.yaml").settings
    assert str(directory) not in json.dumps(settings)
    assert settings["model"]["members"][1]["weights_file"] == "weights/b.safetensors"


def test_ensemble_runs_as_the_model_of_a_pipeline_and_is_taken_from_the_store(directory):
    pipeline, cpu = load(directory / "small.yaml"), torch.device("cpu")
    report = run(pipeline, directory / "runs", device=cpu, max_seconds=0)
    assert [row.stage for row in report.rows] == ["baseline", "distillation", "onnx_export"]
    # every member is in the file: 2 layers of 8 and 12 channels
    assert report.rows[0].measurement.parameters == sum(64 * w + w + 10 * w + 10 for w in (8, 12))
    again = run(load(directory / "small.yaml", ["stages.0.epochs=2"]), directory / "runs", device=cpu, max_seconds=0)
    assert [row.reused for row in again.rows] == [True, False, False]
