"""What a module gives: runs, the tensor in what comes out, and how far two tensors differ."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from compressor.errors import InputError
from compressor.models.outputs import first_tensor, relative_error, run_on_examples

IMAGES = (torch.ones(2, 3),)


def test_run_on_examples_gives_what_the_module_gives_without_gradient():
    outputs = run_on_examples(layer := nn.Linear(3, 2), IMAGES, "Linear")
    assert isinstance(outputs, Tensor)
    assert not outputs.requires_grad
    torch.testing.assert_close(outputs, layer(*IMAGES).detach(), rtol=0, atol=0)


def test_run_that_fails_says_what_ran_why_it_failed_and_what_to_do():
    message = r"^the net must run on example_inputs, but: RuntimeError: mat1 and mat2 .*; give it 4 inputs$"
    with pytest.raises(InputError, match=message):
        run_on_examples(nn.Linear(4, 2), IMAGES, "the net", advice="give it 4 inputs")


def test_first_tensor_is_found_however_deep_it_lies():
    first, second = torch.zeros(1), torch.ones(1)
    assert first_tensor(first) is first
    assert first_tensor((None, [first, second])) is first
    assert first_tensor(OrderedDict(cache=(), logits=(first,), other=second)) is first
    assert first_tensor({"loss": 1.0}) is None


def test_relative_error_is_root_mean_square_over_that_of_the_reference():
    reference = torch.tensor([[3.0, 4.0]])
    assert relative_error(reference + torch.tensor([[0.3, 0.4]]), reference) == pytest.approx(0.1)
    assert relative_error(reference, reference) == 0
    assert relative_error(torch.zeros(1, 2), torch.zeros(1, 2)) == 0


def test_relative_error_of_other_shapes_and_of_nan_is_within_no_tolerance():
    reference = torch.ones(2, 2)
    assert relative_error(torch.ones(2, 3), reference) == math.inf
    assert not relative_error(torch.full((2, 2), math.nan), reference) <= 1
    assert not relative_error(torch.ones(2, 2), torch.zeros(2, 2)) <= 1
