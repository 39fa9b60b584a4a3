import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D as HuggingFaceConv1D

from compressor.errors import InputError, StageError
from compressor.models.artifact import TorchModel
from compressor.models.edits import Edit, apply_edits, structural_edits
from compressor.pruning.conv1d import with_linears
from compressor.pruning.groups import without
from compressor.pruning.transformers import transformer_groups
from compressor.references.reference import Reference
from transformer_networks import gpt2

GPT2 = Reference(factory="transformer_networks:gpt2")
TOKENS = torch.arange(14).view(2, 7)


def test_linear_layers_give_the_logits_of_conv1d_and_tied_weights_stay_tied():
    model = TorchModel.build(GPT2, seed=0)
    converted = with_linears(model)
    assert not any(isinstance(layer, HuggingFaceConv1D) for layer in converted.module.modules())
    # another kernel adds in another order
    torch.testing.assert_close(converted.predict((TOKENS,)), model.predict((TOKENS,)), rtol=1e-4, atol=1e-6)
    assert converted.module.model.lm_head.weight is converted.module.model.transformer.wte.weight
    assert isinstance(model.module.model.transformer.h[0].attn.c_attn, HuggingFaceConv1D)


def test_converted_model_reloads_with_equal_logits_and_tied_weights(tmp_path):
    converted = with_linears(TorchModel.build(GPT2, seed=0))
    converted.save(tmp_path)
    loaded = TorchModel.load(tmp_path)
    assert torch.equal(loaded.predict((TOKENS,)), converted.predict((TOKENS,)))
    assert loaded.module.model.lm_head.weight is loaded.module.model.transformer.wte.weight


def test_edits_from_conv1d_to_a_smaller_linear_rebuild_it():
    before = gpt2().eval()
    model = with_linears(TorchModel(before, GPT2))
    groups = transformer_groups(model.module, (TOKENS,))
    smaller = without(model.module, groups, {group.path: (0,) for group in groups})
    rebuilt = apply_edits(before, structural_edits(before, smaller))
    rebuilt.load_state_dict(smaller.state_dict())
    assert torch.equal(rebuilt(TOKENS), smaller(TOKENS))


def test_model_without_conv1d_is_returned_itself():
    model = TorchModel.build(Reference(factory="transformer_networks:vit"), seed=0)
    assert with_linears(model) is model


def test_frozen_weight_stays_frozen():
    model = TorchModel.build(GPT2, seed=0)
    model.module.model.transformer.h[0].mlp.c_fc.requires_grad_(False)
    blocks = with_linears(model).module.model.transformer.h
    assert not blocks[0].mlp.c_fc.weight.requires_grad
    assert blocks[1].mlp.c_fc.weight.requires_grad


class Conv1D(nn.Module):
    """Another layer of this name and these shapes, with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.zeros(4))

    def forward(self, inputs):
        return (inputs @ self.weight + self.bias).relu()


def test_layer_of_the_same_name_that_computes_something_else_is_refused():
    with pytest.raises(StageError, match="Conv1D at '0' must compute inputs @ weight"):
        with_linears(TorchModel(nn.Sequential(Conv1D()).eval(), GPT2))


def test_weight_shared_by_two_conv1d_is_refused():
    layers = nn.Sequential(HuggingFaceConv1D(4, 4), HuggingFaceConv1D(4, 4))
    layers[1].weight = layers[0].weight
    with pytest.raises(StageError, match=r"but 0\.weight and 1\.weight share one"):
        with_linears(TorchModel(layers.eval(), GPT2))


def test_edit_that_finds_no_conv1d_is_refused():
    with pytest.raises(InputError, match=r"only a Conv1D below the model can become nn\.Linear, got ReLU at '0'"):
        apply_edits(nn.Sequential(nn.ReLU()), (Edit(path="0", linear=True),))
