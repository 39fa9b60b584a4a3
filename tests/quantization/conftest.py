"""A trained network, and one that computes the same but whose activations do not fit into uint8."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compressor import Task, TorchModel
from compressor.references.reference import Reference
from tests.networks import PlainNetwork


def wrap(module: nn.Module) -> TorchModel:
    return TorchModel(module.eval(), Reference(factory="tests.networks:PlainNetwork"))


@pytest.fixture(scope="session")
def plain(digits_task: Task) -> TorchModel:
    torch.manual_seed(0)
    module = PlainNetwork()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    images, targets = digits_task.train.inputs[0], digits_task.train.targets
    for _ in range(6):
        for rows in torch.randperm(len(targets)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(module(images[rows]), targets[rows]).backward()
            optimizer.step()
    return wrap(module)


@pytest.fixture(scope="session")
def lopsided(plain: TorchModel) -> TorchModel:
    """One channel of conv2 is 2000 times as large, which fc1 undoes: one scale for all channels leaves the others 0."""
    module = copy.deepcopy(plain.module)
    with torch.no_grad():
        module.conv2.weight[0] *= 2000
        module.conv2.bias[0] *= 2000
        module.fc1.weight[:, :16] /= 2000
    return wrap(module)
