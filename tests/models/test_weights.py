import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.models.weights import load_weights
from compressor.references.reference import Reference
from networks import PlainNetwork


class Exploit:
    def __reduce__(self):
        return (Path.touch, (Path("exploited"),))


@pytest.mark.parametrize("content", [Exploit(), PlainNetwork()])
def test_pickled_objects_are_refused_and_never_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "weights.pt")
    with pytest.raises(InputError, match="tensors only"):
        load_weights(PlainNetwork(), Path("weights.pt"))
    assert not Path("exploited").exists()


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a weights file", b"\xff" * 4096])
def test_damaged_weights_are_an_input_error(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name):
        load_weights(PlainNetwork(), tmp_path / name)


def test_missing_weights_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="nothing"):
        load_weights(PlainNetwork(), tmp_path / "nothing.pt")


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    state = PlainNetwork().state_dict()
    state["extra.weight"] = torch.zeros(1)
    state["fc2.bias"] = torch.zeros(5)
    del state["conv1.weight"]
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(InputError) as refusal:
        load_weights(PlainNetwork(), tmp_path / "weights.safetensors")
    for part in ("1 missing: conv1.weight", "1 unexpected: extra.weight", "fc2.bias (5,) instead of (10,)"):
        assert part in str(refusal.value)


def saved(tmp_path, content, name="weights.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", "module._orig_mod.", "model.module."])
@pytest.mark.parametrize("holder", [None, "state_dict", "model_state_dict", "model"])
def test_weights_behind_a_prefix_or_in_a_checkpoint_are_found(prefix, holder, tmp_path, caplog):
    state = PlainNetwork().state_dict()
    content = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    file = saved(tmp_path, content if holder is None else {"epoch": 3, "note": "best", holder: content})
    module = PlainNetwork()
    with caplog.at_level(logging.INFO, "compressor"):
        load_weights(module, file)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert str(file) in caplog.text
    assert "prefix" in caplog.text


def test_names_of_compiled_layers_and_the_counter_of_an_average_are_left_out(tmp_path):
    state = PlainNetwork().state_dict()
    compiled = {f"module.{name.replace('fc1.', 'fc1._orig_mod.')}": tensor for name, tensor in state.items()}
    module = PlainNetwork()
    load_weights(module, saved(tmp_path, {"n_averaged": torch.tensor(4), **compiled}))
    assert torch.equal(module.fc1.weight, state["fc1.weight"])


def test_prefix_does_not_excuse_what_does_not_fit(tmp_path):
    content = {f"module.{name}": tensor for name, tensor in PlainNetwork().state_dict().items()}
    del content["module.fc1.bias"]
    with pytest.raises(InputError, match="must hold exactly the tensors of PlainNetwork"):
        load_weights(PlainNetwork(), saved(tmp_path, content))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"version": "1.0"}, "it has a str as 'version'"),
        ({"epoch": 3}, "it has a int as 'epoch'"),
        ({7: torch.zeros(1)}, "it has a Tensor as 7"),
        ({"nested": {"a": torch.zeros(1)}}, "it has a dict as 'nested'"),
    ],
)
def test_state_dict_with_something_else_in_it_is_refused(entry, message, tmp_path):
    with pytest.raises(InputError, match=message):
        load_weights(PlainNetwork(), saved(tmp_path, {**PlainNetwork().state_dict(), **entry}))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{}", "no pickle and no zip"), (b"\x10\0\0\0\0\0\0\0{}              ", "it looks like safetensors")],
)
def test_file_that_torch_cannot_have_saved_is_called_that(content, message, tmp_path):
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_weights(PlainNetwork(), tmp_path / "w.bin")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(number, tmp_path):
    state = PlainNetwork().state_dict()
    state["fc1.bias"][3] = number
    file = saved(tmp_path, state)
    with pytest.raises(InputError, match=r"'fc1.bias' of .*weights.pt has NaN or infinity in 1 of 64 numbers"):
        TorchModel.build(Reference(factory="networks:PlainNetwork", weights_file=str(file)), seed=0)


def half_network():
    return PlainNetwork().half()


def double_network():
    return PlainNetwork().double()


@pytest.mark.parametrize(("factory", "kind"), [("half_network", "float16"), ("double_network", "float64")])
def test_model_of_another_precision_computes_in_float32(factory, kind, caplog):
    with caplog.at_level(logging.INFO, "compressor"):
        model = TorchModel.build(Reference(factory=f"{__name__}:{factory}"), seed=0)
    assert {tensor.dtype for tensor in model.module.state_dict().values()} <= {torch.float32, torch.int64}
    assert model.predict((torch.zeros(2, 1, 8, 8),)).dtype == torch.float32
    assert f"{factory}: tensors in {kind} are computed in float32: conv1.weight, " in caplog.text
