from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import InputError
from compressor.models.weights import load_weights
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
