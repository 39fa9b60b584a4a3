"""Submodules of another structure: in the place of others, saved, loaded, and called only if they are trusted."""

import copy

import pytest
import torch
from torch import nn

from compressor import TorchModel
from compressor.errors import InputError, StageError
from compressor.models.edits import Edit, structural_edits
from compressor.models.kept_zeros import KeptZeros, zeros_of
from compressor.models.trusted import Trusted
from compressor.pruning.students import narrower, reborn
from compressor.references.reference import Reference

PLAIN = Reference(factory="networks:PlainNetwork")
HERE = __name__


def two_layers(inputs: int, rank: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))


def split(model: TorchModel, path: str, rank: int, **changes) -> TorchModel:
    layer = model.module.get_submodule(path)
    left, scale, right = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    call = {
        "factory": two_layers,
        "arguments": {"inputs": layer.in_features, "rank": rank, "outputs": layer.out_features},
        "weights": {"0.weight": right[:rank], "1.weight": left[:, :rank] * scale[:rank], "1.bias": layer.bias.detach()},
    }
    return model.with_submodule(path, **{**call, **changes})


@pytest.fixture
def plain() -> TorchModel:
    return TorchModel.build(PLAIN, seed=0)


@pytest.fixture
def low_rank(plain) -> TorchModel:
    return split(plain, "fc1", 8)


def test_full_rank_gives_the_outputs_of_the_whole_layer(plain, digits_task):
    rank = min(plain.module.fc1.weight.shape)
    whole = split(plain, "fc1", rank)
    inputs = digits_task.example_inputs
    # sums of some hundred products in another order
    torch.testing.assert_close(whole.predict(inputs), plain.predict(inputs), rtol=1e-4, atol=1e-5)
    assert isinstance(plain.module.fc1, nn.Linear)


def test_replaced_layers_reload_with_equal_outputs(low_rank, digits_task, tmp_path):
    low_rank.save(tmp_path)
    loaded = TorchModel.load(tmp_path, trusted=Trusted((PLAIN,), frozenset({HERE})))
    assert torch.equal(loaded.predict(digits_task.example_inputs), low_rank.predict(digits_task.example_inputs))
    assert loaded.digest == low_rank.digest


def test_function_outside_the_modules_of_stages_is_not_called(low_rank, tmp_path):
    low_rank.save(tmp_path)
    with pytest.raises(
        InputError, match=rf"'fc1' of .* \(other\), got '{HERE}:two_layers'; define it beside the stage"
    ):
        TorchModel.load(tmp_path, trusted=Trusted((PLAIN,), frozenset({"other"})))
    with pytest.raises(InputError, match=r"'fc1' of what a stage gives must be a function that the module"):
        low_rank.check(Trusted((PLAIN,)), "what a stage gives")


@pytest.mark.parametrize("name", ["torch.nn.Linear", "nn.Linear", "structural_edits", "plain.fget", "Reference"])
def test_only_functions_that_the_module_of_a_stage_defines_are_called(name, low_rank, tmp_path, monkeypatch):
    low_rank.save(tmp_path)
    file = tmp_path / "model.json"
    file.write_text(file.read_text().replace(f"{HERE}:two_layers", f"{HERE}:{name}"))
    monkeypatch.setattr(Reference, "call", lambda _reference: pytest.fail("called"))
    with pytest.raises(InputError, match=r"(must be a function that the module of a stage|must exist)"):
        TorchModel.load(tmp_path, trusted=Trusted((PLAIN,), frozenset({HERE})))


def test_replaced_layers_can_be_pruned_trained_and_born_again(low_rank, digits_task, tmp_path):
    smaller = narrower(low_rank, digits_task.example_inputs, width=0.5, round_to=2)
    assert smaller.module.fc1[0].in_features < low_rank.module.fc1[0].in_features
    trained = copy.deepcopy(smaller.module)
    with torch.no_grad():
        trained.fc1[0].weight += 1
    changed = smaller.with_module(trained)
    changed.save(tmp_path)
    loaded = TorchModel.load(tmp_path)
    assert torch.equal(loaded.predict(digits_task.example_inputs), changed.predict(digits_task.example_inputs))
    again, other = (reborn(smaller, seed=seed) for seed in (1, 2))
    assert again.module.fc1[0].weight.shape == smaller.module.fc1[0].weight.shape
    assert not torch.equal(again.module.fc1[0].weight, other.module.fc1[0].weight)
    assert torch.equal(again.module.fc1[0].weight, reborn(smaller, seed=1).module.fc1[0].weight)


def test_zeros_go_with_the_layer_that_is_replaced(plain):
    module = copy.deepcopy(plain.module)
    with torch.no_grad():
        module.fc1.weight[0], module.fc2.weight[0] = 0, 0
    counts = {"fc1.weight": module.fc1.in_features, "fc2.weight": module.fc2.in_features}
    sparse = plain.with_module(module).with_attachment(KeptZeros.of(module, counts))
    replaced = split(sparse, "fc1", 8)
    assert zeros_of(replaced) == {"fc2.weight": module.fc2.in_features}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"factory": lambda: nn.Linear(1, 1)},
            "must be built by a function at the top of a module that can be imported, got .*lambda",
        ),
        ({"arguments": {"inputs": torch.ones(1)}}, "arguments of two_layers must be JSON values"),
        ({"arguments": {"inputs": float("nan")}}, "arguments of two_layers must be JSON values"),
        ({"arguments": {"table_file": "a"}}, "must be neither files nor called 'factory', got .*table_file"),
        (
            {"weights": {}},
            r"weights for 'fc1' must be those of what two_layers gives, .* 3 missing: 0\.weight, 1\.weight, 1\.bias",
        ),
    ],
)
def test_replacement_that_cannot_be_built_again_is_refused(change, message, plain):
    with pytest.raises(StageError, match=message):
        split(plain, "fc1", 8, **change)


@pytest.mark.parametrize(
    ("path", "message"), [("fc9", "an edit must name a submodule"), ("", "only a submodule can be replaced")]
)
def test_place_that_cannot_be_replaced_is_refused(path, message, plain):
    with pytest.raises(InputError, match=message):
        plain.with_submodule(path, nn.Linear, {"in_features": 1, "out_features": 1}, {})


def test_another_structure_without_edits_is_refused_with_what_to_call(plain):
    module = copy.deepcopy(plain.module)
    module.fc1 = two_layers(module.fc1.in_features, 8, module.fc1.out_features)
    with pytest.raises(StageError, match=r"2 missing: fc1\.weight, fc1\.bias; 3 unexpected: .*with_submodule"):
        plain.with_module(module)


def test_edits_that_do_not_leave_the_module_are_refused(plain, digits_task):
    smaller = narrower(plain, digits_task.example_inputs, width=0.5, round_to=2)
    edits = structural_edits(plain.module, smaller.module)
    with pytest.raises(StageError, match="must have the tensors that the edits given leave"):
        plain.with_module(smaller.module, *edits[1:])
    with pytest.raises(StageError, match="of another shape"):
        plain.with_module(plain.module, Edit(path="fc1", shapes={"bias": (3,)}))
