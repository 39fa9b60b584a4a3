import math

import pytest

from compressor.errors import StageError
from compressor.pruning.channels import prunable_groups
from networks import PlainNetwork


def test_weights_that_are_not_finite_are_named(digits_task):
    module = PlainNetwork()
    module.conv2.weight.data[0] = math.nan
    module.fc1.bias.data[3] = math.inf
    with pytest.raises(StageError, match=r"must be finite to be pruned, but conv2\.weight, fc1\.bias are not"):
        prunable_groups(module, digits_task.example_inputs)
