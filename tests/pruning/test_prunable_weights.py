"""Weights in which single numbers may become zero, and those that stay dense."""

import pytest
import torch
from torch import nn

from compressor.errors import StageError
from compressor.models.artifact import TorchModel
from compressor.pruning.conv1d import with_linears
from compressor.pruning.prunable_weights import prunable_weights
from compressor.references.reference import Reference
from networks import PlainNetwork, ResidualNetwork, TiedNetwork


def test_protecting_everything_is_refused(digits_task):
    with pytest.raises(StageError, match=r"that can lose weights, got none; protect leaves out \*\*"):
        prunable_weights(PlainNetwork(), digits_task.example_inputs, protect=("**",))


def freeze(module):
    module.conv2.requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        (freeze, {"conv2": "frozen"}),
        (lambda m: m.add_module("forgotten", nn.Linear(3, 3)), {"forgotten": "without effect on the outputs"}),
        (lambda m: nn.utils.parametrizations.weight_norm(m.fc1), {"fc1": "computed from other parameters"}),
    ],
    ids=["frozen", "unused", "computed"],
)
def test_weights_that_cannot_become_zero_stay_dense(change, dense, digits_task):
    module = PlainNetwork()
    change(module)
    found = prunable_weights(module, digits_task.example_inputs)
    names = {"conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"}
    assert found.dense == dense
    assert set(found.dimensions) == names - {f"{path}.weight" for path in dense}
    assert prunable_weights(module, digits_task.example_inputs, protect=tuple(dense)).dense == {}


def test_shared_weights_stay_dense(digits_task):
    found = prunable_weights(TiedNetwork(), digits_task.example_inputs)
    assert list(found.dimensions) == ["head.weight"]
    assert found.dense == dict.fromkeys(["first", "second"], "shared: first.weight = second.weight")


def test_output_layer_tied_to_an_embedding_stays_dense():
    model = with_linears(TorchModel.build(Reference(factory="transformer_networks:gpt2"), seed=0))
    found = prunable_weights(model.module, (torch.arange(14).view(2, 7),))
    assert len(found.dimensions) == 8
    assert found.dense == {"model.lm_head": "shared: model.transformer.wte.weight = model.lm_head.weight"}


def test_weights_that_are_not_finite_are_refused(digits_task):
    module = PlainNetwork()
    with torch.no_grad():
        module.fc1.weight[0, 0] = torch.nan
    with pytest.raises(StageError, match=r"must be finite .* fc1\.weight"):
        prunable_weights(module, digits_task.example_inputs)


def test_depthwise_and_transposed_convolutions_and_attention_are_pruned():
    assert "depthwise.weight" in prunable_weights(ResidualNetwork(), (torch.zeros(2, 1, 8, 8),)).dimensions
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 8, 2))
    assert prunable_weights(transposed, (torch.zeros(2, 4, 8, 8),)).dimensions == {"0.weight": 0}
    encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    names = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert set(prunable_weights(encoder, (torch.zeros(2, 3, 8),)).dimensions) == names
