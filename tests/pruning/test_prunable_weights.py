"""Weights in which single numbers may become zero, and those that are refused."""

import pytest
import torch
from torch import nn

from compressor.errors import StageError
from compressor.pruning.prunable_weights import prunable_weights
from networks import PlainNetwork, ResidualNetwork, TiedNetwork


def test_protecting_everything_is_refused(digits_task):
    with pytest.raises(StageError, match="a convolution or linear layer that is not protected, got none"):
        prunable_weights(PlainNetwork(), digits_task.example_inputs, protect=("**",))


def test_frozen_weights_are_refused_unless_protected(digits_task):
    module = PlainNetwork()
    module.conv2.requires_grad_(requires_grad=False)
    with pytest.raises(StageError, match=r"must have requires_grad .* frozen: conv2\.weight; name their layers in"):
        prunable_weights(module, digits_task.example_inputs)
    assert "conv2.weight" not in prunable_weights(module, digits_task.example_inputs, protect=("conv2",))


def test_shared_weights_are_refused_unless_protected(digits_task):
    module = TiedNetwork()
    with pytest.raises(StageError, match=r"shared: first\.weight = second\.weight; name their layers in protect"):
        prunable_weights(module, digits_task.example_inputs)
    assert list(prunable_weights(module, digits_task.example_inputs, protect=("first", "second"))) == ["head.weight"]


def test_weights_without_effect_are_refused_unless_protected(digits_task):
    module = PlainNetwork()
    module.forgotten = nn.Linear(3, 3)
    with pytest.raises(StageError, match=r"take part in the outputs .* unused: forgotten\.weight"):
        prunable_weights(module, digits_task.example_inputs)
    assert len(prunable_weights(module, digits_task.example_inputs, protect=("forgotten",))) == 4


def test_weights_computed_from_others_are_refused_unless_protected(digits_task):
    module = PlainNetwork()
    nn.utils.parametrizations.weight_norm(module.fc1)
    with pytest.raises(StageError, match=r"must be parameters .* computed from others: fc1\.weight"):
        prunable_weights(module, digits_task.example_inputs)
    assert "fc1.weight" not in prunable_weights(module, digits_task.example_inputs, protect=("fc1",))


def test_weights_that_are_not_finite_are_refused(digits_task):
    module = PlainNetwork()
    with torch.no_grad():
        module.fc1.weight[0, 0] = torch.nan
    with pytest.raises(StageError, match=r"must be finite .* fc1\.weight"):
        prunable_weights(module, digits_task.example_inputs)


def test_depthwise_and_transposed_convolutions_and_attention_are_pruned():
    assert "depthwise.weight" in prunable_weights(ResidualNetwork(), (torch.zeros(2, 1, 8, 8),))
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 8, 2))
    assert prunable_weights(transposed, (torch.zeros(2, 4, 8, 8),)) == {"0.weight": 0}
    encoder = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    names = {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}
    assert set(prunable_weights(encoder, (torch.zeros(2, 3, 8),))) == names
