"""Samples and targets are looked at in every split before any time is spent."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from compressor.errors import InputError
from compressor.models.artifact import TorchModel
from compressor.references.reference import Reference
from compressor.run.preflight import check_model, check_task
from compressor.task import IGNORED, Metric, Samples, Task

MODEL = TorchModel(nn.Linear(6, 4).eval(), Reference(factory="networks:PlainNetwork"))
ANY = Metric("any", lambda outputs, _targets: outputs.double().sum().reshape(1), float)


def numbered(start, targets):
    return Samples((torch.randn(len(targets), 6, generator=torch.Generator().manual_seed(start)),), targets)


def task(**changes):
    names = ("train", "validation", "test", "calibration")
    splits = {name: numbered(place, torch.arange(40) % 4) for place, name in enumerate(names)}
    return replace(Task(**splits, example_inputs=(torch.zeros(2, 6),)), **changes)


def with_target(value, row=7, like=None):
    targets = torch.arange(40) % 4 if like is None else like.clone()
    targets[row] = value
    return numbered(9, targets)


def check(given):
    check_model(MODEL, check_task(given))


@pytest.mark.parametrize("split", ["train", "validation", "test", "calibration"])
@pytest.mark.parametrize("label", [4, -1])
def test_class_that_the_model_does_not_give_is_named_in_every_split(split, label):
    with pytest.raises(InputError, match=rf"{split} split must be a class from 0 to 3, .* got {label} in sample 7"):
        check(task(**{split: with_target(label)}))


def test_target_that_is_not_to_count_passes():
    check(task(test=with_target(IGNORED)))


def test_class_that_the_loss_passes_over_is_taken_where_no_metric_counts_it():
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none", ignore_index=255)

    check(task(train=with_target(255), loss=loss, metrics=(ANY,)))
    with pytest.raises(InputError, match="got 255 in sample 7"):  # accuracy would count it as an error
        check(task(train=with_target(255), loss=loss))

    def last(outputs, targets):
        return -outputs.log_softmax(dim=1)[torch.arange(len(targets)), targets]

    with pytest.raises(InputError, match="got -1 in sample 7"):  # to an index, -1 is the last class
        check(task(train=with_target(-1), loss=last, metrics=(ANY,)))


def labels(outputs, targets):
    return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(dim=1)


def of_numbers(loss, numbers, **changes):
    splits = {name: numbered(i, numbers) for i, name in enumerate(("train", "validation", "test", "calibration"))}
    return task(**{**splits, "loss": loss, "metrics": (ANY,), **changes})


def test_label_that_is_neither_yes_nor_no_is_named():
    bits = torch.randint(0, 2, (40, 4), generator=torch.Generator().manual_seed(0)).float()
    check(of_numbers(labels, bits))
    with pytest.raises(InputError, match=r"targets of the test split must be a label, yes or no, .* got 2 in sample 7"):
        check(of_numbers(labels, bits, test=with_target(2.0, row=(7, 1), like=bits)))


def test_missing_label_passes_if_the_loss_passes_it_over():
    def known(outputs, targets):
        each = F.binary_cross_entropy_with_logits(outputs, targets.clamp(min=0), reduction="none")
        return (each * (targets >= 0)).mean(dim=1)

    bits = torch.randint(0, 2, (40, 4), generator=torch.Generator().manual_seed(0)).float()
    check(of_numbers(known, bits, train=with_target(-1.0, row=(7, 1), like=bits)))


def test_number_that_is_not_finite_is_named():
    numbers = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    def squares(outputs, targets):
        return (outputs - targets).square().mean(dim=1)

    with pytest.raises(InputError, match="targets of the validation split must be a finite number, got nan in sample"):
        check(of_numbers(squares, numbers, validation=with_target(float("nan"), row=(7, 0), like=numbers)))


def test_split_of_one_class_is_told_in_the_log(caplog):
    with caplog.at_level(logging.WARNING, "compressor"):
        check(task(test=numbered(8, torch.full((40,), 2))))
    assert "all samples of the test split have one class, 2" in caplog.text
    assert "train" not in caplog.text


def test_split_without_a_target_that_counts_is_refused():
    with pytest.raises(InputError, match="every target of the test split is -100"):
        check(task(test=numbered(8, torch.full((40,), IGNORED))))


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.zeros(6), 0)] * 40)


class Unequal(Dataset):
    def __init__(self, odd):
        self.odd = odd

    def __len__(self):
        return 600

    def __getitem__(self, index):
        return self.odd if index == 300 else (torch.full((6,), float(index)), index % 4)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        pytest.param(Stream(), "the train split must have a length and samples by number", id="stream"),
        pytest.param(Unequal((torch.zeros(5), 0)), r"sample 299 is torch.float32 \(6,\).* sample 300", id="shape"),
        pytest.param(Unequal((torch.zeros(6, dtype=torch.float64), 0)), "sample 300 is torch.float64", id="type"),
        pytest.param(Unequal((torch.zeros(6), torch.zeros(2))), "sample 300 is", id="target"),
        pytest.param([torch.zeros(6)] * 40, r"a sample of the train split must be \(input, target\)", id="no-target"),
        pytest.param([(torch.zeros(6), "cat")] * 40, "must be .* of tensors or numbers, got Tensor, ", id="text"),
        pytest.param([(torch.zeros(6), None)] * 40, r"must be \(input, target\)", id="none"),
        pytest.param([{"x": torch.zeros(6), "y": 0}] * 40, r"must be \(input, target\)", id="mapping"),
    ],
)
def test_split_that_no_batch_can_be_made_of_is_refused(split, message):
    with pytest.raises(InputError, match=message):
        check_task(task(train=split))
