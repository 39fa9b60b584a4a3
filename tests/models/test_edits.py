import pytest
import torch
from torch import nn

from compressor.errors import StageError
from compressor.models.artifact import TorchModel
from compressor.models.edits import Edit, apply_edits, structural_edits
from compressor.pruning.students import narrower
from compressor.references.reference import Reference
from networks import ConcatenatedNetwork, PlainNetwork, ResidualNetwork


def test_children_that_a_stack_keeps_are_renumbered_and_the_given_module_keeps_all():
    relu = nn.ReLU()
    stack = nn.Sequential(nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 4))
    edited = apply_edits(stack, (Edit(path="", children=("0", "1", "3", "4")),))
    assert [name for name, _ in edited.named_children()] == ["0", "1", "3"]  # one ReLU stands in it twice
    assert torch.equal(edited(torch.eye(4)), stack[4](relu(stack[0](torch.eye(4)))))
    assert len(stack) == 5


@pytest.mark.parametrize("network", [PlainNetwork, ResidualNetwork, ConcatenatedNetwork])
def test_edits_give_a_new_module_the_sizes_of_the_pruned_one(network, digits_task):
    module = network().eval()
    whole = TorchModel(module, Reference(factory="networks:PlainNetwork"))
    smaller = narrower(whole, digits_task.example_inputs, width=0.5, round_to=4).module
    rebuilt = apply_edits(network(), structural_edits(module, smaller))
    rebuilt.load_state_dict(smaller.state_dict())
    images = digits_task.test.inputs[0][:8]
    assert torch.equal(rebuilt.eval()(images), smaller(images))


def test_edits_refuse_modules_of_another_structure():
    with pytest.raises(StageError, match="same submodules"):
        structural_edits(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Conv1d(2, 2, 1)))


class UnsavedBuffer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 16)
        self.register_buffer("scale", torch.ones(16), persistent=False)


def test_resized_buffer_that_is_not_saved_is_refused():
    smaller = UnsavedBuffer()
    smaller.scale = torch.ones(8)
    with pytest.raises(StageError, match="scale has persistent=False"):
        structural_edits(UnsavedBuffer(), smaller)
