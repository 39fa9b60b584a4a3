import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.models.edits import Edit, apply_edits
from compressor.models.kept_zeros import KeptZeros, zeros_of
from compressor.models.trusted import Trusted
from compressor.pruning.students import narrower
from compressor.references.reference import Reference
from networks import PlainNetwork
from processes import run_python

PLAIN = Reference(factory="networks:PlainNetwork")

RELOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from compressor import TorchModel
directory = Path(sys.argv[1])
images = load_file(directory / "images.safetensors")["images"]
save_file({"logits": TorchModel.load(directory).predict((images,))}, directory / "logits.safetensors")
"""


def logits_of_a_fresh_process(directory: Path, images: torch.Tensor) -> torch.Tensor:
    save_file({"images": images}, directory / "images.safetensors")
    run_python("-c", RELOAD, directory, PYTHONPATH=str(Path(__file__).parents[1])).check_returncode()
    return load_file(directory / "logits.safetensors")["logits"]


def test_twice_pruned_model_reloads_in_a_fresh_process_with_equal_logits(tmp_path, digits_task):
    model = TorchModel.build(PLAIN, seed=3)
    for ratio in (0.5, 0.25):
        model = narrower(model, digits_task.example_inputs, width=1 - ratio, round_to=2)
    model.save(tmp_path)
    images = digits_task.test.inputs[0][:32]
    assert model.module.conv1.out_channels == 6
    assert torch.equal(logits_of_a_fresh_process(tmp_path, images), model.predict((images,)))


def test_model_that_lost_layers_and_channels_reloads_in_a_fresh_process_with_equal_logits(tmp_path, digits_task):
    model = TorchModel.build(Reference(factory="networks:StackedNetwork"), seed=3)
    fewer = Edit(path="stack1", children=("0", "2", "5")), Edit(path="stack2", children=("0", "5"))
    model = model.with_module(apply_edits(model.module, fewer), *fewer)
    model = narrower(model, digits_task.example_inputs, width=0.5, round_to=2)
    fewer_still = Edit(path="stack1", children=("0", "2"))
    model = model.with_module(apply_edits(model.module, (fewer_still,)), fewer_still)
    model.save(tmp_path)
    images = digits_task.test.inputs[0][:32]
    assert (len(model.module.stack1), len(model.module.stack2), model.module.stem.out_channels) == (2, 2, 8)
    assert torch.equal(logits_of_a_fresh_process(tmp_path, images), model.predict((images,)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param({"path": "layer4"}, "must name a submodule of CifarResNet, got 'layer4'", id="unknown-path"),
        pytest.param({"path": "conv1", "children": ["0"]}, "can lose children, got Conv2d at 'conv1'", id="no-stack"),
        pytest.param({"path": "layer1", "children": []}, "must be some of 0, 1, in this order, got ", id="none"),
        pytest.param({"path": "layer1", "children": ["2"]}, "must be some of 0, 1, .*'2'", id="unknown-child"),
        pytest.param({"path": "layer1", "children": ["0", "0"]}, "must be some of", id="child-twice"),
        pytest.param({"path": "layer1", "children": ["1", "0"]}, "in this order", id="other-order"),
        pytest.param({"path": "layer1", "children": 3}, r"model\.json must describe a saved model", id="no-list"),
        pytest.param({"path": "conv1", "shapes": {"forward": [3]}}, r"\(weight\), got 'forward'", id="no-tensor"),
        pytest.param({"path": "conv1", "shapes": {"weight": [-1]}}, r"model\.json must describe", id="negative"),
    ],
)
def test_saved_edit_that_does_not_fit_the_factory_is_refused(tmp_path, edit, message):
    TorchModel.build(Reference(factory="example_models:CifarResNet", blocks=2), seed=0).save(tmp_path)
    recipe = json.loads((tmp_path / "model.json").read_text())
    (tmp_path / "model.json").write_text(json.dumps({**recipe, "edits": [edit]}))
    with pytest.raises(InputError, match=message):
        TorchModel.load(tmp_path)


def test_saved_model_holds_no_pickle(tmp_path):
    TorchModel.build(PLAIN, seed=0).save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_weights_that_layers_share_are_stored_once_and_shared_again(tmp_path, digits_task):
    model = TorchModel.build(Reference(factory="networks:TiedNetwork"), seed=0)
    model.save(tmp_path)
    loaded = TorchModel.load(tmp_path)
    assert loaded.module.first.weight is loaded.module.second.weight
    assert torch.equal(loaded.predict(digits_task.example_inputs), model.predict(digits_task.example_inputs))
    assert (tmp_path / "model.safetensors").stat().st_size < 1.3 * 4 * 64 * (64 + 1 + 1 + 10)


def test_seed_decides_the_weights_of_a_new_model(digits_task):
    first, again, other = (TorchModel.build(PLAIN, seed=seed).predict(digits_task.example_inputs) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_factory_that_returns_no_module_is_refused():
    with pytest.raises(InputError, match=r"networks:not_a_module must return a torch.nn.Module, got str"):
        TorchModel.build(Reference(factory="networks:not_a_module"), seed=0)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_user_weights_load_from_safetensors_and_from_tensors_in_a_pt_file(tmp_path, suffix, digits_task):
    trained = PlainNetwork().eval()
    file = tmp_path / f"weights{suffix}"
    save_file(trained.state_dict(), file) if suffix == ".safetensors" else torch.save(trained.state_dict(), file)
    model = TorchModel.build(Reference(factory="networks:PlainNetwork", weights_file=str(file)), seed=0)
    assert torch.equal(model.predict(digits_task.example_inputs), trained(*digits_task.example_inputs))
    assert "weights_file" not in model.factory.arguments


def test_stored_model_may_only_name_a_factory_that_is_expected(tmp_path):
    TorchModel.build(PLAIN, seed=0).save(tmp_path)
    recipe = (tmp_path / "model.json").read_text()
    (tmp_path / "model.json").write_text(recipe.replace("networks:PlainNetwork", "networks:ResidualNetwork"))
    with pytest.raises(InputError, match=r"one that the pipeline names \(networks:PlainNetwork\)"):
        TorchModel.load(tmp_path, trusted=Trusted((PLAIN,)))


def test_moved_paths_of_a_factory_are_those_of_the_pipeline(tmp_path):
    reference = Reference(factory="networks:PlainNetwork", weights_file=str(tmp_path / "gone.safetensors"))
    TorchModel.build(PLAIN, seed=0).save(tmp_path)
    assert TorchModel.load(tmp_path, trusted=Trusted((reference,))).factory == PLAIN


def sparse(reference: Reference = PLAIN, **zeros: int) -> TorchModel:
    """A model whose named weights begin with so many zeros, and promise them."""
    model = TorchModel.build(reference, seed=0)
    promised = {f"{name.replace('__', '.')}.weight": count for name, count in zeros.items()}
    with torch.no_grad():
        for name, count in promised.items():
            model.module.get_parameter(name).flatten()[:count] = 0
    return model.with_attachment(KeptZeros.of(model.module, promised))


def test_promised_zeros_survive_saving_and_do_not_change_the_digest(tmp_path):
    model = sparse(fc1=1000)
    model.save(tmp_path)
    assert zeros_of(TorchModel.load(tmp_path)) == {"fc1.weight": 1000}
    assert model.digest == replace(model, attachments=()).digest


def test_a_model_that_lost_promised_zeros_is_refused_with_their_number(tmp_path):
    model = sparse(fc1=1000)
    trained = copy.deepcopy(model.module)
    with torch.no_grad():
        trained.fc1.weight[0, :3] = 1
    with pytest.raises(StageError, match=r"fc1\.weight must keep its 1000 zeros, got 997; pass the names"):
        model.with_module(trained)
    model.save(tmp_path)
    trained.fc1.weight.detach()[0, 3:] = 1
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(StageError, match=r"fc1\.weight must keep its 1000 zeros"):
        TorchModel.load(tmp_path)


def test_a_promise_about_no_parameter_is_refused():
    with pytest.raises(StageError, match=r"fc9\.weight must keep its 1 zeros, got no such parameter"):
        KeptZeros.of(TorchModel.build(PLAIN, seed=0).module, {"fc9.weight": 1})


def test_a_model_saved_before_there_were_attachments_loads(tmp_path):
    TorchModel.build(PLAIN, seed=0).save(tmp_path)
    recipe = json.loads((tmp_path / "model.json").read_text())
    del recipe["attachments"]
    (tmp_path / "model.json").write_text(json.dumps(recipe))
    assert zeros_of(TorchModel.load(tmp_path)) == {}


def test_zeros_are_counted_anew_in_weights_that_lost_channels(tmp_path, digits_task):
    model = sparse(fc1=1000, conv2=500)
    smaller = narrower(model, digits_task.example_inputs, width=0.5, round_to=2)
    assert zeros_of(smaller) == {
        f"{name}.weight": int((smaller.module.get_submodule(name).weight == 0).sum()) for name in ("fc1", "conv2")
    }
    smaller.save(tmp_path)
    assert zeros_of(TorchModel.load(tmp_path)) == zeros_of(smaller)


def test_promises_follow_the_layers_that_a_stack_keeps():
    model = sparse(Reference(factory="networks:StackedNetwork"), stack1__1__conv=7, stack1__5__conv=11, stem=3)
    fewer = Edit(path="stack1", children=("0", "5"))
    shorter = model.with_module(apply_edits(model.module, (fewer,)), fewer)
    assert zeros_of(shorter) == {"stack1.1.conv.weight": 11, "stem.weight": 3}
