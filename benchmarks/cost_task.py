"""MNIST with as many training images as asked: what `cost.yaml` names."""

from dataclasses import replace
from pathlib import Path

from mnist import lenet5, student, task
from torch import nn

from compressor import Samples, Task


def large() -> nn.Module:
    """The model to compress."""
    return lenet5()


def small() -> nn.Module:
    """The model to distil into."""
    return student()


def some_of(data_dir: Path, images: int) -> Task:
    """The task of `mnist.yaml` with the first `images` training images."""
    whole = task(data_dir)
    assert isinstance(whole.train, Samples)
    return replace(whole, train=Samples((whole.train.inputs[0][:images].clone(),), whole.train.targets[:images]))
